"""The frames of one stream: replies take turns, frame by frame, so that a large one holds nobody up."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from layertap_server.budget import StreamBudget


@dataclass(slots=True, eq=False)
class Reply:
    """The frames of one request; `done` is called once, when they are written or dropped."""

    frames: Iterator[bytes]
    done: Callable[[], None]


class FrameQueue:
    """Replies in, frames out, round robin. The reader's pace is the writer's: a frame is made when
    gRPC takes it."""

    def __init__(self, budget: StreamBudget) -> None:
        self.budget = budget  # of the replies here, and of those that are on their way here
        self._replies: deque[Reply] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._error: Exception | None = None

    def add(self, reply: Reply) -> None:
        if self._ended:
            reply.done()
            return
        self._replies.append(reply)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Ends the frames with an error, once what is queued is written."""
        self._error = error

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    def close(self) -> None:
        """Drops what is not written: the caller went away."""
        self._ended = True
        while self._replies:
            self._replies.popleft().done()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while self._replies:
                reply = self._replies.popleft()
                frame = next(reply.frames, None)
                if frame is None:
                    reply.done()
                    continue
                self._replies.append(reply)
                yield frame
            if self._ended:
                break
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error

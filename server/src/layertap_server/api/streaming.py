"""One EncodeStream: a task answers each request, and the frames of all are interleaved round robin."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from layertap_server import errors
from layertap_server.api import serialization as wire
from layertap_server.api.bandwidth import BandwidthLimiter
from layertap_server.api.budget import StreamBudget
from layertap_server.api.parsing import StreamRequest, read_stream_request
from layertap_server.api.pipeline import Answer
from layertap_server.config import Config


@dataclass(slots=True, eq=False)
class Reply:
    """The frames of one request. `done` is called once, when they have been written or dropped."""

    frames: Iterator[bytes]
    done: Callable[[], None]
    # Whether it is a single small frame that may share a message with others (`accepts_grouped`).
    joins: bool = False


class FrameQueue:
    """Takes replies and yields their frames round robin. Used on the event loop only.

    A frame is built only when gRPC asks for it, so a slow reader holds back its own stream. After a large
    frame its reply pauses for as long as `bandwidth` says, so that large replies leave processor time for
    unary calls.
    """

    def __init__(self, bandwidth: BandwidthLimiter) -> None:
        self.bandwidth = bandwidth
        self._replies: deque[Reply] = deque()
        # Replies that pause after a large frame; they return to `_replies` by a timer.
        self._resting: set[Reply] = set()
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
        """Makes the iteration raise this error after `end`, once the queued frames have been written."""
        self._error = error

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    def close(self) -> None:
        """Drops all frames that are not written: the call is over, or its client has gone."""
        self._ended = True
        self._error = None
        dropped = [*self._replies, *self._resting]
        self._replies.clear()
        self._resting.clear()
        for reply in dropped:
            reply.done()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while self._replies:
                if self._replies[0].joins:
                    frames = self._joined()
                    yield wire.grouped_frame(frames) if len(frames) > 1 else frames[0]
                    for _ in frames:
                        self._replies.popleft().done()
                    continue
                reply = self._replies.popleft()
                frame = next(reply.frames, None)
                if frame is None:
                    reply.done()
                    continue
                self._back_in_line(reply, self.bandwidth.rest_s(len(frame)))
                yield frame
            if self._ended and not self._resting:
                break
            self._changed.clear()
            await self._changed.wait()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame: without the `del` they form a reference cycle

    def _joined(self) -> list[bytes]:
        """The frames at the head of the queue that fit into one message.

        Their replies stay in the queue; the caller removes them once the message has been written.
        """
        frames: list[bytes] = []
        num_bytes = 0
        for reply in self._replies:
            if not reply.joins or num_bytes > wire.WHOLE_BYTES:
                break
            frames.append(next(reply.frames))
            num_bytes += len(frames[-1])
        return frames

    def _back_in_line(self, reply: Reply, rest_s: float) -> None:
        """Appends the reply to the queue again: at once, or after `rest_s` seconds."""
        if rest_s <= 0:
            self._replies.append(reply)
            return

        def rested() -> None:
            if reply in self._resting:  # else `close` has dropped it
                self._resting.remove(reply)
                self._replies.append(reply)
                self._changed.set()

        self._resting.add(reply)
        asyncio.get_running_loop().call_later(rest_s, rested)


@dataclass(slots=True, eq=False)
class StreamCall:
    """Reads the requests of one EncodeStream, answers them, and adds their replies to `frames`."""

    config: Config
    frames: FrameQueue
    budget: StreamBudget
    # Answers one request; raises its error if it gets no answer.
    answer: Callable[[StreamRequest, StreamBudget], Awaitable[Answer]]
    count_refusal: Callable[[Exception], None]
    is_draining: Callable[[], bool]
    # Ids of requests whose last frame is not built yet; a new request must not use one of them.
    _in_flight: set[int] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def read(
        self, requests: AsyncIterator[bytes], on_begin: Callable[[], None], on_end: Callable[[], None]
    ) -> None:
        """Starts a task for each request, and ends `frames` once all of them are answered and written.

        It waits for requests between its calls of `on_begin` and `on_end`. If it is cancelled in between
        while the server drains, it stops reading and still answers the requests that it has accepted. It does
        the same when a request ends the stream with an error: one whose id cannot be read, or is already in
        flight.
        """
        max_requests = self.config.max_stream_requests
        room = asyncio.Semaphore(max_requests)
        try:
            try:
                on_begin()
                if self.is_draining():
                    raise errors.draining()
                async for data in requests:
                    asked = await read_stream_request(data, self.config.max_inputs_per_request)
                    del data
                    await room.acquire()
                    self._start(asked, room)
                    del asked  # the task alone refers to it, and can free it
            except asyncio.CancelledError:
                if not self.is_draining():
                    raise
                self.frames.fail(errors.draining())  # raised after the accepted requests are answered
            except errors.RequestError as error:
                self.count_refusal(error)
                self.frames.fail(error)
            on_end()
            for _ in range(max_requests):
                await room.acquire()
        finally:
            for task in self._tasks:
                task.cancel()
            self.frames.end()

    def _start(self, asked: StreamRequest, room: asyncio.Semaphore) -> None:
        if asked.request_id in self._in_flight:
            room.release()
            raise errors.invalid_argument(
                "request_id",
                f"{asked.request_id} is already in flight on this stream, so that the answers could not be told "
                "apart; the stream ends; give each request in flight an id of its own",
                reason="DUPLICATE_ID",
            )
        self._in_flight.add(asked.request_id)
        task = asyncio.create_task(self._answer(asked, room.release))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, asked: StreamRequest, release: Callable[[], None]) -> None:
        request_id, joins = asked.request_id, asked.accepts_grouped
        try:
            if self.is_draining():
                raise errors.draining()
            answer = await self.answer(asked, self.budget)
        except Exception as error:
            self.count_refusal(error)
            frame = wire.end_frame(request_id, errors.as_request_error(error).to_status())
            self.frames.add(Reply(self._last(request_id, [frame]), release, joins=joins))
            return

        def done() -> None:
            self.budget.release(answer.reserved_bytes)
            release()

        if asked.accepts_whole and answer.reserved_bytes <= wire.WHOLE_BYTES:
            frames = wire.whole_frame(request_id, answer.results(), answer.timing)
            self.frames.add(Reply(self._last(request_id, frames), done, joins=joins))
            return
        chunks = wire.result_frames(
            request_id,
            answer.results(),
            lambda: self.frames.bandwidth.frame_bytes(self.config.frame_bytes),
        )
        end = self._last(request_id, [wire.end_frame(request_id, timing=answer.timing)])
        self.frames.add(Reply(chain(chunks, end), done))

    def _last(self, request_id: int, frames: Iterable[bytes]) -> Iterator[bytes]:
        """Yields the one frame that ends a request, and frees the request's id just before.

        A client may use the id again as soon as it has read this frame, so no later frame may carry the id
        for this request.
        """
        for frame in frames:
            self._in_flight.discard(request_id)
            yield frame

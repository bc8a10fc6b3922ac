"""The requests of a stream, read ahead of its handler."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from grpc._cython import cygrpc

from layertap_server.rpc.loop_bridge import LoopBridge

NO_FLAGS = 0
# Until the handler takes them; and what each counts for beside its own bytes.
READ_AHEAD_BYTES, MESSAGE_BYTES = 1 << 16, 1 << 10


class Requests:
    """An iterator over them: of small ones there are several at each wake-up.

    gRPC's thread receives them and the event loop takes them; one lock guards what both change, so that there
    is never a second receive beside one that is under way, nor none while the loop waits for one.
    """

    def __init__(
        self,
        bridge: LoopBridge,
        start: Callable[[Sequence[Any], Callable[[Any], None]], None],
        deserializer: Callable[[bytes], Any] | None,
    ) -> None:
        self._bridge = bridge
        self._start = start
        self._deserializer = deserializer
        self._lock = threading.Lock()
        # Those that nobody has asked for; None is the end.
        self._waiting: deque[bytes | None] = deque()
        self._waiting_bytes = 0
        self._is_receiving = False
        # Of the event loop only.
        self._reader: asyncio.Future[None] | None = None

    def _receive(self) -> None:
        """By whoever has set `_is_receiving`."""
        self._start((cygrpc.ReceiveMessageOperation(NO_FLAGS),), self._take)

    def _take(self, event: Any) -> None:
        """On gRPC's thread."""
        message: bytes | None = event.batch_operations[0].message()
        with self._lock:
            self._waiting.append(message)
            if message is not None:
                self._waiting_bytes += len(message) + MESSAGE_BYTES
            goes_on = self._is_receiving = message is not None and self._has_room()
            is_first = len(self._waiting) == 1
        if goes_on:
            self._receive()
        if is_first:  # else the loop is told already, and looks again
            self._bridge.post(self._wake)

    def _has_room(self) -> bool:
        return self._waiting_bytes < READ_AHEAD_BYTES

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        while not self._may_take():
            self._reader = self._bridge.loop.create_future()
            await self._reader
        with self._lock:
            message = self._waiting[0]
            if message is None:  # stays, for whoever asks again
                raise StopAsyncIteration
            self._waiting.popleft()
            self._waiting_bytes -= len(message) + MESSAGE_BYTES
        return self._deserializer(message) if self._deserializer else message

    def _may_take(self) -> bool:
        """Whether there is something; else it is being received."""
        with self._lock:
            if self._waiting:
                return True
            starts = not self._is_receiving
            self._is_receiving = True
        if starts:
            self._receive()
        return False

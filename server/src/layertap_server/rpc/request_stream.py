"""The requests of a streaming call, received ahead of its handler."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from grpc._cython import cygrpc

from layertap_server.rpc.loop_bridge import LoopBridge
from layertap_server.runs_on import on_any_thread, on_event_loop, on_grpc_thread

NO_FLAGS = 0
# Receiving pauses while so many bytes wait for the handler; `MESSAGE_BYTES` are added for each message.
READ_AHEAD_BYTES, MESSAGE_BYTES = 1 << 16, 1 << 10


class Requests:
    """An asynchronous iterator over the requests. Reading ahead lets one wake-up of the loop take several
    small ones.

    gRPC's thread receives messages, and the event loop takes them. `_lock` guards the fields that both
    change: `_waiting`, `_waiting_bytes` and `_is_receiving`. It keeps two invariants: at most one receive
    operation is pending, and one is pending whenever the loop waits for a message.
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
        # Messages received and not yet taken; None marks the end of the stream.
        self._waiting: deque[bytes | None] = deque()
        self._waiting_bytes = 0
        self._is_receiving = False
        # What `__anext__` waits for. Used on the event loop only.
        self._reader: asyncio.Future[None] | None = None

    @on_any_thread
    def _receive(self) -> None:
        """Starts a receive operation. Called without the lock, by whoever has just set `_is_receiving`."""
        self._start((cygrpc.ReceiveMessageOperation(NO_FLAGS),), self._take)

    @on_grpc_thread
    def _take(self, event: Any) -> None:
        """Takes a received message."""
        message: bytes | None = event.batch_operations[0].message()
        with self._lock:
            self._waiting.append(message)
            if message is not None:
                self._waiting_bytes += len(message) + MESSAGE_BYTES
            goes_on = self._is_receiving = message is not None and self._has_room()
            is_first = len(self._waiting) == 1
        if goes_on:
            self._receive()
        if is_first:  # else a wake-up is posted already, and the loop takes this message too
            self._bridge.post(self._wake)

    @on_any_thread
    def _has_room(self) -> bool:
        return self._waiting_bytes < READ_AHEAD_BYTES

    @on_event_loop
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
            if message is None:  # it stays in the queue, so that further calls end as well
                raise StopAsyncIteration
            self._waiting.popleft()
            self._waiting_bytes -= len(message) + MESSAGE_BYTES
        return self._deserializer(message) if self._deserializer else message

    @on_event_loop
    def _may_take(self) -> bool:
        """Whether a message or the end waits; if not, makes sure that a receive operation is pending."""
        with self._lock:
            if self._waiting:
                return True
            starts = not self._is_receiving
            self._is_receiving = True
        if starts:
            self._receive()
        return False

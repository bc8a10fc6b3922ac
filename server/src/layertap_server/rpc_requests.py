"""The requests of a stream, read ahead of its handler."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from grpc._cython import cygrpc

from layertap_server.rpc_news import News

NO_FLAGS = 0
# Until the handler takes them; and what each counts for beside its own bytes.
READ_AHEAD_BYTES, MESSAGE_BYTES = 1 << 16, 1 << 10


class Requests:
    """An iterator over them: of small ones there are several at each wake-up."""

    def __init__(
        self,
        news: News,
        start: Callable[[Sequence[Any], Callable[[Any], None]], None],
        deserializer: Callable[[bytes], Any] | None,
    ) -> None:
        self._news = news
        self._start = start
        self._deserializer = deserializer
        # Those that nobody has asked for; None is the end.
        self._waiting: deque[bytes | None] = deque()
        self._is_receiving = False
        # Since the beginning. Each is written by one thread only.
        self._bytes_received = self._bytes_read = 0
        self._reader: asyncio.Future[None] | None = None

    def _receive(self) -> None:
        self._is_receiving = True
        self._start((cygrpc.ReceiveMessageOperation(NO_FLAGS),), self._take)

    def _take(self, event: Any) -> None:
        """On gRPC's thread."""
        message: bytes | None = event.batch_operations[0].message()
        if message is not None:
            self._bytes_received += len(message) + MESSAGE_BYTES
        self._is_receiving = message is not None and self._has_room()
        self._waiting.append(message)
        if self._is_receiving:
            self._receive()
        if len(self._waiting) == 1:  # else the loop is told already, and looks again
            self._news.tell(self._wake)

    def _has_room(self) -> bool:
        return self._bytes_received - self._bytes_read < READ_AHEAD_BYTES

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        while not self._waiting:
            if not self._is_receiving:
                self._receive()
            self._reader = self._news.loop.create_future()
            await self._reader
        message = self._waiting[0]
        if message is None:  # stays, for whoever asks again
            raise StopAsyncIteration
        self._waiting.popleft()
        self._bytes_read += len(message) + MESSAGE_BYTES
        return self._deserializer(message) if self._deserializer else message

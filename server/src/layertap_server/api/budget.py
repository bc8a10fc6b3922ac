"""Limits the bytes of results that are promised or computed, and not yet sent: per server and per stream."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass(slots=True)
class ByteBudget:
    """Reservations against a limit. Used on the event loop only."""

    limit_bytes: int
    reserved_bytes: int = 0

    def reserve(self, num_bytes: int) -> bool:
        """False when it does not fit. When nothing is reserved, a reservation of any size fits."""
        if self.reserved_bytes and self.reserved_bytes + num_bytes > self.limit_bytes:
            return False
        self.reserved_bytes += num_bytes
        return True

    def release(self, num_bytes: int) -> None:
        self.reserved_bytes -= num_bytes


@dataclass(slots=True, eq=False)
class StreamBudget:
    """The part of the server's budget that one stream, or one unary call, may use. On the event loop only.

    When a stream has used it up, the stream's next request waits until earlier results are read. A request
    that is larger than the limit waits until the stream holds nothing else.
    """

    server: ByteBudget
    limit_bytes: int
    reserved_bytes: int = 0
    # Held by the one request that waits for room. Others queue for it: a large request would otherwise wait for
    # as long as smaller ones come.
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    async def reserve(self, num_bytes: int) -> bool:
        """Waits until the bytes fit into the stream's limit; False when they do not fit into the server's."""
        if self._turn.locked() or not self._has_room(num_bytes):
            async with self._turn:
                while not self._has_room(num_bytes):
                    self._released.clear()
                    await self._released.wait()
        if not self.server.reserve(num_bytes):
            return False
        self.reserved_bytes += num_bytes
        return True

    def _has_room(self, num_bytes: int) -> bool:
        return not self.reserved_bytes or self.reserved_bytes + num_bytes <= self.limit_bytes

    def release(self, num_bytes: int) -> None:
        self.server.release(num_bytes)
        self.reserved_bytes -= num_bytes
        self._released.set()

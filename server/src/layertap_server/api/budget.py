"""Bytes of results that are computed or promised, and not yet sent: bounded for the server and each stream."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass(slots=True)
class ByteBudget:
    """Reservations against a limit. Used on the event loop only."""

    limit_bytes: int
    reserved_bytes: int = 0

    def reserve(self, num_bytes: int) -> bool:
        """False when it does not fit; one reservation always does when nothing else is held."""
        if self.reserved_bytes and self.reserved_bytes + num_bytes > self.limit_bytes:
            return False
        self.reserved_bytes += num_bytes
        return True

    def release(self, num_bytes: int) -> None:
        self.reserved_bytes -= num_bytes


@dataclass(slots=True, eq=False)
class StreamBudget:
    """One stream's part of the server's budget, or one call's. Past it, the stream's next request waits
    until its earlier results are read; one that is larger waits until it is alone."""

    server: ByteBudget
    limit_bytes: int
    reserved_bytes: int = 0
    # Held by the request whose turn it is: a large one is not overtaken for ever.
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    async def reserve(self, num_bytes: int) -> bool:
        """Waits for room on the stream; False when the server has none."""
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

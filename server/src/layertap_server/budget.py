"""Bytes of results that are computed or promised, and not yet sent: bounded for the whole server."""

from __future__ import annotations

from dataclasses import dataclass


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

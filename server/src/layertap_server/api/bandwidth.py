"""How fast large frames go while calls are answered: a result of many megabytes must not take the processors
from the calls beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

# Smaller frames cost about as much as a call does.
LARGE_FRAME_BYTES = 1 << 16
# A larger one keeps the processors from a call for a millisecond; much smaller ones cost more in all.
FRAME_BYTES_BESIDE_CALLS = 1 << 18
# Calls that come no more often than this are not what streams give way to.
RECENT_S = 0.05


@dataclass(slots=True)
class BandwidthLimiter:
    """Spaces the large frames of all streams. Used on the event loop only.

    Alone, frames go as fast as their readers take them, and that fills a processor on either side of the
    connection. A call beside them then waits for one at each of its steps, by the operating system's slices
    of milliseconds. With a rest after each frame it waits for a frame at most.
    """

    # Of large frames, in all, while calls are answered; 0 for no bound.
    bytes_per_s: int
    clock: Callable[[], float] = time.monotonic
    _called_s: float = -math.inf
    _free_s: float = -math.inf

    def note_call(self) -> None:
        """A call begins or ends."""
        self._called_s = self.clock()

    def frame_bytes(self, usual: int) -> int:
        """How large the next frame may be: beside calls smaller than usual, since one waits for all of it."""
        return min(usual, FRAME_BYTES_BESIDE_CALLS) if self._has_calls(self.clock()) else usual

    def rest_s(self, num_bytes: int) -> float:
        """Seconds from the beginning of a frame of this size to that of the next of its reply."""
        now = self.clock()
        if num_bytes < LARGE_FRAME_BYTES or not self._has_calls(now):
            return 0.0
        self._free_s = max(self._free_s, now) + num_bytes / self.bytes_per_s
        return self._free_s - now

    def _has_calls(self, now: float) -> bool:
        return bool(self.bytes_per_s) and now - self._called_s <= RECENT_S

"""Limits the rate of large frames while unary calls are answered, so that a result of many megabytes does not
take the processors from them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

# Smaller frames are not limited: each costs about as much as a call.
LARGE_FRAME_BYTES = 1 << 16
# A larger frame would keep the processors from a call for a millisecond; much smaller ones cost more.
FRAME_BYTES_BESIDE_CALLS = 1 << 18
# Frames are limited for so long after a call begins or ends.
RECENT_S = 0.05


@dataclass(slots=True)
class BandwidthLimiter:
    """Spaces the large frames of all streams while unary calls are answered. Used on the event loop only,
    except `note_call`.

    Without calls, frames are sent as fast as their readers take them, which keeps a processor busy on either
    side of the connection. A call at the same time then waits for a processor at each of its steps, for time
    slices of milliseconds. With a pause after each frame, the call waits for one frame at most.
    """

    # The limit for the large frames of all streams together while calls are answered; 0 for no limit.
    bytes_per_s: int
    clock: Callable[[], float] = time.monotonic
    _called_s: float = -math.inf
    _free_s: float = -math.inf

    def note_call(self) -> None:
        """Has to be called when a unary call begins or ends, or is refused. On any thread."""
        self._called_s = self.clock()

    def frame_bytes(self, usual: int) -> int:
        """The most tensor bytes of the next frame: fewer while there are calls, which have to wait for it."""
        return min(usual, FRAME_BYTES_BESIDE_CALLS) if self._has_calls(self.clock()) else usual

    def rest_s(self, num_bytes: int) -> float:
        """Seconds from the start of a frame of this size to the start of its reply's next frame."""
        now = self.clock()
        if num_bytes < LARGE_FRAME_BYTES or not self._has_calls(now):
            return 0.0
        self._free_s = max(self._free_s, now) + num_bytes / self.bytes_per_s
        return self._free_s - now

    def _has_calls(self, now: float) -> bool:
        return bool(self.bytes_per_s) and now - self._called_s <= RECENT_S

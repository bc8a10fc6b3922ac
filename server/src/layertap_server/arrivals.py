"""What lately came, by priority and client, and so what is to be expected."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from layertap_server.fair_queue import Coming, Priority

# How far back: a third of a rate's weight is older.
WINDOW_NS = 500e6
# Of one that has not come for so long, nothing is expected.
FORGOTTEN_NS = 4 * WINDOW_NS
# A rate says no more of what is further ahead: a burst would keep out for a while who has a minute.
HORIZON_NS = 6 * WINDOW_NS


@dataclass(slots=True)
class Arrivals:
    """Rates in tokens at full depth, the past exponentially forgotten."""

    # Of each, what came, forgotten as of when it last did; the latest last.
    _recent: dict[tuple[Priority, str], tuple[float, int]] = field(default_factory=dict)

    def note(self, priority: Priority, client: str, size: float, now_ns: int) -> None:
        before, at_ns = self._recent.pop((priority, client), (0.0, now_ns))
        self._recent[priority, client] = size + before * math.exp((at_ns - now_ns) / WINDOW_NS), now_ns
        self._forget(now_ns)

    def expected(self, now_ns: int, within_ns: float) -> Coming:
        """What would come within so long, or until where one can see, at the same rates."""
        self._forget(now_ns)
        share = min(within_ns, HORIZON_NS) / WINDOW_NS
        return {
            one: size * math.exp((at_ns - now_ns) / WINDOW_NS) * share
            for one, (size, at_ns) in self._recent.items()
        }

    def _forget(self, now_ns: int) -> None:
        while self._recent:
            oldest = next(iter(self._recent))
            if now_ns - self._recent[oldest][1] <= FORGOTTEN_NS:
                break
            del self._recent[oldest]

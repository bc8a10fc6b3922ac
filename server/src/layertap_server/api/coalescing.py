"""Requests begun together while the event loop is what they wait for.

A request by itself runs through all of the server's code once, finds little of it in the processor's caches,
and wakes the engine's thread, which takes the interpreter from the next one. Sixteen in a row take little
more than half as long each. Network cards moderate their interrupts in the same way, for the same reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# How long a request waits for company, at most; how much of it is enough, and how little not worth it.
WAIT_S = 4e-3
GROUP_SIZE, MIN_GROUP_SIZE = 16, 4
# Share of the time that the loop's thread computes: from here on it is busy, and no more below. Between
# them lies what groups save.
BUSY_SHARE, CALM_SHARE = 0.6, 0.3
# How often that is looked at.
LOOK_NS = 10_000_000


@dataclass(slots=True)
class Coalescing:
    """Where requests begin: each begins at once while the event loop has rest, else in groups.

    A group is complete with as many as there lately were at once: of a few callers that all wait already,
    none can come. Used on that loop only.
    """

    clock_ns: Callable[[], int] = time.monotonic_ns
    # What the loop's thread has computed.
    used_ns: Callable[[], int] = time.thread_time_ns
    is_busy: bool = False
    # The most requests at once, between the last two looks and since.
    _most_before: int = 0
    _most_since: int = 0
    _num_come: int = 0  # since the last look
    _looked_ns: int = 0
    _used_ns: int = 0
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)
    _timer: asyncio.TimerHandle | None = None

    async def turn(self, num_present: int) -> None:
        """Returns when the request may begin; `num_present` are under way or wait, this one among them."""
        self._num_come += 1
        self._most_since = max(self._most_since, num_present)
        now = self.clock_ns()
        if now - self._looked_ns > LOOK_NS:
            self._look(now, num_present)
        if not self.is_busy:
            return
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append(future)
        if len(self._waiting) >= min(max(self._most_before, self._most_since), GROUP_SIZE):
            self._begin_group()
        elif self._timer is None:
            self._timer = loop.call_later(WAIT_S, self._begin_group)
        await future

    def _look(self, now: int, num_present: int) -> None:
        elapsed, used = now - self._looked_ns, self.used_ns()
        share = (used - self._used_ns) / elapsed
        # As many as would come while one waits, and as there are.
        company = min(self._num_come * WAIT_S * 1e9 / elapsed, self._most_since)
        self.is_busy = share > (CALM_SHARE if self.is_busy else BUSY_SHARE) and company >= MIN_GROUP_SIZE
        self._looked_ns, self._used_ns, self._num_come = now, used, 0
        self._most_before, self._most_since = self._most_since, num_present

    def _begin_group(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        group, self._waiting = self._waiting, []
        for future in group:
            if not future.done():  # else its caller went away
                future.set_result(None)

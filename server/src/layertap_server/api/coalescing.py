"""Starts requests in groups while the event loop is the bottleneck.

A request that starts alone runs through all of the server's code once, finds little of that code in the
processor's caches, and wakes the engine's thread, which takes the interpreter lock from the next request.
When sixteen start in a row, each takes little more than half as long. Network cards coalesce their interrupts
for the same reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# The longest that a request waits for its group. A group has at most `GROUP_SIZE` requests; where
# fewer than `MIN_GROUP_SIZE` can be expected within the wait, requests start at once.
WAIT_S = 4e-3
GROUP_SIZE, MIN_GROUP_SIZE = 16, 4
# Share of the time that the loop's thread uses the processor: above `BUSY_SHARE` grouping begins, at
# `CALM_SHARE` or below it ends. The two differ by what grouping saves, so that its effect does not end it.
BUSY_SHARE, CALM_SHARE = 0.6, 0.3
# The shortest interval between two measurements of that share.
LOOK_NS = 10_000_000


@dataclass(slots=True)
class Coalescing:
    """Lets each request start at once while the event loop has time to spare, and in groups otherwise.

    A group is complete when it has as many requests as were lately present at the same time: when the few
    callers that exist are all waiting, no further request can arrive. Used on the event loop only.
    """

    clock_ns: Callable[[], int] = time.monotonic_ns
    # Processor time that the calling thread, which is the loop's, has used.
    used_ns: Callable[[], int] = time.thread_time_ns
    is_busy: bool = False
    # The most requests present at the same time: between the last two measurements, and since the last one.
    _most_before: int = 0
    _most_since: int = 0
    _num_come: int = 0  # requests that have arrived since the last measurement
    _looked_ns: int = 0
    _used_ns: int = 0
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)
    _timer: asyncio.TimerHandle | None = None

    async def turn(self, num_present: int) -> None:
        """Returns when the request may start.

        `num_present` is the number of requests that are running or waiting, this one included.
        """
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
        # The group to expect: the arrivals within `WAIT_S`, but no more than were present at the same time.
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
            if not future.done():  # it is done when its caller has cancelled
                future.set_result(None)

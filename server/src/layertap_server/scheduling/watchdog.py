"""Distinguishes a pass that hangs from a slow one, by the activity of its thread and not by the clock alone.

On an overloaded machine, a pass may take a hundred times as long as predicted and still finish. If it was
given up as hanging, all queued and running requests would be lost. The kernel counts for each thread how long
it computed, and how long it was ready to run and waited for a core. A thread in an endless loop computes. A
thread that waits for an event that never comes does neither. A thread that gets too little of a core computes
a little, and waits for a core for most of the time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from layertap_server.scheduling.running_batch import RunningBatch

logger = logging.getLogger(__name__)

# A pass is never taken to hang before it has lasted this many times its predicted time.
HANG_FACTOR = 10
# A thread makes progress if it computes, or waits for a core, for more than this part of the time.
MOVING_SHARE = 0.01
# Upper bound of the time that counts between two looks: this process, with all its threads, may have been
# stopped in between.
MAX_STEP_NS = 2e9


@dataclass(frozen=True, slots=True)
class Activity:
    """Nanoseconds of one thread since its start."""

    computed_ns: int
    # Ready to run, but waiting for a core.
    queued_ns: int


def activity_of(thread_id: int) -> Activity | None:
    """The activity of a thread of this process, by its native id; None where the system does not count it.

    Source: Linux, Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat.
    """
    try:
        computed_ns, queued_ns, _ = map(
            int, Path(f"/proc/self/task/{thread_id}/schedstat").read_text().split()
        )
    except (OSError, ValueError):
        return None
    return Activity(computed_ns, queued_ns) if computed_ns else None  # 0: the kernel does not count it


@dataclass(slots=True)
class Watched:
    """A pass, and what was seen of it since the first look."""

    one: RunningBatch
    since_ns: int
    first: Activity | None
    last: Activity | None
    watched_ns: float = 0.0
    # The time since its thread last made progress.
    still_ns: float = 0.0
    was_told: bool = False


class Watchdog:
    """Finds passes of one engine that hang. `look` is to be called periodically.

    The limit is the longer of `timeout_ns` and `HANG_FACTOR` times the predicted time. A pass hangs when its
    thread has computed for longer than the limit, or has neither computed nor waited for a core for longer
    than the limit. A thread that waits for a device does one or the other all the time, so a pass on a device
    hangs when it takes longer than the limit by the clock. Where the system does not count a thread's
    activity, the clock alone decides.
    """

    def __init__(
        self,
        name: str,
        timeout_ns: float,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        activity: Callable[[int], Activity | None] = activity_of,
    ) -> None:
        self._name, self._timeout_ns = name, timeout_ns
        self._clock_ns, self._activity = clock_ns, activity
        self._watched: list[Watched] = []
        self._looked_ns = clock_ns()

    def look(self, passes: Iterable[RunningBatch]) -> str | None:
        """Checks the running passes; returns the description of one that hangs, or None."""
        now = self._clock_ns()
        step_ns, self._looked_ns = min(now - self._looked_ns, MAX_STEP_NS), now
        before = {id(known.one): known for known in self._watched}
        self._watched = []
        found = None
        for one in passes:
            activity = self._activity(one.thread_id)
            known = before.get(id(one))
            if known is None or known.since_ns != one.since_ns:  # a part of a failed batch is a new pass
                known = Watched(one, one.since_ns, activity, activity)
            else:
                self._go_on(known, activity, step_ns)
            self._watched.append(known)
            if self._hangs(known):
                found = self._describe(known, now)
            elif now - one.since_ns > self._limit_ns(known) and not known.was_told:
                known.was_told = True
                logger.warning(
                    "%s: a forward pass is slow, but makes progress: %s",
                    self._name,
                    self._describe(known, now),
                )
        return found

    def _go_on(self, known: Watched, activity: Activity | None, step_ns: float) -> None:
        known.watched_ns += step_ns
        moved_ns = 0
        if activity is not None and known.last is not None:
            moved_ns = activity.computed_ns - known.last.computed_ns
            moved_ns += activity.queued_ns - known.last.queued_ns
        known.still_ns = 0.0 if moved_ns > MOVING_SHARE * step_ns else known.still_ns + step_ns
        known.last = activity

    def _limit_ns(self, known: Watched) -> float:
        return max(self._timeout_ns, HANG_FACTOR * known.one.predicted_ns)

    def _hangs(self, known: Watched) -> bool:
        limit_ns = self._limit_ns(known)
        if known.first is None or known.last is None:
            return known.watched_ns > limit_ns
        return known.still_ns > limit_ns or known.last.computed_ns - known.first.computed_ns > limit_ns

    @staticmethod
    def _describe(known: Watched, now: int) -> str:
        took_s, predicted_s = (now - known.since_ns) / 1e9, known.one.predicted_ns / 1e9
        said = f"it has run for {took_s:.1f} s; {predicted_s:.3f} s was predicted"
        if known.first is None or known.last is None:
            return said
        computed_s = (known.last.computed_ns - known.first.computed_ns) / 1e9
        queued_s = (known.last.queued_ns - known.first.queued_ns) / 1e9
        return (
            f"{said}; its thread computed for {computed_s:.1f} s and waited for a core for {queued_s:.1f} s"
        )

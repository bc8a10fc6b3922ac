"""The loop of one engine thread: it takes batches from the scheduler, runs them, and has their results
delivered.

A batch that fails is split and run again, down to the input at fault. Where the device runs asynchronously,
the next batch is launched before the current one is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from layertap_server.plan import Outputs
from layertap_server.scheduling.fair_queue import Unit
from layertap_server.scheduling.running_batch import Cores, Launch, RunningBatch, launched
from layertap_server.scheduling.scheduler import Scheduler, TooLargeError

logger = logging.getLogger(__name__)

# The next batch is formed when this share of the launched pass's predicted time is left (plus the time of a
# launch).
LEAD_SHARE = 0.25
# Weight of the newest launch in the moving average of launch times.
LAUNCH_WEIGHT = 0.1


class EngineLoop:
    """One thread's loop over the batches of a scheduler. Everything here runs on that thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        cores: Cores = Cores.ALL,
        life: int = 0,
        sleep_ns: Callable[[float], None] = lambda ns: time.sleep(ns / 1e9),
    ) -> None:
        """For a thread that computes with `cores`, and that was started when the scheduler had been abandoned
        `life` times."""
        self._scheduler = scheduler
        self._cores = cores
        self._life = life
        self._sleep_ns = sleep_ns
        # The launched batch whose outputs are collected in the next `step`.
        self._launched: RunningBatch | None = None
        # Moving average of the host's time for forming and launching a batch.
        self._launch_ns = 0.0

    def run(self) -> None:
        """Runs batches until the scheduler is closed and the queue empty, or until `abandon` was called more
        than `life` times. If the loop itself fails, every queued and running request is failed."""
        scheduler = self._scheduler
        try:
            while scheduler.wait_for_work(self._cores, self._life, has_other=self._launched is not None):
                self.step()
        except BaseException:
            if self._life == scheduler.num_abandoned:
                scheduler.abandon("the engine failed")
                raise
            logger.warning(
                "another thread of an engine that has already failed raised an error", exc_info=True
            )

    def step(self) -> bool:
        """Forms one batch from the queue, runs it and delivers its results. Returns False when there was
        nothing to do.

        Where the device runs asynchronously (the engine has `launch`), the batch is only launched, and the
        next step collects its outputs. That step forms and launches the following batch shortly before the
        device has finished this one, so that the device does not become idle.
        """
        under_way, self._launched = self._launched, None
        if under_way is not None:
            self._wait_for_room(under_way)
        formed = self._scheduler.form(self._cores)
        run_here = formed if formed is not None and not self._launch(formed) else None
        has_work = bool(formed or under_way)
        for one in (under_way, run_here):
            if one is not None:
                self.finish(one)
            has_work = self._scheduler.deliver_settled() or has_work
        return has_work

    def finish(self, one: RunningBatch) -> None:
        """Waits for the outputs of a batch (or runs it now if it was not launched), and settles its
        tickets."""
        self._answer(one, one.units, one.outputs or partial(self._run, one.units))
        self._scheduler.has_run(one, self._launched)

    def _wait_for_room(self, under_way: RunningBatch) -> None:
        """Sleeps until shortly before the predicted end of the running pass: before it by the time of a
        launch plus `LEAD_SHARE` of the pass. If the thread woke after the end of the pass, it would measure
        too long a time, and the predictions would grow without end."""
        lead_ns = self._launch_ns + LEAD_SHARE * under_way.predicted_ns
        self._sleep_ns(max(under_way.ends_ns - lead_ns - self._scheduler.clock_ns(), 0.0))

    def _launch(self, formed: RunningBatch) -> bool:
        """Launches a batch on the device. Returns False where the engine has no `launch`."""
        launch: Launch | None = getattr(self._scheduler.engine, "launch", None)
        if launch is None:
            return False
        formed.outputs = launched(launch, [unit.work for unit in formed.units])
        took_ns = self._scheduler.clock_ns() - formed.since_ns
        self._launch_ns += LAUNCH_WEIGHT * (took_ns - self._launch_ns)
        if self._scheduler.is_running(formed):  # it was not abandoned in between
            self._launched = formed
        return True

    def _run(self, units: list[Unit]) -> list[Outputs]:
        return self._scheduler.engine.run([unit.work for unit in units])

    def _answer(self, one: RunningBatch, units: list[Unit], outputs: Callable[[], list[Outputs]]) -> None:
        """Settles a batch, or a part of a failed one, by its outputs. Where `outputs` raises, the units are
        split into halves that are run again, down to the single input at fault."""
        scheduler = self._scheduler
        try:
            answered = list(zip(units, outputs(), strict=True))
        except Exception as error:
            scheduler.note_failure(units, error)
            if len(units) == 1:
                blamed = TooLargeError(units[0].work) if isinstance(error, MemoryError) else error
                scheduler.fail(units[0].ticket, blamed)
                return
            middle = len(units) // 2
            for half in (units[:middle], units[middle:]):
                if left := [unit for unit in half if not unit.ticket.closed]:
                    one.since_ns = scheduler.clock_ns()
                    self._answer(one, left, partial(self._run, left))
            return
        scheduler.settle(one, answered)

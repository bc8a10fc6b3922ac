"""The engine of one model as a service: its queue, its threads, and the task that watches them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from layertap_server import errors
from layertap_server.config import Config
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import Work
from layertap_server.runs_on import on_any_thread, on_engine_thread, on_event_loop
from layertap_server.scheduling.admission import (
    Admission,
    ClosedError,
    DeadlineUnreachableError,
    QueueFullError,
    RefusedError,
)
from layertap_server.scheduling.calibration import LARGEST, calibrate, warm_up_work
from layertap_server.scheduling.engine_loop import EngineLoop
from layertap_server.scheduling.fair_queue import FairQueue, Priority, Ticket
from layertap_server.scheduling.running_batch import Cores, Engine, MultiCoreEngine
from layertap_server.scheduling.scheduler import DeadlinePassedError, Scheduler, TooLargeError
from layertap_server.scheduling.watchdog import Watchdog
from layertap_server.serving import EngineState

logger = logging.getLogger(__name__)

# Used where neither a warm-up nor the configuration gives a value.
DEFAULT_BATCH_TOKENS = 2048
# The period with which the running passes are checked.
WATCH_S = 0.5
# When engine threads have died this many times within a minute, they are not started again.
MAX_DEATHS = 3
DEATHS_WINDOW_S = 60.0


# Called on the event loop with a ticket that is answered or has failed.
Done = Callable[[Ticket], None]


class EngineHost:
    """Runs the engine of one model for requests that are tokenized. Once started, everything except the
    engine's threads runs on the event loop."""

    def __init__(self, facts: ModelFacts, engine: Engine, config: Config) -> None:
        self.facts = facts
        self._engine = engine
        self.scheduler = Scheduler(
            engine,
            self._deliver,
            Admission(FairQueue(config.client_weights()), config.max_queue_tokens),
            config.max_batch_tokens or DEFAULT_BATCH_TOKENS,
            max_batch_ns=config.max_batch_time_s * 1e9,
            num_layers=facts.num_layers,
        )
        self.state = EngineState.UP
        self.num_restarts = 0
        self._config = config
        # This includes threads of an abandoned engine that have not ended.
        self._threads: list[threading.Thread] = []
        # What is called for each ticket that is not settled.
        self._waiting: dict[Ticket, Done] = {}
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._is_waking = False
        self._stopping = False
        self._rows_before = 0  # rows that the warm-up computed

    @on_any_thread
    def warm_up(self) -> None:
        """Runs batches so that memory is allocated, kernels are chosen, and the time of a batch is known.
        Sets the size of batches and the number of cores that take batches of their own."""
        scheduler, chosen, cost = self.scheduler, self._config.max_batch_tokens, self.scheduler.admission.cost
        measured = calibrate(scheduler.engine, self.facts, cost, chosen or LARGEST)
        scheduler.max_batch_tokens = chosen or min(measured.batch_tokens, self._config.max_queue_tokens)
        scheduler.num_cores = measured.num_cores
        self._rows_before = getattr(scheduler.engine, "num_rows", 0)
        logger.info(
            "%s: batches of up to %d tokens%s%s; a full batch takes %.1f ms, a text of 32 tokens %.1f ms",
            self.facts.name,
            scheduler.max_batch_tokens,
            "" if chosen else ", as measured",
            f", on each of {measured.num_cores} cores" if measured.num_cores > 1 else "",
            cost.predict(scheduler.max_batch_tokens) * measured.num_cores / 1e6,
            cost.predict(32) / 1e6,
        )

    @property
    def num_rows(self) -> int:
        """Rows that the engine has computed for requests; the number of tokens if the engine does not count
        rows."""
        num_rows: int = getattr(self.scheduler.engine, "num_rows", self.scheduler.stats.num_tokens)
        return num_rows - self._rows_before

    @on_event_loop
    def start(self, on_change: Callable[[], None]) -> None:
        """Starts the engine's threads; `on_change` is called on the loop when `state` has changed."""
        self._loop = asyncio.get_running_loop()
        self._on_change = on_change
        self._start_threads(after_death=False)
        self._watchdog = self._loop.create_task(self._watch())

    # ------------------------------------------------------------------------- requests

    @on_event_loop
    def submit(
        self,
        works: Sequence[Work],
        priority: Priority,
        deadline_ns: int | None,
        client: str,
        done: Done,
        num_requests: int = 1,
    ) -> Ticket:
        """Queues a request, or several as one, or raises a `RefusedError`. `done` is called once, unless
        `cancel` is called before it."""
        ticket = self.scheduler.submit(works, priority, deadline_ns, client, num_requests)
        self._waiting[ticket] = done
        if not self._is_waking:
            self._is_waking = True
            self._loop.call_soon(self._wake)
        return ticket

    @on_event_loop
    def cancel(self, ticket: Ticket) -> None:
        """Drops the request's queued inputs, and does not call its `done`."""
        if self._waiting.pop(ticket, None) is not None:
            self.scheduler.cancel(ticket)

    @on_event_loop
    async def answer(
        self, works: Sequence[Work], priority: Priority, deadline_ns: int | None, client: str
    ) -> Ticket:
        """Submits a request; returns its ticket once it is answered, or raises a `RequestError`. If the task
        is cancelled, the request's queued inputs are dropped."""
        answered: asyncio.Future[None] = self._loop.create_future()

        def done(_: Ticket) -> None:
            if not answered.done():
                answered.set_result(None)

        try:
            ticket = self.submit(works, priority, deadline_ns, client, done)
        except RefusedError as refused:
            raise as_request_error(refused) from None
        try:
            await answered
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        if ticket.error is not None:
            raise as_request_error(ticket.error)
        return ticket

    @on_event_loop
    def _wake(self) -> None:
        """Wakes the engine threads, once for all requests of one iteration of the event loop."""
        self._is_waking = False
        self.scheduler.wake()

    @on_any_thread
    def _deliver(self, tickets: list[Ticket]) -> None:
        """Schedules one callback on the event loop for the whole batch."""
        self._loop.call_soon_threadsafe(self._resolve, tickets)

    @on_event_loop
    def _resolve(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            done = self._waiting.pop(ticket, None)
            if done is not None:
                done(ticket)

    @on_event_loop
    def _start_threads(self, *, after_death: bool) -> None:
        """Starts one thread for all cores together, and one for each core that takes batches of its own."""
        num_cores, life = self.scheduler.num_cores, self.scheduler.num_abandoned
        started = [
            threading.Thread(
                target=self._serve,
                args=(cores, life, after_death),
                name=f"engine {self.facts.name}, {cores.value}",
                daemon=True,
            )
            for cores in (Cores.ALL, *[Cores.ONE] * (num_cores if num_cores > 1 else 0))
        ]
        self._threads = [thread for thread in self._threads if thread.is_alive()] + started
        for thread in started:
            thread.start()

    @on_engine_thread
    def _serve(self, cores: Cores, life: int, after_death: bool) -> None:
        try:
            if cores is Cores.ONE:
                cast("MultiCoreEngine", self._engine).use_one_core()
            elif after_death:
                self.scheduler.engine.run([warm_up_work(self.facts, 1)])
                if self.scheduler.reopen(life):
                    self._loop.call_soon_threadsafe(self._change, EngineState.UP)
            EngineLoop(self.scheduler, cores, life).run()
        except BaseException:
            logger.critical("%s: the engine's thread died", self.facts.name, exc_info=True)
            self._loop.call_soon_threadsafe(self._died)

    @on_event_loop
    def _died(self) -> None:
        """Called after an engine thread died. Starts all threads again; requests are admitted
        once a trial pass has succeeded. The engine is lost if threads die too often, or if the trial pass
        failed."""
        now = self._loop.time()
        self._deaths.append(now)
        dies_too_often = len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_WINDOW_S
        failed_its_trial = self.state is EngineState.RESTARTING
        if dies_too_often or failed_its_trial or self._stopping:
            self._change(EngineState.LOST)
            return
        self.num_restarts += 1
        self._change(EngineState.RESTARTING)
        self._start_threads(after_death=True)

    @on_event_loop
    async def _watch(self) -> None:
        """Checks periodically for a pass that hangs. Its thread cannot be stopped, so all requests are failed
        and the engine is lost, upon which the process exits."""
        timeout_ns = self._config.engine_timeout_s * 1e9
        watchdog = Watchdog(self.facts.name, timeout_ns)
        while timeout_ns and self.state is not EngineState.LOST:
            await asyncio.sleep(WATCH_S)
            if said := watchdog.look(self.scheduler.under_way()):
                logger.critical("%s: the engine hangs in a forward pass: %s", self.facts.name, said)
                self.scheduler.abandon("the engine hangs")
                self._change(EngineState.LOST)

    @on_event_loop
    def _change(self, state: EngineState) -> None:
        if self.state is not EngineState.LOST:
            self.state = state
            self._on_change()

    @on_event_loop
    def give_up(self, reason: str) -> None:
        """Fails all queued and running requests with UNAVAILABLE and this reason. No further request is
        answered."""
        self.scheduler.abandon(reason)

    @on_event_loop
    async def stop(self, timeout_s: float) -> bool:
        """Ends the engine's threads once the queue is empty, and waits for them for at most `timeout_s`; it
        does not wait for the threads of a lost engine.

        Returns whether all threads have ended.
        """
        self._stopping = True
        self._watchdog.cancel()
        self.scheduler.close()
        deadline = self._loop.time() + (timeout_s if self.state is not EngineState.LOST else 0.0)
        for thread in self._threads:
            await asyncio.to_thread(thread.join, max(deadline - self._loop.time(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)


def as_request_error(error: BaseException) -> errors.RequestError:
    """The error that the caller gets for an error of the scheduler or the engine."""
    match error:
        case QueueFullError():
            return errors.overloaded("QUEUE_FULL", str(error), error.retry_after_s)
        case DeadlineUnreachableError():
            return errors.overloaded("DEADLINE_UNREACHABLE", str(error), error.retry_after_s)
        case ClosedError():
            return errors.unavailable("ENGINE_DOWN", str(error), error.retry_after_s)
        case DeadlinePassedError():
            return errors.deadline_exceeded()
        case TooLargeError():
            return errors.out_of_memory(error.work.num_tokens, error.work.result_bytes)
        case _:
            return errors.as_request_error(error)

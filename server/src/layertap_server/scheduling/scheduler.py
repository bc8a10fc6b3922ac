"""From requests to batches and back. No torch, no grpc: plain data in, plain data out.

The engine's thread asks for a batch the moment it is free; the batch is formed then, from all that
waits, and never earlier. No timer holds work back from an idle device, and nothing polls.

    submit (event loop) ──▶ queue ──▶ step (engine thread): form ─▶ run ─▶ deliver

An engine of several cores has a thread for all of them together, and one for each alone. Together they
take what waits when all of it fits into a batch and none has anything else to do: they answer soonest
so. What is more they take apart, each a batch whenever it is free: threads that share a pass meet some
forty times in it, and wait each time for the one whose core has something else to do.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from layertap_server.plan import Outputs, Work
from layertap_server.scheduling.admission import Admission, ClosedError
from layertap_server.scheduling.batch_builder import Batch, depth_of
from layertap_server.scheduling.fair_queue import NO_PENDING_LOAD, PendingLoad, Priority, Ticket, Unit
from layertap_server.scheduling.memory_limit import MemoryLimit
from layertap_server.scheduling.running_batch import Cores, Engine, Launch, RunningBatch, launched
from layertap_server.scheduling.stats import Stats

logger = logging.getLogger(__name__)

# Of a launched pass, the part that is left, by prediction, when the next batch is chosen.
LEAD_SHARE = 0.25
# Weight of one launch in what launching is known to take.
LAUNCH_WEIGHT = 0.1


class DeadlinePassedError(Exception):
    """The deadline passed while it waited; it was dropped before it was computed."""


class TooLargeError(Exception):
    """An input did not fit into memory, even alone."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.work = work


@dataclass(slots=True)
class Scheduler:
    """The queue of one engine. `submit` and `cancel` from any thread; `run_forever` or `step` from one for all
    of its cores, and from one more for each core that takes batches of its own.

    `_lock` guards the queue and every private field but `_launched` and `_launch_ns`, which belong to the thread
    for all cores. What changes for whom the waiting work is goes through `_changing`, which wakes that thread:
    any other way, a thread would sleep beside work that only it may take.
    """

    engine: Engine
    # Called from the engine's thread with the tickets that are done, once a batch.
    deliver: Callable[[list[Ticket]], None]
    admission: Admission
    max_batch_tokens: int
    # Predicted; 0 for no bound.
    max_batch_ns: float = 0.0
    # Of the model: what a request's depth is measured by.
    num_layers: int = 1
    # That take batches of their own; with one, all do together.
    num_cores: int = 1
    # That they share when none has anything else to do, at most; never more than fits into a batch.
    max_shared_tokens: float = math.inf
    clock_ns: Callable[[], int] = time.monotonic_ns
    sleep_ns: Callable[[float], None] = lambda ns: time.sleep(ns / 1e9)
    memory_limit: MemoryLimit = field(default_factory=MemoryLimit)
    stats: Stats = field(default_factory=Stats)
    # What the engine has: one batch, one for each core, or for a moment the next one too. And the
    # tickets that are settled and not yet delivered.
    _running: list[RunningBatch] = field(default_factory=list)
    _settled: list[Ticket] = field(default_factory=list)
    # The one whose answers are awaited when the next has been chosen.
    _launched: RunningBatch | None = None
    # What launching a batch takes the host.
    _launch_ns: float = 0.0
    _closed: bool = False
    # Abandoned, and not yet reopened; and how often that was.
    _down: bool = False
    _num_abandoned: int = 0
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    # Entered without a call into Python, which the conditions over it take.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    # What threads that have nothing to do wait for, by what they compute with.
    _changed: dict[Cores, threading.Condition] = field(init=False)

    def __post_init__(self) -> None:
        self._changed = {cores: threading.Condition(self._lock) for cores in Cores}

    @property
    def queued_tokens(self) -> int:
        """Tokens of the inputs that are in no batch yet."""
        return self.admission.queue.num_tokens

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, and nothing runs."""
        with self._lock:
            return self._is_idle()

    def _is_idle(self) -> bool:
        return not (self.queued_tokens or self._running)

    @property
    def num_abandoned(self) -> int:
        """How often it was abandoned: the threads of one life of the engine know it by this number."""
        with self._lock:
            return self._num_abandoned

    @property
    def batch_tokens(self) -> int:
        """That a batch may hold: as configured or measured, and less where memory was short."""
        return int(max(min(self.max_batch_tokens, self.memory_limit.max_tokens), 1))

    def waiting(self) -> tuple[int, float]:
        """The number of requests that wait, and the seconds since the oldest came."""
        with self._lock:
            arrivals = [ticket.submitted_ns for ticket in self.admission.queue]
            return len(arrivals), (self.clock_ns() - min(arrivals)) / 1e9 if arrivals else 0.0

    # --------------------------------------------------------------------------- requests

    def submit(
        self, works: Sequence[Work], priority: Priority, deadline_ns: int | None, client: str = ""
    ) -> Ticket:
        """Admits a request of at least one input, or raises a `RefusedError`; `wake` must follow."""
        num_tokens = num_bytes = 0
        output_ns, cost = 0.0, self.admission.cost
        for work in works:
            num_tokens += work.num_tokens
            num_bytes += work.result_bytes
            output_ns += cost.output_ns(work.cost)
        depth = depth_of(works[0].plan, self.num_layers)
        with self._lock:
            now = self.clock_ns()
            size = cost.size(num_tokens, depth=depth, num_bytes=num_bytes, output_ns=output_ns)
            ticket = Ticket(
                works=works,
                priority=priority,
                deadline_ns=deadline_ns,
                client=client,
                number=next(self._numbers),
                submitted_ns=now,
                predicted_latency_ns=self._admit(now, num_tokens, size, priority, deadline_ns, client),
                depth=depth,
                token_cost=size / num_tokens,
                queued_tokens=num_tokens,
                outputs=[None] * len(works),
                num_unanswered=len(works),
            )
            self.admission.push(ticket)
            self.stats.num_admitted += 1
        return ticket

    def wake(self) -> None:
        """Tells the engine's threads of what was submitted: once for many, since to wake one costs more than
        to submit does."""
        with self._changing():
            pass

    def check(
        self,
        num_inputs: int,
        priority: Priority,
        deadline_ns: int | None,
        client: str = "",
        pending: PendingLoad = NO_PENDING_LOAD,
    ) -> float:
        """The nanoseconds to reckon with until the answer to a request that is not tokenized yet, of the usual
        size, once as many such as are `coming` are submitted; or the `RefusedError` that is certain already."""
        with self._lock:
            if self._is_idle() and not (self._closed or self._down):
                return 0.0  # nothing is sure of an idle engine
            return self._admit(self.clock_ns(), num_inputs, 0.0, priority, deadline_ns, client, pending)

    def _admit(
        self,
        now: int,
        num_tokens: int,
        size: float,
        priority: Priority,
        deadline_ns: int | None,
        client: str,
        pending: PendingLoad = NO_PENDING_LOAD,
    ) -> float:
        """The nanoseconds to reckon with until its answer; raises a `RefusedError`."""
        if self._closed or self._down:
            raise ClosedError("the engine is stopping, or starts anew", 1.0)
        return self.admission.admit(
            num_tokens,
            size,
            priority,
            client,
            now_ns=now,
            left_ns=None if deadline_ns is None else deadline_ns - now,
            running_ns=sum([one.remaining_ns(now) for one in self._running]),
            batch_tokens=self.batch_tokens,
            pending=pending,
        )

    def cancel(self, ticket: Ticket) -> None:
        """The caller went away: what is queued of it is dropped now, what is running is not delivered."""
        with self._changing():
            if ticket.closed:
                self.stats.dropped["cancelled", "sending"] += 1
                return
            self.stats.dropped["cancelled", "queued" if ticket.queued_tokens else "running"] += 1
            ticket.closed = True
            self.admission.queue.remove(ticket)
            if ticket.is_late(self.clock_ns()):
                self._learn_margin(ticket)

    # --------------------------------------------------------------------------- its life

    def close(self) -> None:
        """Admits no more; the engine's threads end when the queue is empty."""
        with self._changing():
            self._closed = True

    def abandon(self, reason: str) -> None:
        """Fails all that waits and all that runs, and admits no more; the engine's threads end. From any thread."""
        with self._changing():
            self._down = True
            self._num_abandoned += 1
            running = [unit.ticket for one in self._running for unit in one.units]
            for ticket in [*running, *self.admission.queue]:
                self._fail(ticket, ClosedError(reason, 1.0))
            self._running = []
        self._deliver_settled()

    def reopen(self, life: int) -> bool:
        """Admits again, after `abandon`; not if it was abandoned more often than `life` says."""
        with self._lock:
            if self._num_abandoned == life:
                self._down = False
            return not self._down

    def under_way(self) -> list[RunningBatch]:
        """The passes that have begun: one that was launched behind another has not."""
        with self._lock:
            return self._running[:1] if self.num_cores == 1 else list(self._running)

    # --------------------------------------------------------------- on the engine's threads

    def run_forever(self, cores: Cores = Cores.ALL, life: int = 0) -> None:
        """Serves until closed and empty, or abandoned more often than `life` says. Should it ever fail itself,
        every waiter is told."""
        if cores is Cores.ALL:
            self._launched = None  # of a thread before this one
        try:
            while self._wait(cores, life):
                self.step(cores)
        except BaseException:
            if life == self.num_abandoned:
                self.abandon("the engine failed")
                raise
            logger.warning("a thread of an engine that was given up failed too", exc_info=True)

    def _wait(self, cores: Cores, life: int) -> bool:
        """Blocks until there is something to do; False when closed and empty, or abandoned."""

        def has_something() -> bool:
            return self._may_take(cores) or (cores is Cores.ALL and self._launched is not None)

        def has_ended() -> bool:
            return self._num_abandoned != life or (self._closed and not self.admission.queue)

        with self._lock:
            self._changed[cores].wait_for(lambda: has_something() or has_ended())
            return self._num_abandoned == life and has_something()

    def _may_take(self, cores: Cores) -> bool:
        """Whether what waits is for these; the lock is held."""
        queue = self.admission.queue
        if self.num_cores == 1:
            return cores is Cores.ALL and bool(queue)
        if not queue or len(self._running) >= self.num_cores or any(one.share == 1 for one in self._running):
            return False
        is_shared = not self._running and (
            queue.num_tokens <= min(self.batch_tokens, self.max_shared_tokens) or queue.num_inputs == 1
        )
        return is_shared is (cores is Cores.ALL)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock for a change of the queue, of what runs, or of the engine's life; then wakes a thread
        that may take what waits now, or all of them at the end of their life.

        A thread looks again, with the lock, before it sleeps. So whenever the lock is free and `wake` has followed
        `submit`: if the waiting work is for some cores, a thread for those is awake.
        """
        with self._lock:
            try:
                yield
            finally:
                if self._down or (self._closed and not self.admission.queue):
                    for changed in self._changed.values():
                        changed.notify_all()
                for cores, changed in self._changed.items():
                    if self._may_take(cores):
                        changed.notify()

    def step(self, cores: Cores = Cores.ALL) -> bool:
        """Forms one batch from all that waits now, runs it, delivers; False when there was nothing to do.

        Where the device runs by itself, the batch is launched, and its answers are for the next step:
        that one begins just before the device is done with it, with the choice of what follows.
        """
        under_way, self._launched = self._launched, None
        if under_way is not None:
            self._wait_for_room(under_way)
        formed = self.form(cores)
        run_here = formed if formed is not None and not self._launch(formed) else None
        has_work = bool(formed or under_way or self._settled)
        for one in (under_way, run_here):
            if one is not None:
                self.finish(one)
            self._deliver_settled()
        return has_work

    def _wait_for_room(self, under_way: RunningBatch) -> None:
        """Until the device is about to have nothing to do: so long before the predicted end of its pass as
        launching takes, and a part of the pass. Woken after its end, one would not know how long it took, and
        predict ever more."""
        lead_ns = self._launch_ns + LEAD_SHARE * under_way.predicted_ns
        self.sleep_ns(max(under_way.ends_ns - lead_ns - self.clock_ns(), 0.0))

    def form(self, cores: Cores = Cores.ALL) -> RunningBatch | None:
        """The next batch for these, if what waits is for them; fails the tickets that came too late."""
        with self._changing():
            now, queue = self.clock_ns(), self.admission.queue
            for ticket in queue.late(now):
                self.stats.dropped["late", "queued"] += 1
                self._learn_margin(ticket)
                self._fail(ticket, DeadlinePassedError())
            return self._take(now, cores) if self._may_take(cores) else None

    def _take(self, now: int, cores: Cores) -> RunningBatch:
        """A batch of at most `batch_tokens`, or one input; for one of several cores that have nothing to do, of
        no more than its part of what waits. The lock is held, and there is something."""
        queue, cost = self.admission.queue, self.admission.cost
        max_tokens, share = self.batch_tokens, 1.0
        if cores is Cores.ONE:
            num_idle = self.num_cores - len(self._running)
            max_tokens, share = min(max_tokens, math.ceil(queue.num_tokens / num_idle)), 1 / self.num_cores
        batch = Batch(max_tokens, self.max_batch_ns * share, self.memory_limit, cost, queue.tokens_by_depth)
        # Counted as running before anything is taken: should that fail, `abandon` finds all of it.
        formed = RunningBatch([], share, 0.0, now, threading.get_native_id())
        self._running.append(formed)
        queue.take(now, batch.takes, max_ahead=self.batch_tokens, into=formed.units)
        for unit in formed.units:
            if not unit.ticket.started_ns:
                unit.ticket.started_ns = now
                self.stats.num_started += 1
                self.stats.queue_ns += now - unit.ticket.submitted_ns
        formed.predicted_ns = batch.predicted_ns / share
        return formed

    def _launch(self, formed: RunningBatch) -> bool:
        """Gives the device a batch; False where it does not run by itself."""
        launch: Launch | None = getattr(self.engine, "launch", None)
        if launch is None:
            return False
        formed.outputs = launched(launch, [unit.work for unit in formed.units])
        took_ns = self.clock_ns() - formed.since_ns
        self._launch_ns += LAUNCH_WEIGHT * (took_ns - self._launch_ns)
        with self._lock:
            if formed in self._running:  # not abandoned meanwhile
                self._launched = formed
        return True

    def finish(self, one: RunningBatch) -> None:
        """Waits for a pass, and settles what it answers."""
        self._answer(one, one.units, one.outputs or partial(self._run, one.units))
        with self._changing():
            if one in self._running:  # not abandoned meanwhile
                self._running.remove(one)
            if self._launched is not None:
                self._launched.since_ns = self.clock_ns()

    def _run(self, units: list[Unit]) -> list[Outputs]:
        return self.engine.run([unit.work for unit in units])

    def _answer(self, one: RunningBatch, units: list[Unit], outputs: Callable[[], list[Outputs]]) -> None:
        """Of a pass, or of a part of one that failed: a part that fails is split and tried again, down
        to the input that is at fault."""
        try:
            answered = list(zip(units, outputs(), strict=True))
        except Exception as error:
            self._note_failure(units, error)
            if len(units) == 1:
                blamed = TooLargeError(units[0].work) if isinstance(error, MemoryError) else error
                with self._changing():
                    self._fail(units[0].ticket, blamed)
                return
            middle = len(units) // 2
            for half in (units[:middle], units[middle:]):
                if left := [unit for unit in half if not unit.ticket.closed]:
                    one.since_ns = self.clock_ns()
                    self._answer(one, left, partial(self._run, left))
            return
        with self._lock:
            self._settle(answered, self.clock_ns() - one.since_ns, one.share)

    def _note_failure(self, units: list[Unit], error: Exception) -> None:
        self.stats.num_failed_batches += 1
        if isinstance(error, MemoryError):
            num_tokens = sum(unit.work.num_tokens for unit in units)
            num_bytes = sum(unit.work.result_bytes for unit in units)
            self.memory_limit.failed(num_tokens, num_bytes)
            logger.warning(
                "%d inputs of %d tokens and %d result bytes did not fit into memory; batches now have %s",
                *(len(units), num_tokens, num_bytes, self.memory_limit),
            )
        elif len(units) > 1:
            logger.warning("a batch of %d inputs failed (%r); running its halves", len(units), error)

    def _settle(self, answered: list[tuple[Unit, Outputs]], elapsed_ns: int, share: float) -> None:
        """Counts and learns from a batch, and hands its outputs to their tickets; the lock is held."""
        engine_ns = int(elapsed_ns * share)
        num_tokens = num_bytes = 0
        depth = output_ns = 0.0
        cost = self.admission.cost
        for unit, _ in answered:
            num_tokens += unit.work.num_tokens
            num_bytes += unit.work.result_bytes
            output_ns += cost.output_ns(unit.work.cost)
            depth = max(depth, unit.ticket.depth)
        cost.observe(num_tokens, engine_ns, depth=depth, num_bytes=num_bytes, output_ns=output_ns)
        self.memory_limit.fitted(num_tokens, num_bytes)
        self.stats.count_batch(len(answered), num_tokens, self.batch_tokens, engine_ns, num_bytes)
        seen: set[int] = set()
        for unit, outputs in answered:
            ticket = unit.ticket
            if ticket.closed:
                continue
            if id(ticket) not in seen:
                seen.add(id(ticket))
                ticket.compute_ns += elapsed_ns
                ticket.batch_inputs, ticket.batch_tokens = len(answered), num_tokens
            ticket.outputs[unit.index] = outputs
            ticket.num_unanswered -= 1
            if ticket.num_unanswered == 0:
                ticket.closed = True
                self.stats.num_answered += 1
                self._learn_margin(ticket)
                self._settled.append(ticket)

    def _learn_margin(self, ticket: Ticket) -> None:
        """Of a ticket with a deadline: whether it took longer than was reckoned with at admission."""
        if ticket.deadline_ns is not None:
            self.admission.margin.observe(self.clock_ns() - ticket.submitted_ns > ticket.predicted_latency_ns)

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        """Settles a ticket without an answer; the lock is held."""
        if not ticket.closed:
            ticket.error = error
            ticket.closed = True
            self.admission.queue.remove(ticket)
            self.stats.num_failed += 1
            self._settled.append(ticket)

    def _deliver_settled(self) -> None:
        with self._lock:
            settled, self._settled = self._settled, []
        if settled:
            self.deliver(settled)

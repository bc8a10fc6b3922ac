"""The queue of one engine, and the batches formed from it. Plain data only: no torch, no grpc.

An engine thread asks for a batch when it is free. The batch is formed at that moment, from the whole queue,
and never earlier. No timer holds work back from an idle device, and nothing polls.

    submit (event loop) ──▶ queue ──▶ EngineLoop.step (engine thread): form ─▶ run ─▶ deliver

An engine whose cores can take batches separately has one thread that computes with all cores, and one thread
for each core. While no batch runs and the whole queue fits into one batch, all cores compute that batch
together, which gives the lowest latency. A longer queue is split: each core takes a batch of its own whenever
it is free. Threads that share a pass synchronize about forty times in it, and each time they wait for the
thread whose core is busy with other work.
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

from layertap_server.plan import Outputs, Work
from layertap_server.runs_on import on_any_thread, on_engine_thread
from layertap_server.scheduling.admission import Admission, ClosedError
from layertap_server.scheduling.batch_builder import Batch, depth_of
from layertap_server.scheduling.fair_queue import Priority, Ticket, Unit
from layertap_server.scheduling.memory_limit import MemoryLimit
from layertap_server.scheduling.running_batch import Cores, Engine, RunningBatch
from layertap_server.scheduling.stats import Stats

logger = logging.getLogger(__name__)


class DeadlinePassedError(Exception):
    """The deadline passed while inputs of the request were still queued; these were dropped."""


class TooLargeError(Exception):
    """An input did not fit into memory, even alone."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.work = work


@dataclass(slots=True)
class Scheduler:
    """The queue of one engine, and its running batches.

    Any thread may call `submit` and `cancel`. Batches are taken by one thread for all cores together, and by
    one more thread for each core that takes batches of its own; each of them runs an `EngineLoop`.

    `_lock` guards the queue and every private field. Every change that may decide which threads can take the
    queued work goes through `_changing`, which wakes such a thread; otherwise a thread could sleep although
    only it may take the queued work. `submit` is the exception: `wake` must follow it.
    """

    engine: Engine
    # Called without the lock, with the settled tickets of a batch: by an engine thread, or by who calls
    # `abandon`.
    deliver: Callable[[list[Ticket]], None]
    admission: Admission
    max_batch_tokens: int
    # Upper bound of a batch's predicted time; 0: no bound.
    max_batch_ns: float = 0.0
    # Layers of the model. A request's depth is the share of them that run for it.
    num_layers: int = 1
    # Cores that take batches of their own; 1: all cores compute every batch together.
    num_cores: int = 1
    # Upper bound of the queued tokens that all cores compute as one shared batch while no other batch runs;
    # `batch_tokens` is another.
    max_shared_tokens: float = math.inf
    clock_ns: Callable[[], int] = time.monotonic_ns
    memory_limit: MemoryLimit = field(default_factory=MemoryLimit)
    stats: Stats = field(default_factory=Stats)
    # Batches that were given to the engine, oldest first: one, or one for each core, or (where the device
    # runs asynchronously) briefly also the next one.
    _running: list[RunningBatch] = field(default_factory=list)
    # Tickets that are settled but not yet delivered.
    _settled: list[Ticket] = field(default_factory=list)
    _closed: bool = False
    # Whether the scheduler is abandoned and not yet reopened, and how many times it was abandoned.
    _down: bool = False
    _num_abandoned: int = 0
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    # A plain lock, shared with the conditions below: entering one of those instead would run Python code.
    _lock: threading.Lock = field(default_factory=threading.Lock)
    # The conditions on which idle threads wait, one for each kind of thread.
    _changed: dict[Cores, threading.Condition] = field(init=False)

    def __post_init__(self) -> None:
        self._changed = {cores: threading.Condition(self._lock) for cores in Cores}

    @property
    def queued_tokens(self) -> int:
        """Tokens of the inputs that are not in a batch yet."""
        return self.admission.queue.num_tokens

    @property
    def is_idle(self) -> bool:
        """Whether the queue is empty and no batch runs."""
        with self._lock:
            return self._is_idle()

    @on_any_thread
    def _is_idle(self) -> bool:
        return not (self.queued_tokens or self._running)

    @property
    def num_abandoned(self) -> int:
        """How many times `abandon` was called. An engine thread keeps this number from its start as its
        `life`, and ends when the number has changed."""
        with self._lock:
            return self._num_abandoned

    @property
    def batch_tokens(self) -> int:
        """The most tokens that a batch may hold: as configured or measured, or fewer where memory ran out."""
        return int(max(min(self.max_batch_tokens, self.memory_limit.max_tokens), 1))

    @on_any_thread
    def waiting(self) -> tuple[int, float]:
        """The number of requests in the queue, and the seconds since the oldest of them was submitted (0 if
        none)."""
        with self._lock:
            tickets = list(self.admission.queue)
            oldest_ns = min([ticket.submitted_ns for ticket in tickets], default=None)
            age_s = 0.0 if oldest_ns is None else (self.clock_ns() - oldest_ns) / 1e9
            return sum([ticket.num_requests for ticket in tickets]), age_s

    # --------------------------------------------------------------------------- requests

    @on_any_thread
    def submit(
        self,
        works: Sequence[Work],
        priority: Priority,
        deadline_ns: int | None,
        client: str = "",
        num_requests: int = 1,
    ) -> Ticket:
        """Queues a request of at least one input, or several that are served as one, or raises a
        `RefusedError`. The caller must call `wake` after it."""
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
                num_requests=num_requests,
            )
            self.admission.push(ticket)
            self.stats.num_admitted += num_requests
        return ticket

    @on_any_thread
    def wake(self) -> None:
        """Wakes the engine threads that may take what was submitted. It is apart from `submit` so that one
        call can follow many submissions: waking a thread costs more than a submission."""
        with self._changing():
            pass

    @on_any_thread
    def check(self, num_inputs: int, priority: Priority, deadline_ns: int | None, client: str = "") -> None:
        """Raises the `RefusedError` that is certain already for a request that is not tokenized yet, and whose
        own size is unknown."""
        with self._lock:
            if self._is_idle() and not (self._closed or self._down):
                return  # an idle engine refuses no request because of its deadline or its size
            self._admit(self.clock_ns(), num_inputs, 0.0, priority, deadline_ns, client)

    @on_any_thread
    def _admit(
        self,
        now: int,
        num_tokens: int,
        size: float,
        priority: Priority,
        deadline_ns: int | None,
        client: str,
    ) -> float:
        """The predicted nanoseconds until the answer, as `Admission.admit` returns them, or a `RefusedError`.
        The lock is held."""
        if self._closed or self._down:
            raise ClosedError("the engine is stopping or restarting; try again", 1.0)
        return self.admission.admit(
            num_tokens,
            size,
            priority,
            client,
            now_ns=now,
            left_ns=None if deadline_ns is None else deadline_ns - now,
            running_ns=sum([one.remaining_ns(now) for one in self._running]),
            batch_tokens=self.batch_tokens,
        )

    @on_any_thread
    def cancel(self, ticket: Ticket) -> None:
        """Drops the ticket's queued inputs now, since its caller went away; running inputs are not
        delivered."""
        with self._changing():
            self._count_cancelled(ticket, ticket.num_requests)
            if ticket.closed:
                return
            ticket.closed = True
            self.admission.queue.remove(ticket)
            if ticket.is_late(self.clock_ns()):
                self._learn_margin(ticket)

    @on_any_thread
    def leave(self, ticket: Ticket) -> None:
        """One of several requests of the ticket was cancelled. Its inputs are still computed."""
        with self._lock:
            self._count_cancelled(ticket, 1)
            ticket.num_requests -= 1

    @on_any_thread
    def _count_cancelled(self, ticket: Ticket, num_requests: int) -> None:
        stage = "sending" if ticket.closed else "queued" if ticket.queued_tokens else "running"
        self.stats.dropped["cancelled", stage] += num_requests

    # --------------------------------------------------------------------------- life cycle

    @on_any_thread
    def close(self) -> None:
        """Admits no more requests; the engine threads end when the queue is empty."""
        with self._changing():
            self._closed = True

    @on_any_thread
    def abandon(self, reason: str) -> None:
        """Fails all queued and all running requests, and admits no more; the engine threads end. Any thread
        may call this."""
        with self._changing():
            self._down = True
            self._num_abandoned += 1
            running = [unit.ticket for one in self._running for unit in one.units]
            for ticket in [*running, *self.admission.queue]:
                self._fail(ticket, ClosedError(reason, 1.0))
            self._running = []
        self.deliver_settled()

    @on_any_thread
    def reopen(self, life: int) -> bool:
        """Admits requests again after `abandon`, unless `abandon` was called more than `life` times. Returns
        whether requests are admitted."""
        with self._lock:
            if self._num_abandoned == life:
                self._down = False
            return not self._down

    @on_any_thread
    def under_way(self) -> list[RunningBatch]:
        """The batches whose pass has begun. A batch that was launched while another runs has not begun."""
        with self._lock:
            return self._running[:1] if self.num_cores == 1 else list(self._running)

    @on_engine_thread
    def wait_for_work(self, cores: Cores, life: int, *, has_other: bool = False) -> bool:
        """Blocks until a thread for these cores may take the queued work, but not if it `has_other` work.
        Returns False when closed with an empty queue (and no other work), or abandoned."""

        def has_work() -> bool:
            return has_other or self._may_take(cores)

        def has_ended() -> bool:
            return self._num_abandoned != life or (self._closed and not self.admission.queue)

        with self._lock:
            self._changed[cores].wait_for(lambda: has_work() or has_ended())
            return self._num_abandoned == life and has_work()

    @on_any_thread
    def _may_take(self, cores: Cores) -> bool:
        """Whether a thread for these cores may take the queued work. The lock is held.

        With several cores, the thread for all cores may take it while no batch runs and the queue fits into
        one batch (or has one input); otherwise a thread for one core may, while a core is free.
        """
        queue = self.admission.queue
        if self.num_cores == 1:
            return cores is Cores.ALL and bool(queue)
        if not queue or len(self._running) >= self.num_cores or any(one.share == 1 for one in self._running):
            return False
        is_shared = not self._running and (
            queue.num_tokens <= min(self.batch_tokens, self.max_shared_tokens) or queue.num_inputs == 1
        )
        return is_shared is (cores is Cores.ALL)

    @on_any_thread
    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock for a change of the queue, of the running batches, or of `_closed` and `_down`. Then
        wakes a thread that may now take the queued work, or every thread when all are to end.

        A thread checks `_may_take` again, with the lock held, before it sleeps. So this holds whenever the
        lock is free and each `submit` was followed by `wake`: if threads of one kind may take the queued
        work, one of them is awake.
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

    # --------------------------------------------------------------------------- batches

    @on_engine_thread
    def form(self, cores: Cores = Cores.ALL) -> RunningBatch | None:
        """Fails the queued tickets whose deadline has passed. Then forms the next batch for a thread for
        these cores; None if it may not take the queued work."""
        with self._changing():
            now, queue = self.clock_ns(), self.admission.queue
            for ticket in queue.late(now):
                self.stats.dropped["late", "queued"] += ticket.num_requests
                self._learn_margin(ticket)
                self._fail(ticket, DeadlinePassedError())
            return self._take(now, cores) if self._may_take(cores) else None

    @on_engine_thread
    def _take(self, now: int, cores: Cores) -> RunningBatch:
        """Takes a batch of at most `batch_tokens` tokens, or one longer input, from the queue. A single core
        takes at most the queued tokens divided by the number of idle cores. The lock is held, and the queue
        is not empty."""
        queue, cost = self.admission.queue, self.admission.cost
        max_tokens, share = self.batch_tokens, 1.0
        if cores is Cores.ONE:
            num_idle = self.num_cores - len(self._running)
            max_tokens, share = min(max_tokens, math.ceil(queue.num_tokens / num_idle)), 1 / self.num_cores
        batch = Batch(max_tokens, self.max_batch_ns * share, self.memory_limit, cost, queue.tokens_by_depth)
        # The batch is in `_running` before the first input leaves the queue, so that `abandon` finds every
        # input even if `queue.take` raises half-way.
        formed = RunningBatch([], share, 0.0, now, threading.get_native_id())
        self._running.append(formed)
        queue.take(now, batch.takes, max_ahead=self.batch_tokens, into=formed.units)
        for unit in formed.units:
            ticket = unit.ticket
            if not ticket.started_ns:
                ticket.started_ns = now
                self.stats.num_started += ticket.num_requests
                self.stats.queue_ns += (now - ticket.submitted_ns) * ticket.num_requests
        formed.predicted_ns = batch.predicted_ns / share
        return formed

    @on_any_thread
    def is_running(self, one: RunningBatch) -> bool:
        """Whether the batch was not abandoned."""
        with self._lock:
            return one in self._running

    @on_engine_thread
    def has_run(self, one: RunningBatch, following: RunningBatch | None) -> None:
        """All inputs of a batch are settled or failed. `following` is the batch that the device computes
        next, if there is one that is launched already."""
        with self._changing():
            if one in self._running:  # it was not abandoned in between
                self._running.remove(one)
            if following is not None:
                following.since_ns = self.clock_ns()

    @on_engine_thread
    def note_failure(self, units: list[Unit], error: Exception) -> None:
        """Counts a failed batch, or a part of one that was run again. Where memory ran out, the next batches
        are smaller."""
        num_tokens = sum(unit.work.num_tokens for unit in units)
        num_bytes = sum(unit.work.result_bytes for unit in units)
        with self._lock:
            self.stats.num_failed_batches += 1
            if isinstance(error, MemoryError):
                self.memory_limit.failed(num_tokens, num_bytes)
        if isinstance(error, MemoryError):
            logger.warning(
                "a batch of %d inputs, %d tokens and %d result bytes did not fit into memory; batches are now limited to %s",
                *(len(units), num_tokens, num_bytes, self.memory_limit),
            )
        elif len(units) > 1:
            logger.warning(
                "a batch of %d inputs failed (%r); running it again in two halves", len(units), error
            )

    @on_engine_thread
    def settle(self, one: RunningBatch, answered: list[tuple[Unit, Outputs]]) -> None:
        """Takes the outputs of a batch, or of a part of a failed one: adds it to the statistics and to the
        cost model, and stores the outputs in their tickets."""
        with self._lock:
            elapsed_ns, cost = self.clock_ns() - one.since_ns, self.admission.cost
            engine_ns = int(elapsed_ns * one.share)
            num_tokens = num_bytes = 0
            depth = output_ns = 0.0
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
                    self.stats.num_answered += ticket.num_requests
                    self._learn_margin(ticket)
                    self._settled.append(ticket)

    @on_any_thread
    def _learn_margin(self, ticket: Ticket) -> None:
        """Tells the admission's margin whether a request with a deadline took longer than predicted at
        admission."""
        if ticket.deadline_ns is not None:
            self.admission.margin.observe(self.clock_ns() - ticket.submitted_ns > ticket.predicted_latency_ns)

    @on_any_thread
    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """Settles a ticket with an error, and drops its queued inputs."""
        with self._changing():
            self._fail(ticket, error)

    @on_any_thread
    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        """The lock is held."""
        if not ticket.closed:
            ticket.error = error
            ticket.closed = True
            self.admission.queue.remove(ticket)
            self.stats.num_failed += ticket.num_requests
            self._settled.append(ticket)

    @on_any_thread
    def deliver_settled(self) -> bool:
        """Delivers the tickets that are settled by now. Returns whether there were any."""
        with self._lock:
            settled, self._settled = self._settled, []
        if settled:
            self.deliver(settled)
        return bool(settled)

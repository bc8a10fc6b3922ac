"""Admission, queue and batch forming. No torch, no grpc: plain data in, plain data out.

The engine's thread asks for a batch the moment it is free; the batch is formed then, from all that
waits, and never earlier. No timer holds work back from an idle device, and nothing polls.

    submit (event loop) ──▶ queue ──▶ step (engine thread): form ─▶ run ─▶ deliver
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from layertap_server.cost import CostModel
from layertap_server.plan import Outputs, Work

logger = logging.getLogger(__name__)

# How much longer a request waits than one of the next higher priority before it goes first: so an
# old request of a low priority is never starved.
PRIORITY_HEAD_START_NS = 1_000_000_000


class Priority(IntEnum):
    """`layertap.v1.Priority`."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


class RefusedError(Exception):
    """Not admitted: nothing of it was queued."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(RefusedError):
    """The queue holds as many tokens as it may."""


class DeadlineUnreachableError(RefusedError):
    """By prediction it would not be done in time."""


class ClosedError(RefusedError):
    """The engine is stopping, or gone."""


class DeadlinePassedError(Exception):
    """The deadline passed while it waited; it was dropped before it was computed."""


class Runs(Protocol):
    """What the scheduler needs of an engine."""

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        """Answers each, in order; raises when the batch fails as a whole."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One admitted request: the inputs it waits for, and where its time went.

    `outputs`, `error` and the times are filled by the engine's thread; they are the caller's to
    read once the ticket is delivered.
    """

    works: Sequence[Work]
    priority: Priority
    deadline_ns: int | None
    submitted_ns: int
    num_tokens: int
    outputs: list[Outputs | None]
    num_unanswered: int
    next_work: int = 0
    started_ns: int = 0
    compute_ns: int = 0
    batch_inputs: int = 0
    batch_tokens: int = 0
    error: BaseException | None = None
    # Delivered, cancelled or failed: nothing more is done for it.
    closed: bool = False

    @property
    def queued_tokens(self) -> int:
        """Tokens of the inputs that are in no batch yet."""
        return sum(work.num_tokens for work in self.works[self.next_work :])


@dataclass(frozen=True, slots=True)
class Unit:
    """One input of a ticket, in a batch."""

    ticket: Ticket
    index: int

    @property
    def work(self) -> Work:
        return self.ticket.works[self.index]


Deliver = Callable[[list[Ticket]], None]


@dataclass(slots=True)
class Scheduler:
    """The queue of one engine. `submit` and `cancel` from any thread; `run_forever` or `step` from one."""

    engine: Runs
    # Called from the engine's thread with the tickets that are done, once a batch.
    deliver: Deliver
    max_batch_tokens: int
    max_queue_tokens: int
    clock_ns: Callable[[], int] = time.monotonic_ns
    cost: CostModel = field(default_factory=CostModel)
    queued_tokens: int = 0
    # The batch under way, and the tickets that it has settled and not yet delivered.
    _running: list[Unit] = field(default_factory=list)
    _settled: list[Ticket] = field(default_factory=list)
    _running_since_ns: int = 0
    _queues: dict[Priority, deque[Ticket]] = field(
        default_factory=lambda: {priority: deque() for priority in sorted(Priority, reverse=True)}
    )
    _closed: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    # ------------------------------------------------------------------------- admission

    def submit(self, works: Sequence[Work], priority: Priority, deadline_ns: int | None) -> Ticket:
        """Admits a request of at least one input, or raises a `RefusedError`."""
        num_tokens = sum(work.num_tokens for work in works)
        with self._changed:
            now = self.clock_ns()
            wait_s = self._predict_ns(self.queued_tokens, now) / 1e9
            if self._closed:
                raise ClosedError("the engine is stopping", 1.0)
            if self.queued_tokens and self.queued_tokens + num_tokens > self.max_queue_tokens:
                raise QueueFullError(
                    f"the queue holds {self.queued_tokens} of at most {self.max_queue_tokens} tokens, and this "
                    f"request has {num_tokens}; try again in {wait_s:.3f} s",
                    wait_s,
                )
            # An idle engine takes what comes: were its estimate wrong, only running would mend it.
            if deadline_ns is not None and (self.queued_tokens or self._running):
                done_ns = self._predict_ns(self.queued_tokens + num_tokens, now)
                if now + done_ns > deadline_ns:
                    raise DeadlineUnreachableError(
                        f"it would take {done_ns / 1e9:.3f} s by prediction, and the deadline is in "
                        f"{max(deadline_ns - now, 0) / 1e9:.3f} s",
                        wait_s,
                    )
            ticket = Ticket(
                works=works,
                priority=priority,
                deadline_ns=deadline_ns,
                submitted_ns=now,
                num_tokens=num_tokens,
                outputs=[None] * len(works),
                num_unanswered=len(works),
            )
            self._queues[priority].append(ticket)
            self.queued_tokens += num_tokens
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """The caller went away: what is queued of it is dropped now, what is running is not delivered."""
        with self._changed:
            self._close_ticket(ticket)

    def close(self) -> None:
        """Admits no more; the engine's thread ends when the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _predict_ns(self, num_tokens: int, now: int) -> float:
        """Until so many queued tokens are answered, the batch under way included."""
        running = 0.0
        if self._running:
            whole = self.cost.predict(sum(unit.work.num_tokens for unit in self._running), num_batches=1)
            running = max(whole - (now - self._running_since_ns), 0.0)
        return running + self.cost.predict(
            num_tokens, num_batches=math.ceil(num_tokens / self.max_batch_tokens)
        )

    def _close_ticket(self, ticket: Ticket) -> None:
        if not ticket.closed:
            ticket.closed = True
            self.queued_tokens -= ticket.queued_tokens
            ticket.next_work = len(ticket.works)

    # ---------------------------------------------------------------- on the engine's thread

    def run_forever(self) -> None:
        """Serves until closed and empty. Should it ever fail itself, every waiter is told."""
        try:
            while self._wait():
                self.step()
        except BaseException as error:
            logger.critical("the engine's thread died", exc_info=error)
            self.abandon(error)
            raise

    def step(self) -> bool:
        """Forms one batch from all that waits now, runs it, delivers; False when nothing waited."""
        with self._changed:
            self._running = self._form()
            self._running_since_ns = self.clock_ns()
        formed = bool(self._running or self._settled)
        self._run(self._running)
        self._running = []
        if self._settled:
            self.deliver(self._settled)
            self._settled = []
        return formed

    def abandon(self, error: BaseException) -> None:
        """Fails all that waits, and admits no more."""
        with self._changed:
            self._closed = True
            tickets = [unit.ticket for unit in self._running]
            for queue in self._queues.values():
                tickets += queue
                queue.clear()
            self._running = []
            for ticket in tickets:
                self._fail(ticket, error)
        self.deliver(self._settled)

    def _wait(self) -> bool:
        """Blocks until something is queued; False when closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(self._queues.values()))
            return any(self._queues.values())

    def _form(self) -> list[Unit]:
        """The next batch, at most `max_batch_tokens` or one input; fails the tickets that came too late."""
        now = self.clock_ns()
        units: list[Unit] = []
        num_tokens = 0
        while (queue := self._first_queue()) is not None:
            ticket = queue[0]
            if ticket.closed:
                queue.popleft()
                continue
            if ticket.deadline_ns is not None and now >= ticket.deadline_ns:
                self._fail(ticket, DeadlinePassedError())
                continue
            work = ticket.works[ticket.next_work]
            if units and num_tokens + work.num_tokens > self.max_batch_tokens:
                break
            units.append(Unit(ticket, ticket.next_work))
            num_tokens += work.num_tokens
            self.queued_tokens -= work.num_tokens
            ticket.next_work += 1
            ticket.started_ns = ticket.started_ns or now
            if ticket.next_work == len(ticket.works):
                queue.popleft()
        return units

    def _first_queue(self) -> deque[Ticket] | None:
        """The queue whose head is due first: by age, each priority with its head start."""
        waiting = [(priority, queue) for priority, queue in self._queues.items() if queue]
        if not waiting:
            return None
        return min(waiting, key=lambda one: one[1][0].submitted_ns - one[0] * PRIORITY_HEAD_START_NS)[1]

    def _run(self, units: list[Unit]) -> None:
        """Runs a batch; one that fails is split and tried again, down to the input that is at fault."""
        units = [unit for unit in units if not unit.ticket.closed]
        if not units:
            return
        num_tokens = sum(unit.work.num_tokens for unit in units)
        begun_ns = self.clock_ns()
        try:
            answered = list(zip(units, self.engine.run([unit.work for unit in units]), strict=True))
        except Exception as error:
            if len(units) > 1:
                logger.warning("a batch of %d inputs failed (%r); running its halves", len(units), error)
                middle = len(units) // 2
                self._run(units[:middle])
                self._run(units[middle:])
            else:
                with self._changed:
                    self._fail(units[0].ticket, error)
            return
        elapsed_ns = self.clock_ns() - begun_ns
        self.cost.observe(num_tokens, elapsed_ns)
        with self._changed:
            seen: set[int] = set()
            for unit, outputs in answered:
                ticket = unit.ticket
                if ticket.closed:
                    continue
                if id(ticket) not in seen:
                    seen.add(id(ticket))
                    ticket.compute_ns += elapsed_ns
                    ticket.batch_inputs, ticket.batch_tokens = len(units), num_tokens
                ticket.outputs[unit.index] = outputs
                ticket.num_unanswered -= 1
                if ticket.num_unanswered == 0:
                    ticket.closed = True
                    self._settled.append(ticket)

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        """Settles a ticket without an answer; the lock is held."""
        if not ticket.closed:
            ticket.error = error
            self._close_ticket(ticket)
            self._settled.append(ticket)

"""Admission and batch forming. No torch, no grpc: plain data in, plain data out.

The engine's thread asks for a batch the moment it is free; the batch is formed then, from all that
waits, and never earlier. No timer holds work back from an idle device, and nothing polls.

    submit (event loop) ──▶ queue ──▶ step (engine thread): form ─▶ run ─▶ deliver
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from layertap_server.cost import CostModel, Margin
from layertap_server.fair_queue import FairQueue, Priority, Ticket, Unit
from layertap_server.forming import Batch, depth_of
from layertap_server.plan import Outputs, Work
from layertap_server.stats import Stats

logger = logging.getLogger(__name__)

# A queue that others have filled takes this part more from clients that hold less than their share.
RESERVE = 0.25
# A pass hangs when it takes this many times what was predicted, at least.
HANG_FACTOR = 10


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


Deliver = Callable[[list[Ticket]], None]


@dataclass(slots=True)
class Scheduler:
    """The queue of one engine. `submit` and `cancel` from any thread; `run_forever` or `step` from one."""

    engine: Runs
    # Called from the engine's thread with the tickets that are done, once a batch.
    deliver: Deliver
    max_batch_tokens: int
    max_queue_tokens: int
    # Predicted; 0 for no bound.
    max_batch_ns: float = 0.0
    # Of the model: what a request's depth is measured by.
    num_layers: int = 1
    clock_ns: Callable[[], int] = time.monotonic_ns
    cost: CostModel = field(default_factory=CostModel)
    margin: Margin = field(default_factory=Margin)
    queue: FairQueue = field(default_factory=FairQueue)
    stats: Stats = field(default_factory=Stats)
    # The batch under way, and the tickets that it has settled and not yet delivered.
    _running: list[Unit] = field(default_factory=list)
    _settled: list[Ticket] = field(default_factory=list)
    _running_since_ns: int = 0
    _running_ns: float = 0.0  # predicted
    _closed: bool = False
    # Abandoned, and not yet reopened.
    _down: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def queued_tokens(self) -> int:
        """Tokens of the inputs that are in no batch yet."""
        return self.queue.num_tokens

    def waiting(self) -> tuple[int, float]:
        """The number of requests that wait, and the seconds since the oldest came."""
        with self._changed:
            arrivals = [ticket.submitted_ns for ticket in self.queue]
            return len(arrivals), (self.clock_ns() - min(arrivals)) / 1e9 if arrivals else 0.0

    # ------------------------------------------------------------------------- admission

    def submit(
        self, works: Sequence[Work], priority: Priority, deadline_ns: int | None, client: str = ""
    ) -> Ticket:
        """Admits a request of at least one input, or raises a `RefusedError`."""
        num_tokens = sum(work.num_tokens for work in works)
        num_bytes = sum(work.result_bytes for work in works)
        depth = depth_of(works[0].plan, self.num_layers)
        with self._changed:
            size = self.cost.size(num_tokens, depth=depth, num_bytes=num_bytes)
            now, reckoned_ns = self._admit(num_tokens, size, priority, deadline_ns, client)
            ticket = Ticket(
                works=works,
                priority=priority,
                deadline_ns=deadline_ns,
                client=client,
                number=next(self._numbers),
                submitted_ns=now,
                reckoned_ns=reckoned_ns,
                depth=depth,
                token_cost=size / num_tokens,
                queued_tokens=num_tokens,
                outputs=[None] * len(works),
                num_unanswered=len(works),
            )
            self.queue.push(ticket)
            self.stats.num_admitted += 1
            self._changed.notify()
        return ticket

    def check(self, num_inputs: int, priority: Priority, deadline_ns: int | None, client: str = "") -> None:
        """Raises the `RefusedError` that is certain already for a request that is not tokenized yet."""
        with self._changed:
            self._admit(num_inputs, 0.0, priority, deadline_ns, client)

    def cancel(self, ticket: Ticket) -> None:
        """The caller went away: what is queued of it is dropped now, what is running is not delivered."""
        with self._changed:
            if not ticket.closed:
                self.stats.dropped["cancelled", "queued" if ticket.queued_tokens else "running"] += 1
                ticket.closed = True
                self.queue.remove(ticket)
                if ticket.is_late(self.clock_ns()):
                    self._learn_margin(ticket)

    def close(self) -> None:
        """Admits no more; the engine's thread ends when the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def reopen(self) -> None:
        """Admits again, after `abandon`."""
        self._down = False

    def _admit(
        self, num_tokens: int, size: float, priority: Priority, deadline_ns: int | None, client: str
    ) -> tuple[int, float]:
        """The time of admission, and the nanoseconds to reckon with until its answer; raises a `RefusedError`."""
        now = self.clock_ns()
        queued_tokens = self.queue.num_tokens
        if self._closed or self._down:
            raise ClosedError("the engine is stopping, or starts anew", 1.0)
        if queued_tokens and queued_tokens + num_tokens > self._room(client, num_tokens):
            wait_s = self._predict_ns(self.queue.size, now) / 1e9
            raise QueueFullError(
                f"the queue holds {queued_tokens} of at most {self.max_queue_tokens} tokens, and this "
                f"request has {num_tokens}; try again in {wait_s:.3f} s",
                wait_s,
            )
        ahead = self.queue.size_ahead(priority, client, size)
        done_ns = self._predict_ns(ahead + size, now) * self.margin.factor
        # An idle engine takes what comes: were its estimate wrong, only running would mend it.
        is_idle = not queued_tokens and not self._running
        if deadline_ns is not None and now + done_ns > deadline_ns and not is_idle:
            raise DeadlineUnreachableError(
                f"it would take {done_ns / 1e9:.3f} s by prediction, and the deadline is in "
                f"{max(deadline_ns - now, 0) / 1e9:.3f} s",
                self._predict_ns(ahead, now) / 1e9,
            )
        return now, done_ns

    def _room(self, client: str, num_tokens: int) -> float:
        """Tokens that the queue may hold with this request in it."""
        room = self.max_queue_tokens
        if self.queue.num_tokens + num_tokens > room:
            held = self.queue.tokens_by_client()
            others = [tokens for one, tokens in held.items() if one != client]
            share = room / (len(others) + 1)
            if others and held.get(client, 0) + num_tokens < share:
                return max(room, *others) + RESERVE * room
        return room

    def _predict_ns(self, size: float, now: int) -> float:
        """Until so many tokens at full depth are answered, the batch under way included."""
        running = max(self._running_ns - (now - self._running_since_ns), 0.0) if self._running else 0.0
        num_batches = math.ceil(size / self.max_batch_tokens)
        return running + num_batches * self.cost.fixed_ns + size * self.cost.per_token_ns

    # ---------------------------------------------------------------- on the engine's thread

    def run_forever(self) -> None:
        """Serves until closed and empty. Should it ever fail itself, every waiter is told."""
        try:
            while self._wait():
                self.step()
        except BaseException:
            self.abandon("the engine failed")
            raise

    def step(self) -> bool:
        """Forms one batch from all that waits now, runs it, delivers; False when nothing waited."""
        with self._changed:
            self._running = self._form()
            formed = bool(self._running or self._settled)
        self._run(self._running)
        self._running = []
        self._deliver_settled()
        return formed

    def hangs(self, timeout_ns: float) -> bool:
        """Whether the pass under way has run for longer than this, and far longer than predicted."""
        with self._changed:
            elapsed_ns = self.clock_ns() - self._running_since_ns
            return bool(self._running) and elapsed_ns > max(timeout_ns, HANG_FACTOR * self._running_ns)

    def abandon(self, reason: str) -> None:
        """Fails all that waits and all that runs, and admits no more. From any thread."""
        with self._changed:
            self._down = True
            for ticket in [*(unit.ticket for unit in self._running), *self.queue]:
                self._fail(ticket, ClosedError(reason, 1.0))
            self._running = []
            self._changed.notify()
        self._deliver_settled()

    def _deliver_settled(self) -> None:
        with self._changed:
            settled, self._settled = self._settled, []
        if settled:
            self.deliver(settled)

    def _wait(self) -> bool:
        """Blocks until something is queued; False when closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._down or self.queue)
            return bool(self.queue)

    def _form(self) -> list[Unit]:
        """The next batch, at most `max_batch_tokens` or one input; fails the tickets that came too late."""
        now = self.clock_ns()
        for ticket in self.queue.late(now):
            self.stats.dropped["late", "queued"] += 1
            self._learn_margin(ticket)
            self._fail(ticket, DeadlinePassedError())
        batch = Batch(self.max_batch_tokens, self.max_batch_ns, self.cost, self.queue.tokens_by_depth)
        units = self.queue.take(now, batch.takes)
        for unit in units:
            if not unit.ticket.started_ns:
                unit.ticket.started_ns = now
                self.stats.num_started += 1
                self.stats.queue_ns += now - unit.ticket.submitted_ns
        self._running_since_ns = now
        self._running_ns = self.cost.predict(batch.num_tokens, depth=batch.depth, num_bytes=batch.num_bytes)
        return units

    def _run(self, units: list[Unit]) -> None:
        """Runs a batch; one that fails is split and tried again, down to the input that is at fault."""
        units = [unit for unit in units if not unit.ticket.closed]
        if not units:
            return
        begun_ns = self._running_since_ns = self.clock_ns()
        try:
            answered = list(zip(units, self.engine.run([unit.work for unit in units]), strict=True))
        except Exception as error:
            self.stats.num_failed_batches += 1
            if len(units) > 1:
                logger.warning("a batch of %d inputs failed (%r); running its halves", len(units), error)
                middle = len(units) // 2
                self._run(units[:middle])
                self._run(units[middle:])
            else:
                with self._changed:
                    self._fail(units[0].ticket, error)
            return
        with self._changed:
            self._settle(answered, self.clock_ns() - begun_ns)

    def _settle(self, answered: list[tuple[Unit, Outputs]], elapsed_ns: int) -> None:
        """Counts and learns from a batch, and hands its outputs to their tickets; the lock is held."""
        num_tokens = sum(unit.work.num_tokens for unit, _ in answered)
        num_bytes = sum(unit.work.result_bytes for unit, _ in answered)
        depth = max(unit.ticket.depth for unit, _ in answered)
        self.cost.observe(num_tokens, elapsed_ns, depth=depth, num_bytes=num_bytes)
        self.stats.count_batch(len(answered), num_tokens, self.max_batch_tokens, elapsed_ns, num_bytes)
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
            self.margin.observe(self.clock_ns() - ticket.submitted_ns > ticket.reckoned_ns)

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        """Settles a ticket without an answer; the lock is held."""
        if not ticket.closed:
            ticket.error = error
            ticket.closed = True
            self.queue.remove(ticket)
            self.stats.num_failed += 1
            self._settled.append(ticket)

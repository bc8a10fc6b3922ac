"""What waits, and in which order it goes: by priority, then by fair shares of the clients, then by deadline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from layertap_server.plan import Outputs, Work
from layertap_server.scheduling.priority_class import PriorityClass

# A client's request goes before its others that are due later; one with no deadline, or a later one,
# is due after so long.
PATIENCE_NS = 30_000_000_000
# Inputs that a batch passes over, looking for some that fit.
MAX_PASSED_OVER = 64


class Priority(IntEnum):
    """`layertap.v1.Priority`."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


# What is about to be pushed, by priority and client, in tokens at full depth.
PendingLoad = Mapping[tuple[Priority, str], float]
NO_PENDING_LOAD: PendingLoad = {}


@dataclass(slots=True, eq=False)
class Ticket:
    """One admitted request: the inputs it waits for, and where its time went.

    `outputs`, `error` and the times are filled by the engine's thread; they are the caller's to
    read once the ticket is delivered.
    """

    works: Sequence[Work]
    priority: Priority
    deadline_ns: int | None
    client: str
    number: int  # in the order of arrival
    submitted_ns: int
    # From then until its answer, as it seemed then.
    predicted_latency_ns: float
    depth: float
    # Tokens at full depth that one of its tokens costs.
    token_cost: float
    # Of the inputs that are in no batch yet.
    queued_tokens: int
    outputs: list[Outputs | None]
    num_unanswered: int
    next_work: int = 0
    # Batches that took others in its stead, for their depth.
    num_passed_over: int = 0
    started_ns: int = 0
    compute_ns: int = 0
    batch_inputs: int = 0
    batch_tokens: int = 0
    error: BaseException | None = None
    # Delivered, cancelled or failed: nothing more is done for it.
    closed: bool = False
    # Its place among its client's requests.
    order_key: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        due_ns = self.submitted_ns + PATIENCE_NS
        if self.deadline_ns is not None and self.deadline_ns < due_ns:
            due_ns = self.deadline_ns
        self.order_key = (due_ns, self.number)

    def is_late(self, now: int) -> bool:
        return self.deadline_ns is not None and now >= self.deadline_ns


@dataclass(slots=True)
class Unit:
    """One input of a ticket, in a batch."""

    ticket: Ticket
    index: int
    work: Work = field(init=False)

    def __post_init__(self) -> None:
        self.work = self.ticket.works[self.index]


@dataclass(slots=True)
class FairQueue:
    """Tickets with inputs in no batch yet. Not thread-safe: the scheduler holds its lock."""

    # Of clients that have another share than 1.
    weights: Mapping[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    num_inputs: int = 0
    tokens_by_depth: dict[float, int] = field(default_factory=dict)
    # By the client that has some.
    tokens_by_client: dict[str, int] = field(default_factory=dict)
    # Who last pushed into an empty queue: who may have more in it than it holds of others.
    first_client: str = ""
    _classes: dict[Priority, PriorityClass] = field(
        default_factory=lambda: {one: PriorityClass(one) for one in Priority}
    )

    def __bool__(self) -> bool:
        return self.num_inputs > 0

    def __iter__(self) -> Iterator[Ticket]:
        for priority_class in self._classes.values():
            yield from priority_class

    def push(self, ticket: Ticket) -> None:
        if not self.num_inputs:
            self.first_client = ticket.client
        self._classes[ticket.priority].push(ticket, self._weight(ticket.client))
        self._count(ticket, len(ticket.works), ticket.queued_tokens)

    def remove(self, ticket: Ticket) -> None:
        """Drops what waits of the ticket, if anything does."""
        if ticket.queued_tokens:
            self._classes[ticket.priority].remove(ticket)
            self._count(ticket, ticket.next_work - len(ticket.works), -ticket.queued_tokens)
            ticket.queued_tokens = 0
            ticket.next_work = len(ticket.works)

    def late(self, now: int) -> list[Ticket]:
        """Those whose deadline has passed."""
        return [
            ticket
            for priority_class in self._classes.values()
            if priority_class.num_waiting_flows
            for ticket in priority_class.late(now)
        ]

    def take(
        self,
        now: int,
        fits: Callable[[Ticket], bool],
        *,
        max_ahead: float = math.inf,
        into: list[Unit] | None = None,
    ) -> list[Unit]:
        """Removes the inputs that fit, asking for the next of each ticket in the order of the queue.

        They are appended to `into`, one by one, so that none is lost should `fits` fail. `max_ahead` is how far, in
        tokens at full depth, one client may pass others whose inputs do not fit.
        """
        units = [] if into is None else into
        num_passed_over = 0
        for priority_class in sorted(
            (one for one in self._classes.values() if one.num_waiting_flows), key=lambda one: one.due_ns
        ):
            is_first = True

            def is_taken(ticket: Ticket, priority_class: PriorityClass = priority_class) -> bool:
                nonlocal is_first
                was_first, is_first = is_first, False
                if not fits(ticket):
                    return False
                if was_first:
                    priority_class.waiting_since_ns = now
                units.append(self._take_next(priority_class, ticket))
                return True

            num_passed_over += priority_class.offer(is_taken, max_ahead, MAX_PASSED_OVER - num_passed_over)
        return units

    def size_ahead(
        self,
        priority: Priority,
        client: str,
        size: float,
        pending: PendingLoad = NO_PENDING_LOAD,
        until: tuple[int, float] | None = None,
    ) -> float:
        """What is served before a further request of this size would be done, in tokens at full depth, if what is
        coming was in the queue; and, with `until` (now, and so many nanoseconds from then), what others are expected
        to send by then.

        All of the higher priorities, all of the client's own, and of each other client's what has its turn before
        the last of that.
        """
        if not self.num_tokens:
            return 0.0
        ahead = 0.0
        for priority_class in self._classes.values():
            if priority_class.priority > priority:
                ahead += priority_class.size + (priority_class.expected(*until) if until else 0.0)
        of_this_priority: dict[str, float] = {}
        for (one, name), coming_size in pending.items():
            if one > priority:
                ahead += coming_size
            elif one == priority:
                of_this_priority[name] = coming_size
        priority_class = self._classes[priority]
        return ahead + priority_class.size_ahead(client, size, of_this_priority, self._weight, until)

    def _weight(self, client: str) -> float:
        return self.weights.get(client, 1.0)

    @property
    def size(self) -> float:
        """Of all that waits, in tokens at full depth."""
        return sum(priority_class.size for priority_class in self._classes.values())

    def _take_next(self, priority_class: PriorityClass, ticket: Ticket) -> Unit:
        unit = Unit(ticket, ticket.next_work)
        num_tokens = unit.work.num_tokens
        priority_class.serve(ticket, num_tokens, is_last=ticket.next_work == len(ticket.works) - 1)
        self._count(ticket, -1, -num_tokens)
        ticket.queued_tokens -= num_tokens
        ticket.next_work += 1
        return unit

    def _count(self, ticket: Ticket, num_inputs: int, num_tokens: int) -> None:
        self.num_inputs += num_inputs
        self.num_tokens += num_tokens
        add(self.tokens_by_depth, ticket.depth, num_tokens)
        add(self.tokens_by_client, ticket.client, num_tokens)


def add(held: dict[Any, int], key: object, number: int) -> None:
    """Keeps only what is not 0."""
    if now_held := held.get(key, 0) + number:
        held[key] = now_held
    else:
        del held[key]

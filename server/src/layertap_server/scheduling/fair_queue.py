"""The queue: requests ordered by priority, then by fair shares of the clients, then by deadline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from layertap_server.plan import Outputs, Work
from layertap_server.scheduling.priority_class import PriorityClass

# A client's requests are served in the order in which they are due. A request is due at its deadline, but no
# later than this long after its arrival; one without a deadline is due then.
PATIENCE_NS = 30_000_000_000
# How often a batch may pass over a ticket or a client's flow, in search of inputs that fit.
MAX_PASSED_OVER = 64


class Priority(IntEnum):
    """`layertap.v1.Priority`."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


@dataclass(slots=True, eq=False)
class Ticket:
    """One admitted request, or several that are served as one: the inputs, their outputs, and the times.

    The engine threads write `outputs`, `error` and the times. The caller may read them once the ticket is
    delivered.
    """

    works: Sequence[Work]
    priority: Priority
    deadline_ns: int | None
    client: str
    number: int  # in the order of arrival
    submitted_ns: int
    # From submission to answer, as predicted at admission; infinite without a deadline.
    predicted_latency_ns: float
    depth: float
    # How many tokens at full depth take as long as one of its tokens.
    token_cost: float
    # Tokens of its inputs that are not in a batch yet.
    queued_tokens: int
    outputs: list[Outputs | None]
    num_unanswered: int
    # The requests that it stands for.
    num_requests: int = 1
    next_work: int = 0
    # How often a batch did not take its next input because of its depth.
    num_passed_over: int = 0
    started_ns: int = 0
    compute_ns: int = 0
    batch_inputs: int = 0
    batch_tokens: int = 0
    error: BaseException | None = None
    # Answered, cancelled or failed: nothing more is computed for it.
    closed: bool = False
    # Its place among its client's requests: when it is due, then the order of arrival.
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
    """The tickets with inputs that are not in a batch yet. Not thread-safe: the scheduler holds its lock."""

    # The weights of the clients whose weight is not 1.
    weights: Mapping[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    num_inputs: int = 0
    tokens_by_depth: dict[float, int] = field(default_factory=dict)
    # The queued tokens of each client that has any.
    tokens_by_client: dict[str, int] = field(default_factory=dict)
    # The client that last pushed into an empty queue. An empty queue admits a request of any size, so this
    # client may hold more than the queue's limit.
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
        """Drops the ticket's queued inputs, if there are any."""
        if ticket.queued_tokens:
            self._classes[ticket.priority].remove(ticket)
            self._count(ticket, ticket.next_work - len(ticket.works), -ticket.queued_tokens)
            ticket.queued_tokens = 0
            ticket.next_work = len(ticket.works)

    def late(self, now: int) -> list[Ticket]:
        """The queued tickets whose deadline has passed."""
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
        """Removes and returns the inputs that fit. `fits` is asked for the next input of each ticket, in the
        order of the queue.

        The inputs are appended to `into` one by one, so that none is lost if `fits` raises. `max_ahead`
        limits, in tokens at full depth, how far a client may get ahead of others whose inputs do not fit.
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
                self._take_some(priority_class, ticket, fits, units)
                return True

            num_passed_over += priority_class.offer(is_taken, max_ahead, MAX_PASSED_OVER - num_passed_over)
        return units

    def size_ahead(
        self,
        priority: Priority,
        client: str,
        size: float,
        until: tuple[int, float] | None = None,
    ) -> float:
        """The size, in tokens at full depth, that is served before a further request of this size would be
        done. With `until` (now, and a number of nanoseconds from then),
        what is expected to arrive from others in that time is included.

        It is the sum of all work of higher priorities, all the client's own work of this priority, and that
        part of each other client's work of this priority which fair queueing serves before the request is
        done.
        """
        if not self.num_tokens:
            return 0.0
        ahead = 0.0
        for priority_class in self._classes.values():
            if priority_class.priority > priority:
                ahead += priority_class.size + (priority_class.expected(*until) if until else 0.0)
        priority_class = self._classes[priority]
        return ahead + priority_class.size_ahead(client, size, self._weight(client), until)

    def _weight(self, client: str) -> float:
        return self.weights.get(client, 1.0)

    @property
    def size(self) -> float:
        """The size of all queued inputs, in tokens at full depth."""
        return sum(priority_class.size for priority_class in self._classes.values())

    def _take_some(
        self,
        priority_class: PriorityClass,
        ticket: Ticket,
        fits: Callable[[Ticket], bool],
        units: list[Unit],
    ) -> None:
        """Moves the ticket's next input to `units`, and those after it as long as they fit, if no other
        client of the priority waits: its turn cannot come between them."""
        begin, num_tokens = ticket.next_work, 0
        try:
            while True:
                unit = Unit(ticket, ticket.next_work)
                units.append(unit)
                ticket.next_work += 1
                num_tokens += unit.work.num_tokens
                is_last = ticket.next_work == len(ticket.works)
                if is_last or priority_class.num_waiting_flows > 1 or not fits(ticket):
                    break
        finally:
            priority_class.serve(ticket, num_tokens, is_last=ticket.next_work == len(ticket.works))
            self._count(ticket, begin - ticket.next_work, -num_tokens)
            ticket.queued_tokens -= num_tokens

    def _count(self, ticket: Ticket, num_inputs: int, num_tokens: int) -> None:
        self.num_inputs += num_inputs
        self.num_tokens += num_tokens
        add(self.tokens_by_depth, ticket.depth, num_tokens)
        add(self.tokens_by_client, ticket.client, num_tokens)


def add(held: dict[Any, int], key: object, number: int) -> None:
    """Adds `number` to the value of `key`, and deletes a value that becomes 0."""
    if now_held := held.get(key, 0) + number:
        held[key] = now_held
    else:
        del held[key]

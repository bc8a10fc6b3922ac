"""What waits, and in which order it goes: by priority, then by fair shares of the clients, then by deadline.

Within a priority each client has a flow of its own, and the flows take turns by start-time fair
queueing (Goyal, Vin and Cheng, 1996): each input moves its flow's tag on by its cost over the
client's weight, and the flow with the lowest tag goes next. A flow that was idle begins at the tag
last served, so it has no claim on the past, and nothing is kept free for anyone.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice

from layertap_server.plan import Outputs, Work

# How much longer a priority waits than the next higher one before it goes first, for one batch.
PRIORITY_HEAD_START_NS = 1_000_000_000
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
Coming = Mapping[tuple[Priority, str], float]
NONE_COMING: Coming = {}


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
    reckoned_ns: float
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
    due: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        due_ns = self.submitted_ns + PATIENCE_NS
        if self.deadline_ns is not None and self.deadline_ns < due_ns:
            due_ns = self.deadline_ns
        self.due = (due_ns, self.number)

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


@dataclass(slots=True, eq=False)
class Flow:
    """What one client has waiting at one priority, the earliest due first."""

    weight: float
    tag: float
    tickets: list[Ticket] = field(default_factory=list)
    size: float = 0.0
    num_tokens: int = 0


@dataclass(slots=True, eq=False)
class Lane:
    """One priority: the flows of its clients, only those with something waiting."""

    priority: Priority
    flows: dict[str, Flow] = field(default_factory=dict)
    # The tag last served.
    served_tag: float = 0.0
    size: float = 0.0
    # Since its first in line last rode in a batch, or since it began to wait.
    waiting_since_ns: int = 0

    @property
    def due_ns(self) -> int:
        return self.waiting_since_ns - self.priority * PRIORITY_HEAD_START_NS


@dataclass(slots=True)
class FairQueue:
    """Tickets with inputs in no batch yet. Not thread-safe: the scheduler holds its lock."""

    # Of clients that have another share than 1.
    weights: Mapping[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    tokens_by_depth: dict[float, int] = field(default_factory=dict)
    _lanes: dict[Priority, Lane] = field(default_factory=lambda: {one: Lane(one) for one in Priority})

    def __bool__(self) -> bool:
        return any(lane.flows for lane in self._lanes.values())

    def __iter__(self) -> Iterator[Ticket]:
        for lane in self._lanes.values():
            for flow in lane.flows.values():
                yield from flow.tickets

    @property
    def holds_one_input(self) -> bool:
        first_two = list(islice(self, 2))
        return len(first_two) == 1 and first_two[0].next_work == len(first_two[0].works) - 1

    def push(self, ticket: Ticket) -> None:
        lane = self._lanes[ticket.priority]
        if not lane.flows:
            lane.waiting_since_ns = ticket.submitted_ns
        flow = lane.flows.get(ticket.client)
        if flow is None:
            flow = lane.flows[ticket.client] = Flow(self._weight(ticket.client), lane.served_tag)
        if flow.tickets and ticket.due < flow.tickets[-1].due:
            insort(flow.tickets, ticket, key=lambda one: one.due)
        else:
            flow.tickets.append(ticket)
        self._count(lane, flow, ticket, ticket.queued_tokens)

    def remove(self, ticket: Ticket) -> None:
        """Drops what waits of the ticket, if anything does."""
        if ticket.queued_tokens:
            lane = self._lanes[ticket.priority]
            flow = lane.flows[ticket.client]
            self._count(lane, flow, ticket, -ticket.queued_tokens)
            self._leave(lane, flow, ticket)
            ticket.queued_tokens = 0
            ticket.next_work = len(ticket.works)

    def late(self, now: int) -> list[Ticket]:
        """Those whose deadline has passed."""
        found = []
        for lane in self._lanes.values():
            for flow in lane.flows.values():
                for ticket in flow.tickets:
                    if ticket.due[0] > now:
                        break
                    if ticket.is_late(now):
                        found.append(ticket)
        return found

    def take(self, now: int, fits: Callable[[Ticket], bool], *, into: list[Unit] | None = None) -> list[Unit]:
        """Removes the inputs that fit, asking for the next of each ticket in the order of the queue. They are
        appended to `into`, one by one, so that none is lost should `fits` fail."""
        units = [] if into is None else into
        num_passed_over = 0
        for lane in sorted((one for one in self._lanes.values() if one.flows), key=lambda one: one.due_ns):
            line = [(flow.tag, number, flow, 0) for number, flow in enumerate(lane.flows.values())]
            heapq.heapify(line)
            is_first = True
            while line and num_passed_over < MAX_PASSED_OVER:
                tag, number, flow, place = heapq.heappop(line)
                ticket = flow.tickets[place]
                if fits(ticket):
                    if is_first:
                        lane.waiting_since_ns = now
                    lane.served_tag = max(lane.served_tag, tag)
                    units.append(self._take_next(lane, flow, ticket))
                else:
                    num_passed_over += 1
                    place += 1
                is_first = False
                if place < len(flow.tickets):
                    heapq.heappush(line, (flow.tag, number, flow, place))
        return units

    def size_ahead(self, priority: Priority, client: str, size: float, coming: Coming = NONE_COMING) -> float:
        """What is served before a further request of this size would be done, in tokens at full depth, if what is
        coming was in the queue.

        All of the higher priorities, all of the client's own, and of each other client's at most as
        much as this client gets meanwhile.
        """
        if not self.num_tokens:
            return 0.0
        sizes = {name: flow.size for name, flow in self._lanes[priority].flows.items()}
        ahead = sum([lane.size for lane in self._lanes.values() if lane.priority > priority])
        for (one, name), coming_size in coming.items():
            if one > priority:
                ahead += coming_size
            elif one == priority:
                sizes[name] = sizes.get(name, 0.0) + coming_size
        own_size = sizes.pop(client, 0.0)
        turn = (own_size + size) / self._weight(client)
        return ahead + own_size + sum([min(one, turn * self._weight(name)) for name, one in sizes.items()])

    def _weight(self, client: str) -> float:
        return self.weights.get(client, 1.0)

    @property
    def size(self) -> float:
        """Of all that waits, in tokens at full depth."""
        return sum(lane.size for lane in self._lanes.values())

    def tokens_by_client(self) -> Counter[str]:
        held: Counter[str] = Counter()
        for lane in self._lanes.values():
            for client, flow in lane.flows.items():
                held[client] += flow.num_tokens
        return held

    def _take_next(self, lane: Lane, flow: Flow, ticket: Ticket) -> Unit:
        unit = Unit(ticket, ticket.next_work)
        num_tokens = unit.work.num_tokens
        flow.tag += num_tokens * ticket.token_cost / flow.weight
        self._count(lane, flow, ticket, -num_tokens)
        ticket.queued_tokens -= num_tokens
        ticket.next_work += 1
        if ticket.next_work == len(ticket.works):
            self._leave(lane, flow, ticket)
        return unit

    def _count(self, lane: Lane, flow: Flow, ticket: Ticket, num_tokens: int) -> None:
        size = num_tokens * ticket.token_cost
        lane.size += size
        flow.size += size
        flow.num_tokens += num_tokens
        self.num_tokens += num_tokens
        if at_depth := self.tokens_by_depth.get(ticket.depth, 0) + num_tokens:
            self.tokens_by_depth[ticket.depth] = at_depth
        else:
            del self.tokens_by_depth[ticket.depth]

    def _leave(self, lane: Lane, flow: Flow, ticket: Ticket) -> None:
        is_first = flow.tickets[0] is ticket
        place = 0 if is_first else bisect_left(flow.tickets, ticket.due, key=lambda one: one.due)
        del flow.tickets[place]
        if not flow.tickets:
            del lane.flows[ticket.client]
            if not lane.flows:
                lane.size = 0.0  # the rounding of many sums and differences ends here

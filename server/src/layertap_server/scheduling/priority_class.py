"""One priority of the queue: each client's queued requests, its recent arrivals, and the order among clients.

The clients' flows are served by start-time fair queueing (Goyal, Vin and Cheng, 1996). An input's start tag
is the end tag of its client's previous input, or the virtual time if the client had nothing queued and the
virtual time is later. Its end tag is the start tag plus its size over the client's weight. The input with the
lowest start tag is served next. A client keeps the end tag of its last input while it has nothing queued. So
a client whose queue happens to be empty each time that a batch is formed is not served before clients that
have waited longer. A tag below the virtual time counts as the virtual time, so an idle client does not save
up a claim to more service later.

With each input that is served, the virtual time advances by the input's size over the sum of the weights of
all waiting flows, which is the average progress of these flows. So sooner or later it passes the tag of every
client that has left. Such a client can be forgotten, so the memory is bounded, however many clients come.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from layertap_server.scheduling.fair_queue import Priority, Ticket

# A batch serves a priority before the next higher one if the lower one has waited longer by at least this
# much.
PRIORITY_HEAD_START_NS = 1_000_000_000
# Expected arrivals keep what is accepted in time: without them, 80 to 95 % of it is in time in simulation, for
# clients with unequal rates and for several priorities, and with them 98.7 % or more (`python -m
# tests.simulation`).
# Time constant of the arrival rates: the weight of arrivals decays exponentially, and about a third (1/e) of
# a rate's weight is older than this.
WINDOW_NS = 500e6
# A client that has sent nothing for this long may be forgotten: hardly anything is expected of it any more.
FORGOTTEN_NS = 4 * WINDOW_NS
# Expected arrivals are limited to those of this time (3 s), so that a burst does not cause requests with long
# deadlines to be refused for a while.
HORIZON_NS = 6 * WINDOW_NS
# Clients with nothing queued that are remembered, at most. There has to be a limit: client names are free
# text.
MAX_IDLE_CLIENTS = 2048


@dataclass(slots=True, eq=False)
class ClientFlow:
    """One client at one priority."""

    client: str
    weight: float
    row: int
    # The tickets with queued inputs, the earliest due first.
    tickets: list[Ticket] = field(default_factory=list)
    # Orders flows with equal start tags. It is new each time that the flow begins to wait, and -1 while
    # nothing is queued.
    number: int = -1


class PriorityClass:
    """One priority: the flows of the clients that have something queued, and of those that recently had.

    The values that are summed over all clients are kept in numpy columns with one row for each client, so
    that such a sum over thousands of clients takes tens of microseconds. Sizes are in tokens at full depth.
    Not thread-safe: the scheduler holds its lock.
    """

    def __init__(self, priority: Priority) -> None:
        self.priority = priority
        # The size of all queued inputs.
        self.size = 0.0
        self.num_waiting_flows = 0
        # When a batch last took an input of the first ticket in line, or when the first flow began to wait.
        self.waiting_since_ns = 0
        self.virtual_time = 0.0
        # The sum of the weights of the waiting flows.
        self._weight = 0.0
        # A heap of start tag, number and flow of each waiting flow. Entries whose number is not the flow's
        # number are outdated.
        self._line: list[tuple[float, int, ClientFlow]] = []
        self._next_number = 0
        # By client; the flow that `_flow_of` or `_forget_some` examined last is at the end.
        self._flows: OrderedDict[str, ClientFlow] = OrderedDict()
        self._rows: list[ClientFlow] = []
        self._hold(np.zeros((6, 16)))

    def _hold(self, columns: np.ndarray) -> None:
        self._columns = columns
        self._waiting, self._tags, self._weights, self._recent, self._noted_ns, self._due_ns = columns

    @property
    def due_ns(self) -> int:
        return self.waiting_since_ns - self.priority * PRIORITY_HEAD_START_NS

    def __iter__(self) -> Iterator[Ticket]:
        for flow in self._rows:
            yield from flow.tickets

    def late(self, now: int) -> list[Ticket]:
        """The tickets whose deadline has passed."""
        found = []
        for row in np.flatnonzero(self._due_ns[: len(self._rows)] <= now).tolist():
            for ticket in self._rows[row].tickets:
                if ticket.order_key[0] > now:
                    break
                if ticket.is_late(now):
                    found.append(ticket)
        return found

    # --------------------------------------------------------------------- queued tickets

    def push(self, ticket: Ticket, weight: float) -> None:
        flow, now = self._flow_of(ticket.client, weight, ticket.submitted_ns), ticket.submitted_ns
        row = flow.row
        if not flow.tickets:
            if not self.num_waiting_flows:
                self.waiting_since_ns = now
            self.num_waiting_flows += 1
            self._weight += flow.weight
            self._tags[row] = max(self._tags[row], self.virtual_time)
            flow.number = self._next_number
            self._next_number += 1
            self._line_up(flow)
        if flow.tickets and ticket.order_key < flow.tickets[-1].order_key:
            insort(flow.tickets, ticket, key=lambda one: one.order_key)
        else:
            flow.tickets.append(ticket)
        size = ticket.queued_tokens * ticket.token_cost
        self._due_ns[row] = flow.tickets[0].order_key[0]
        self._waiting[row] += size
        self.size += size
        self._recent[row] = size + self._recent[row] * math.exp((self._noted_ns[row] - now) / WINDOW_NS)
        self._noted_ns[row] = now
        self._forget_some(now)

    def remove(self, ticket: Ticket) -> None:
        """Removes the ticket with its queued inputs."""
        flow = self._flows[ticket.client]
        size = ticket.queued_tokens * ticket.token_cost
        self._waiting[flow.row] -= size
        self.size -= size
        self._leave(flow, ticket)

    def serve(self, ticket: Ticket, num_tokens: int, *, is_last: bool) -> None:
        """Accounts for the ticket's next input, which a batch takes; removes the ticket after its last
        one."""
        flow = self._flows[ticket.client]
        size = num_tokens * ticket.token_cost
        self._tags[flow.row] += size / flow.weight
        self._waiting[flow.row] -= size
        self.size -= size
        self.virtual_time += size / self._weight
        if is_last:
            self._leave(flow, ticket)

    def _leave(self, flow: ClientFlow, ticket: Ticket) -> None:
        is_first = flow.tickets[0] is ticket
        place = 0 if is_first else bisect_left(flow.tickets, ticket.order_key, key=lambda one: one.order_key)
        del flow.tickets[place]
        if flow.tickets:
            self._due_ns[flow.row] = flow.tickets[0].order_key[0]
            return
        self._due_ns[flow.row] = math.inf
        self._waiting[flow.row] = 0.0  # drops the rounding errors of many sums and differences
        flow.number = -1
        self.num_waiting_flows -= 1
        self._weight -= flow.weight
        if not self.num_waiting_flows:
            # Nothing is queued, so no client was served at the cost of one that still waits: all tags restart
            # at 0.
            self.size = self._weight = self.virtual_time = 0.0
            self._tags[:] = 0.0
            self._line.clear()
        elif len(self._line) > 2 * self.num_waiting_flows + 16:
            self._line[:] = [one for one in self._line if one[1] == one[2].number]
            heapq.heapify(self._line)

    def offer(self, is_taken: Callable[[Ticket], bool], max_ahead: float, max_passed_over: int) -> int:
        """Offers tickets to `is_taken`, the lowest start tag first, each again as long as its next input is
        taken (`is_taken` then has called `serve` before it returns). Stops when `max_passed_over` offers were
        passed over, and returns their number.

        A flow is also passed over when its tag is ahead of the lowest tag whose ticket was not taken, by more
        than `max_ahead` over the flow's weight. Otherwise a client with small inputs would get all the space
        that larger inputs leave in batches, whatever its share.
        """
        line = self._line
        put_back: list[ClientFlow] = []
        places: dict[int, int] = {}
        num_passed_over, lowest = 0, math.inf  # `lowest`: lowest tag whose ticket was not taken
        try:
            while line and num_passed_over < max_passed_over:
                tag, number, flow = heapq.heappop(line)
                if number != flow.number:
                    continue  # outdated: the flow has left since
                put_back.append(flow)
                if tag > lowest + max_ahead / flow.weight:
                    num_passed_over += 1
                    continue
                self.virtual_time = max(self.virtual_time, min(tag, lowest))
                place = places.get(number, 0)
                if not is_taken(flow.tickets[place]):
                    num_passed_over, lowest = num_passed_over + 1, min(lowest, tag)
                    place = places[number] = place + 1
                if place < len(flow.tickets):
                    self._line_up(put_back.pop())
        finally:
            for flow in put_back:
                if flow.tickets:
                    self._line_up(flow)
        return num_passed_over

    def _line_up(self, flow: ClientFlow) -> None:
        heapq.heappush(self._line, (float(self._tags[flow.row]), flow.number, flow))

    # ------------------------------------------------------------- prediction

    def expected(self, now_ns: int, within_ns: float) -> float:
        """The size that all clients are expected to send within `within_ns` (`HORIZON_NS` at most), at their
        recent rates."""
        return float(self._expected(now_ns, within_ns).sum()) if self._rows else 0.0

    def _expected(self, now_ns: int, within_ns: float) -> np.ndarray:
        rows = slice(len(self._rows))
        age = np.exp((self._noted_ns[rows] - now_ns) / WINDOW_NS)
        return self._recent[rows] * age * (min(within_ns, HORIZON_NS) / WINDOW_NS)  # type: ignore[no-any-return]

    def size_ahead(self, client: str, size: float, weight: float, until: tuple[int, float] | None) -> float:
        """The size that this priority serves before a further request of the client, which has this weight,
        would be done. The other arguments are those of `FairQueue.size_ahead`."""
        flow = self._flows.get(client)
        own, start = 0.0, self.virtual_time
        if flow is not None:
            own = float(self._waiting[flow.row])
            start = self._start_of(flow)
        if len(self._rows) == (flow is not None):
            return own
        end = start + (own + size) / weight
        rows = slice(len(self._rows))
        wanted, starts = self._waiting[rows], self._tags[rows]
        if until is not None:
            wanted = wanted + self._expected(*until)
            starts = np.where(self._waiting[rows] > 0, starts, np.maximum(starts, self.virtual_time))
        served = np.minimum(wanted, np.maximum(end - starts, 0.0) * self._weights[rows])
        own_served = 0.0 if flow is None else float(served[flow.row])
        return own - own_served + float(served.sum())

    def _start_of(self, flow: ClientFlow) -> float:
        """The flow's start tag, or the one that it would get if it began to wait now."""
        tag = float(self._tags[flow.row])
        return tag if flow.tickets else max(tag, self.virtual_time)

    # --------------------------------------------------------------------------- clients

    def _flow_of(self, client: str, weight: float, now: int) -> ClientFlow:
        flow = self._flows.get(client)
        if flow is None:
            flow = self._flows[client] = ClientFlow(client, weight, len(self._rows))
            self._rows.append(flow)
            if len(self._rows) > self._columns.shape[1]:
                self._hold(np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1))
            self._columns[:, flow.row] = (0.0, 0.0, weight, 0.0, now, math.inf)
        else:
            self._flows.move_to_end(client)
        return flow

    def _forget_some(self, now: int) -> None:
        """Examines the two flows that were examined longest ago, and forgets them if possible. This runs for
        each request that is pushed, and two exceed the one that may be added, so every flow is examined in
        time."""
        for _ in range(2):
            flow = next(iter(self._flows.values()))
            is_old = now - self._noted_ns[flow.row] > FORGOTTEN_NS
            has_too_many = len(self._rows) - self.num_waiting_flows > MAX_IDLE_CLIENTS
            if flow.tickets or (is_old and not has_too_many and self._tags[flow.row] > self.virtual_time):
                self._flows.move_to_end(flow.client)
            elif is_old or has_too_many:
                self._forget(flow)
            else:
                break  # it stays first, and is examined again at the next push

    def _forget(self, flow: ClientFlow) -> None:
        del self._flows[flow.client]
        last = self._rows.pop()
        if last is not flow:
            self._columns[:, flow.row] = self._columns[:, last.row]
            self._rows[flow.row] = last
            last.row = flow.row

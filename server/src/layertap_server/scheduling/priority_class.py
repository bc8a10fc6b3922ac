"""One priority of the queue: what each client has waiting, what came of it lately, and whose turn it is.

The flows of the clients take turns by start-time fair queueing (Goyal, Vin and Cheng, 1996): an input's start tag is
where the one before it ended, or the virtual time where its client had nothing waiting and that is later; its end
is so much further as it costs, over the client's weight; the input with the lowest start tag goes next. A client
keeps the tag at which its last input ended, so one whose flow is empty at each batch does not come before those who
still wait; and below the virtual time a tag says nothing, so nobody has a claim on the past.

The virtual time goes on with what is served, over the weights of all flows that wait: as far as each of them got on
average. So it leaves every tag behind, and what is kept of clients that are gone is bounded, however many come.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from layertap_server.scheduling.fair_queue import Priority, Ticket

# How much longer a priority waits than the next higher one before it goes first, for one batch.
PRIORITY_HEAD_START_NS = 1_000_000_000
# Of what came, how far back counts: a third of a rate's weight is older.
WINDOW_NS = 500e6
# Of a client that has not come for so long, nothing is expected.
FORGOTTEN_NS = 4 * WINDOW_NS
# A rate says no more of what is further ahead: a burst would keep out for a while who has a minute.
HORIZON_NS = 6 * WINDOW_NS
# Clients with nothing waiting that are remembered; names are free text.
MAX_IDLE_CLIENTS = 2048


@dataclass(slots=True, eq=False)
class ClientFlow:
    """One client at one priority."""

    client: str
    weight: float
    row: int
    # What waits, the earliest due first.
    tickets: list[Ticket] = field(default_factory=list)
    # Of its place in line, among equal tags; another each time that it begins to wait.
    number: int = -1


class PriorityClass:
    """One priority: the flows of the clients that have something waiting, and of those that lately had.

    What sums over all clients need is in columns, with a row for each: with thousands of clients, such a sum takes
    tens of microseconds. Sizes are in tokens at full depth. The scheduler holds its lock.
    """

    def __init__(self, priority: Priority) -> None:
        self.priority = priority
        # Of all that waits.
        self.size = 0.0
        self.num_waiting_flows = 0
        # Since its first in line last rode in a batch, or since it began to wait.
        self.waiting_since_ns = 0
        self.virtual_time = 0.0
        # Of the flows that wait.
        self._weight = 0.0
        # Start tag, number and flow of each that waits, as a heap; and of some that left meanwhile.
        self._line: list[tuple[float, int, ClientFlow]] = []
        self._next_number = 0
        # By client; the one looked at last is last.
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
        """Those whose deadline has passed."""
        found = []
        for row in np.flatnonzero(self._due_ns[: len(self._rows)] <= now).tolist():
            for ticket in self._rows[row].tickets:
                if ticket.order_key[0] > now:
                    break
                if ticket.is_late(now):
                    found.append(ticket)
        return found

    # ------------------------------------------------------------------------ what waits

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
        """What waits of the ticket."""
        flow = self._flows[ticket.client]
        size = ticket.queued_tokens * ticket.token_cost
        self._waiting[flow.row] -= size
        self.size -= size
        self._leave(flow, ticket)

    def serve(self, ticket: Ticket, num_tokens: int, *, is_last: bool) -> None:
        """The next input of a ticket, its last or not, is taken."""
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
        self._waiting[flow.row] = 0.0  # the rounding of many sums and differences ends here
        flow.number = -1
        self.num_waiting_flows -= 1
        self._weight -= flow.weight
        if not self.num_waiting_flows:
            # All have had what they asked for: whoever comes next, nobody was kept waiting for the others.
            self.size = self._weight = self.virtual_time = 0.0
            self._tags[:] = 0.0
            self._line.clear()
        elif len(self._line) > 2 * self.num_waiting_flows + 16:
            self._line[:] = [one for one in self._line if one[1] == one[2].number]
            heapq.heapify(self._line)

    def offer(self, is_taken: Callable[[Ticket], bool], max_ahead: float, max_passed_over: int) -> int:
        """Offers tickets, the lowest start tag first, each again as long as its next input is taken: by `serve`,
        before `is_taken` returns. What is not taken lets others pass, until so many have; their number is returned.

        No flow passes others that are further behind it than by `max_ahead` over its weight: one of small inputs
        would otherwise have all the space that larger ones leave in batches, whatever its share.
        """
        line = self._line
        put_back: list[ClientFlow] = []
        places: dict[int, int] = {}
        num_passed_over, lowest = 0, math.inf  # the lowest tag of those that were passed over
        try:
            while line and num_passed_over < max_passed_over:
                tag, number, flow = heapq.heappop(line)
                if number != flow.number:
                    continue  # it left
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

    # ------------------------------------------------------------- what it will come to

    def expected(self, now_ns: int, within_ns: float) -> float:
        """What would come within so long, or until where one can see, at the rates of late; of all."""
        return float(self._expected(now_ns, within_ns).sum()) if self._rows else 0.0

    def _expected(self, now_ns: int, within_ns: float) -> np.ndarray:
        rows = slice(len(self._rows))
        age = np.exp((self._noted_ns[rows] - now_ns) / WINDOW_NS)
        return self._recent[rows] * age * (min(within_ns, HORIZON_NS) / WINDOW_NS)  # type: ignore[no-any-return]

    def size_ahead(
        self,
        client: str,
        size: float,
        pending: Mapping[str, float],
        weight_of: Callable[[str], float],
        until: tuple[int, float] | None,
    ) -> float:
        """What of this priority is served before a further request of the client would be done, as `FairQueue`'s."""
        flow = self._flows.get(client)
        own = pending.get(client, 0.0)
        start = self.virtual_time
        if flow is not None:
            own += float(self._waiting[flow.row])
            start = self._start_of(flow)
        if len(self._rows) == (flow is not None) and len(pending) == (client in pending):
            return own
        end = start + (own + size) / weight_of(client)
        rows = slice(len(self._rows))
        wanted, starts = self._waiting[rows], self._tags[rows]
        if until is not None:
            wanted = wanted + self._expected(*until)
        if until is not None or pending:
            starts = np.where(self._waiting[rows] > 0, starts, np.maximum(starts, self.virtual_time))
            wanted = wanted.copy()
        ahead = 0.0
        for name, coming_size in pending.items():
            if other := self._flows.get(name):
                wanted[other.row] += coming_size
            elif name != client:
                ahead += min(coming_size, max(end - self.virtual_time, 0.0) * weight_of(name))
        served = np.minimum(wanted, np.maximum(end - starts, 0.0) * self._weights[rows])
        if flow is not None:
            ahead -= float(served[flow.row])
        return own + ahead + float(served.sum())

    def _start_of(self, flow: ClientFlow) -> float:
        """Its start tag, or what that would be."""
        tag = float(self._tags[flow.row])
        return tag if flow.tickets else max(tag, self.virtual_time)

    # --------------------------------------------------------------------------- its clients

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
        """Looks at those that were not looked at for longest: two for each that comes, so that all come round."""
        for _ in range(2):
            flow = next(iter(self._flows.values()))
            is_old = now - self._noted_ns[flow.row] > FORGOTTEN_NS
            has_too_many = len(self._rows) - self.num_waiting_flows > MAX_IDLE_CLIENTS
            if flow.tickets or (is_old and not has_too_many and self._tags[flow.row] > self.virtual_time):
                self._flows.move_to_end(flow.client)
            elif is_old or has_too_many:
                self._forget(flow)
            else:
                break  # nor are the others old

    def _forget(self, flow: ClientFlow) -> None:
        del self._flows[flow.client]
        last = self._rows.pop()
        if last is not flow:
            self._columns[:, flow.row] = self._columns[:, last.row]
            self._rows[flow.row] = last
            last.row = flow.row

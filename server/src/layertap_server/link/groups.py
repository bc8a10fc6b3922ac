"""Requests of one front that came together and are alike: the scheduler serves each group as one ticket.

Most of what a ticket costs does not depend on its number of inputs. With one text in each request, groups
halve the CPU time of the engine process for a text (`make bench-fronts`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from layertap_server.engine_host import EngineHost, as_request_error
from layertap_server.errors import RequestError
from layertap_server.plan import Outputs, Work
from layertap_server.scheduling.admission import ClosedError, RefusedError
from layertap_server.scheduling.fair_queue import Priority, Ticket
from layertap_server.scheduling.scheduler import DeadlinePassedError

# A group is answered as a whole, so it is small in comparison with a batch of a GPU.
MAX_INPUTS = 16
# Deadlines that differ by at most this share of the time left count as the same; the group has the earliest.
DEADLINE_SHARE = 1 / 64


@dataclass(slots=True, eq=False)
class Request:
    """A request of a front, with the bytes that are reserved for its results."""

    number: int
    works: Sequence[Work]
    priority: Priority
    deadline_ns: int | None
    client: str
    depth: float
    num_bytes: int
    group: Group | None = None


# Told the outputs of a request and its ticket, or its error.
Answered = Callable[[Request, Sequence[Outputs | None], Ticket], None]
Failed = Callable[[Request, RequestError], None]


@dataclass(slots=True, eq=False)
class Group:
    """Requests that are one ticket. Used on the event loop."""

    host: EngineHost
    answered: Answered
    failed: Failed
    # In the order of the ticket's works; those that were cancelled stay here, and are no longer in `owners`.
    requests: Sequence[Request]
    owners: set[Request] = field(init=False)
    ticket: Ticket | None = None

    def __post_init__(self) -> None:
        self.owners = set(self.requests)

    def submit(self) -> None:
        """Queues the requests as one ticket. If it is refused, each is submitted by itself: a smaller one may
        be admitted."""
        first = self.requests[0]
        works: Sequence[Work] = first.works
        deadline_ns = first.deadline_ns
        if len(self.requests) > 1:
            works = [work for one in self.requests for work in one.works]
            if deadline_ns is not None:
                deadline_ns = min([one.deadline_ns for one in self.requests if one.deadline_ns is not None])
        for one in self.requests:
            one.group = self
        try:
            self.ticket = self.host.submit(
                works, first.priority, deadline_ns, first.client, self._settled, len(self.requests)
            )
        except RefusedError as refused:
            self._let_go()
            self._fail(refused, is_of_all=False)

    def cancel(self, one: Request) -> None:
        """Drops a request. Its works are dropped if the group has no other."""
        self.owners.discard(one)
        if self.ticket is None:
            return
        if self.owners:
            self.host.scheduler.leave(self.ticket)
        else:
            self.host.cancel(self.ticket)
            self._let_go()

    def _let_go(self) -> None:
        """Requests and group refer to each other: the ticket, with its outputs, would stay in memory until
        Python looks for garbage, which is seldom."""
        self.ticket = None
        for one in self.requests:
            if one.group is self:
                one.group = None

    def _settled(self, ticket: Ticket) -> None:
        self._let_go()
        if ticket.error is not None:
            is_of_all = isinstance(ticket.error, ClosedError | DeadlinePassedError)
            self._fail(ticket.error, is_of_all=is_of_all)
            return
        begin = 0
        for one in self.requests:
            end = begin + len(one.works)
            if one in self.owners:
                self.answered(one, ticket.outputs[begin:end], ticket)
            begin = end

    def _fail(self, error: BaseException, *, is_of_all: bool) -> None:
        """Fails the request. Of several, each is submitted again by itself, unless the error concerns all:
        one of them may be the cause."""
        left = [one for one in self.requests if one in self.owners]
        for one in left:
            if len(self.requests) == 1 or is_of_all:
                self.failed(one, as_request_error(error))
            else:
                Group(self.host, self.answered, self.failed, [one]).submit()


def grouped(requests: Iterable[Request], now_ns: int) -> Iterator[list[Request]]:
    """The requests to one model in groups, each in its order."""
    by_kind: dict[Hashable, list[Request]] = {}
    num_inputs: dict[Hashable, int] = {}
    for one in requests:
        kind = one.priority, one.client, one.depth, one.deadline_ns is None
        group, more = by_kind.get(kind), len(one.works)
        if group is not None and num_inputs[kind] + more <= MAX_INPUTS and is_due_with(group, one, now_ns):
            group.append(one)
            num_inputs[kind] += more
            continue
        if group is not None:
            yield group
        by_kind[kind], num_inputs[kind] = [one], more
    yield from by_kind.values()


def is_due_with(group: Sequence[Request], one: Request, now_ns: int) -> bool:
    if one.deadline_ns is None:
        return True
    first_ns = group[0].deadline_ns or 0
    return abs(one.deadline_ns - first_ns) <= DEADLINE_SHARE * (first_ns - now_ns)

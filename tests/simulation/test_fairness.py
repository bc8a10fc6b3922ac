"""Fair shares over any mix of callers: those who wait for each answer, and those who have many requests under way."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from drawings import drawings
from layertap_server.scheduling.fair_queue import FairQueue, Priority, Ticket, Unit

from .simulator import NUM_LAYERS, SECOND, Call, Cores, Simulation
from .traces import TRUTH

Key = tuple[Priority, str]


@dataclass(frozen=True, slots=True)
class Caller:
    """Of one client: so many requests are under way all the time, each followed by the next one once answered."""

    client: str
    num_under_way: int
    sizes: tuple[int, ...]  # of its inputs, one of them at a time
    num_inputs: int = 1
    priority: Priority = Priority.NORMAL
    layers: int = NUM_LAYERS
    # The time from an answer to the next request.
    pause_ns: int = 0

    @property
    def key(self) -> Key:
        return self.priority, self.client


@dataclass(slots=True)
class Watched(FairQueue):
    """Counts what each client is served, over its weight, and holds against it what others get while it waits."""

    served: Counter[Key] = field(default_factory=Counter)
    # The largest input of each client, divided by its weight.
    largest: Counter[Key] = field(default_factory=Counter)
    batch_size: float = 0.0
    # The number of batches with inputs of a priority, and of those that left inputs of a client in the queue.
    num_takes: Counter[Priority] = field(default_factory=Counter)
    num_waits: Counter[Key] = field(default_factory=Counter)
    # What all clients had been served when this one began to wait.
    _at_first: dict[Key, Counter[Key]] = field(default_factory=dict)
    # The largest lead of a client over one that waited meanwhile, as a multiple of the allowed lead.
    worst: float = 0.0

    def take(self, now: int, *args: Any, **kwargs: Any) -> list[Unit]:
        waiting = {(ticket.priority, ticket.client) for ticket in self}
        for one in waiting - self._at_first.keys():
            self._at_first[one] = self.served.copy()
        # mypy and slots: `super()` without arguments is another class here.
        units = FairQueue.take(self, now, *args, **kwargs)
        for unit in units:
            self._note_served(unit)
        for priority in {unit.ticket.priority for unit in units}:
            self.num_takes[priority] += 1
        self._compare(waiting)
        still_waiting = {(ticket.priority, ticket.client) for ticket in self}
        self.num_waits.update(
            one for one in still_waiting if any(one[0] == unit.ticket.priority for unit in units)
        )
        self._at_first = {one: at for one, at in self._at_first.items() if one in still_waiting}
        return units

    def _note_served(self, unit: Unit) -> None:
        ticket: Ticket = unit.ticket
        key = ticket.priority, ticket.client
        size = unit.work.num_tokens * ticket.token_cost / self._weight(ticket.client)
        self.served[key] += size  # type: ignore[assignment]
        self.largest[key] = max(self.largest[key], size)  # type: ignore[assignment]

    def _compare(self, waiting: set[Key]) -> None:
        for one in waiting:
            at_first = self._at_first[one]
            own = self.served[one] - at_first[one]
            for other, served in self.served.items():
                if other != one and other[0] == one[0]:
                    more = served - at_first[other] - own
                    of_batches = self.batch_size / self._weight(other[1])
                    self.worst = max(
                        self.worst, more / (of_batches + self.largest[one] + self.largest[other])
                    )


def run(kind: type[Simulation], callers: list[Caller], num_batches: int, **fields: Any) -> Watched:
    weights = fields.pop("weights", {})
    simulation = kind([], TRUTH, max_queue_tokens=1 << 22, is_checked=False, **fields)
    scheduler, chance = simulation.scheduler, random.Random(0)
    queue = scheduler.admission.queue = Watched(weights, batch_size=simulation.max_batch_tokens)
    deliver, callers_of = scheduler.deliver, {}

    def ask(caller: Caller) -> None:
        sizes = tuple(chance.choice(caller.sizes) for _ in range(caller.num_inputs))
        call = Call(simulation.now, sizes, caller.client, caller.priority, layers=caller.layers)
        simulation._submit(call)
        callers_of[call.ticket] = caller

    def answer(tickets: list[Ticket]) -> None:
        deliver(tickets)
        for ticket in tickets:
            caller = callers_of.pop(ticket)
            simulation._at(simulation.now + caller.pause_ns, lambda caller=caller: ask(caller))  # type: ignore[misc]

    scheduler.deliver = answer
    for caller in callers:
        for _ in range(caller.num_under_way):
            simulation._at(chance.randrange(SECOND // 4), lambda caller=caller: ask(caller))  # type: ignore[misc]
    while sum(queue.num_takes.values()) < num_batches:
        if not simulation.step():
            simulation._advance(simulation._events[0][0])
    return queue


def draw_callers(chance: random.Random, max_batch_tokens: int) -> list[Caller]:
    callers = []
    for number in range(chance.randint(2, 6)):
        largest = min(int(2 ** chance.uniform(2, 10)), 2 * max_batch_tokens)
        callers.append(
            Caller(
                client=str(number),
                num_under_way=chance.choice((1, 1, 2, 3, 8, 60)),
                sizes=(largest,) if chance.random() < 0.5 else (max(largest // 4, 1), largest),
                num_inputs=chance.choice((1, 1, 1, 5)),
                priority=chance.choice((Priority.NORMAL, Priority.NORMAL, Priority.NORMAL, Priority.HIGH)),
                layers=chance.choice((1, NUM_LAYERS, NUM_LAYERS, NUM_LAYERS)),
                pause_ns=chance.choice((0, 0, SECOND // 1000, SECOND // 50)),
            )
        )
    return callers


def shares_are_fair(queue: Watched) -> None:
    """Who had something left waiting by each batch got as much as anyone, within 10 %."""
    for one, num_waits in queue.num_waits.items():
        if num_waits < queue.num_takes[one[0]] or queue.num_takes[one[0]] < 50:
            continue
        others = [other for other in queue.served if other[0] == one[0]]
        allowed = max(queue.largest[other] for other in others) + queue.batch_size
        most = max(queue.served[other] for other in others)
        assert queue.served[one] >= most / 1.1 - allowed, (one, queue.served)


@settings(max_examples=drawings(20), deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    max_batch_tokens=st.sampled_from((64, 256, 2048)),
    kind=st.sampled_from((Simulation, Cores)),
    has_weights=st.booleans(),
)
def test_shares_are_fair_in_any_mix(
    seed: int, max_batch_tokens: int, kind: type[Simulation], has_weights: bool
) -> None:
    """At any time: since it began to wait, none has got more than three batches less than another."""
    chance = random.Random(seed)
    callers = draw_callers(chance, max_batch_tokens)
    weights = {one.client: chance.choice((0.5, 1.0, 1.0, 4.0)) for one in callers} if has_weights else {}
    queue = run(kind, callers, 300, max_batch_tokens=max_batch_tokens, weights=weights)
    assert queue.worst < 3, (queue.worst, callers, weights)
    shares_are_fair(queue)


@pytest.mark.parametrize("num_callers", [1, 2, 3])
@pytest.mark.parametrize("kind", [Simulation, Cores])
def test_long_texts_one_by_one_leave_a_backlog_its_share(kind: type[Simulation], num_callers: int) -> None:
    """Whose flow is empty at each batch is not first again."""
    callers = [Caller("long", num_callers, (300,)), Caller("short", 200, (16,))]
    queue = run(kind, callers, 500, max_batch_tokens=256)
    long, short = (queue.served[one.key] for one in callers)
    assert short / (long + short) > 0.45
    if num_callers == 3:  # otherwise it may have nothing in the queue when a batch is formed
        assert short / (long + short) < 0.55

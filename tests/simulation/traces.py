"""Arrivals: Poisson, bursts, a slow giant among the small, deadline mixes, cancel storms."""

from __future__ import annotations

import random
from collections.abc import Iterator

from layertap_server.scheduling.cost_model import CostModel
from layertap_server.scheduling.fair_queue import Priority

from .simulator import SECOND, Call, capacity

# About MiniLM on two CPU cores.
TRUTH = CostModel(fixed_ns=2e6, per_token_ns=6e4)
MEAN_TOKENS = 40


def text(chance: random.Random) -> int:
    """Tokens of a natural text: the median is 27, the mean 40, and a tail goes to the model's limit."""
    return min(max(int(chance.lognormvariate(3.3, 0.9)), 2), 512)


def poisson(chance: random.Random, load: float, seconds: float, **fields: object) -> list[Call]:
    """Single texts at `load` times what full batches can bear."""
    gap_ns = MEAN_TOKENS / (load * capacity(TRUTH, 512)) * SECOND
    at_ns, calls = 0.0, []
    while (at_ns := at_ns + chance.expovariate(1 / gap_ns)) < seconds * SECOND:
        calls.append(Call(int(at_ns), (text(chance),), **fields))  # type: ignore[arg-type]
    return calls


def bursts(chance: random.Random, seconds: float, **fields: object) -> list[Call]:
    """A hundred texts at once, now and then."""
    calls = []
    for _ in range(int(seconds * 2)):
        at_ns = int(chance.uniform(0, seconds) * SECOND)
        calls += [Call(at_ns, (text(chance),), **fields) for _ in range(100)]  # type: ignore[arg-type]
    return calls


def giants(chance: random.Random, num_inputs: int, client: str = "giant", per_call: int = 1000) -> list[Call]:
    """One caller's many inputs, all asked at the start."""
    return [
        Call(0, tuple(text(chance) for _ in range(min(per_call, num_inputs - begun))), client)
        for begun in range(0, num_inputs, per_call)
    ]


def mixed(chance: random.Random, load: float, seconds: float) -> Iterator[Call]:
    """Any mix: clients, priorities, deadlines, depths, sizes, and callers who leave."""
    for call in poisson(chance, load, seconds) + bursts(chance, seconds / 4):
        call.client = chance.choice(("a", "a", "a", "b", "c"))
        call.priority = chance.choice((Priority.LOW, Priority.NORMAL, Priority.NORMAL, Priority.HIGH))
        call.layers = chance.choice((1, 3, 6, 6))
        if chance.random() < 0.1:
            call.sizes = tuple(text(chance) for _ in range(chance.randint(2, 60)))
        if chance.random() < 0.5:
            call.timeout_ns = int(chance.uniform(0.001, 2) * SECOND)
        if chance.random() < 0.2:
            call.patience_ns = int(chance.expovariate(10) * SECOND)
        yield call


def many_clients(chance: random.Random, calls: list[Call]) -> None:
    """Sixteen, who call equally often."""
    for call in calls:
        call.client = str(chance.randrange(16))


def unequal_clients(chance: random.Random, calls: list[Call]) -> None:
    """The first of them calls for a quarter, the last of them hardly ever."""
    for call in calls:
        call.client = str(int(chance.expovariate(0.3)))


def priorities(chance: random.Random, calls: list[Call]) -> None:
    """One client's, with deadlines from 0.3 to 3 seconds."""
    for call in calls:
        call.priority = chance.choice((Priority.LOW, Priority.NORMAL, Priority.NORMAL, Priority.HIGH))
        call.timeout_ns = int(chance.choice((0.3, 1.0, 1.0, 3.0)) * SECOND)

"""`python -m tests.simulation`: goodput and latency of some traces, by load and callers."""

from __future__ import annotations

import random

from .simulator import SECOND, Call, Simulation, capacity, goodput, percentile
from .traces import TRUTH, many_clients, poisson, priorities, unequal_clients

SECONDS = 20


def main() -> None:
    chance = random.Random(0)

    def noise() -> float:
        return chance.uniform(0.8, 1.2)

    print("load  callers           goodput/capacity  refused  in time of accepted  p50 ms  p99 ms  idle")
    cases = [(load, one_client) for load in (0.3, 0.6, 0.9, 1.0, 1.5, 3.0, 6.0)]
    cases += [(load, part) for part in (many_clients, unequal_clients, priorities) for load in (1.5, 3.0)]
    for load, part in cases:
        calls = poisson(random.Random(0), load, SECONDS, timeout_ns=SECOND)
        part(random.Random(0), calls)
        simulation = Simulation(calls, TRUTH, noise=noise, is_checked=False).to_the_end()
        accepted = [call for call in calls if call.outcome != "refused"]
        print(
            f"{load:4.1f}  {part.__name__.replace('_', ' '):16}"
            f"  {goodput(calls, SECOND, SECONDS * SECOND) / capacity(TRUTH, 512):16.2f}"
            f"  {1 - len(accepted) / len(calls):7.1%}"
            f"  {sum(call.is_good for call in accepted) / len(accepted):19.2%}"
            f"  {percentile(calls, 0.5):6.0f}  {percentile(calls, 0.99):6.0f}"
            f"  {1 - simulation.busy_ns / simulation.now:4.0%}"
        )


def one_client(chance: random.Random, calls: list[Call]) -> None:
    """As they are."""


main()

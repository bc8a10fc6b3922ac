"""The section of `bench.scheduler` on load above capacity: goodput, deadlines, and the cost of rejecting
calls."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.report import Row
from bench.scheduler_common import REFUSED, TIMEOUT_S, Bench, Calls, percentile

# The number of short loads, each of which is compared with the capacity before and after it.
NUM_PARTS = 6
NUM_CLIENTS = 16


def overload(bench: Bench) -> Iterator[Row]:
    with bench.serving("real", "float32") as (server, address):
        storms = Storms(bench, address)
        storms.closed_loop(1280)
        for times in (1.5, 3.0):
            calm = statistics.median(bench.load(address, first=0, count=50, among=1).took())
            full = storms.closed_loop(1280)
            before = server.ask("state")
            storm = storms.open_loop(times, full, bench.open_s)
            after = server.ask("state")
            probes = bench.load(address, first=0, count=200, among=1)
            yield from storm_rows(f"{times:g} times capacity", storm, bench.open_s)
            growth = after["resident_bytes"] / before["resident_bytes"]
            yield Row("  resident memory after, of before", growth, "at most 1.03", growth <= 1.03)
            recovered_s = recovery(probes, calm)
            yield Row("  recovered after, s", recovered_s, "at most 1", recovered_s <= 1)
            spent = (after["cpu_s"] - before["cpu_s"]) / (after["at_s"] - before["at_s"])
            yield Row("  the server's CPU meanwhile, in cores", spent)
            parts = storms.in_parts(times)
            capacity = statistics.median([capacity_of(full), *parts.capacities])
            whole = steady_rate(storm, bench.open_s) / (capacity * storm.left)
            yield Row("  goodput of that minute, of capacity then and later", whole)
            yield from parts.rows("  the same in parts, each of capacity just before and after")
        yield from storms.in_parts(3.0, NUM_CLIENTS).rows(f"3 times capacity, from {NUM_CLIENTS} clients")


@dataclass(frozen=True, slots=True)
class Parts:
    """The results of loads above capacity, and the machine's capacity before, between and after them, in
    characters/s."""

    calls: Sequence[Calls]
    seconds: float
    capacities: Sequence[float]

    def rows(self, name: str) -> Iterator[Row]:
        goodputs = [
            steady_rate(calls, self.seconds) / (statistics.mean(beside) * calls.left)
            for calls, *beside in zip(self.calls, self.capacities, self.capacities[1:], strict=False)
        ]
        goodput = statistics.median(goodputs)
        yield Row(name, goodput, "at least 0.9", goodput >= 0.9)
        in_time = statistics.mean(in_time_of(calls) for calls in self.calls)
        yield Row("  in time, of the accepted", in_time, "at least 0.99", in_time >= 0.99)
        yield Row("  capacity, most over least", max(self.capacities) / min(self.capacities))


@dataclass(frozen=True, slots=True)
class Storms:
    bench: Bench
    address: str

    def closed_loop(self, count: int) -> Calls:
        return self.bench.load(self.address, callers=64, first=640, count=count)

    def open_loop(self, times: float, full: Calls, seconds: float, num_clients: int = 1) -> Calls:
        """A load at this multiple of the rate that a closed loop reached."""
        rate = times * full.rate / full.left / num_clients
        names = [f"client {number}" for number in range(num_clients)] if num_clients > 1 else [""]
        loads = (
            {"address": self.address, "client": name, "first": 2000 + 500 * number, "rate": rate}
            for number, name in enumerate(names)
        )
        calls = self.bench.loads(*({"seconds": seconds, "timeout_s": TIMEOUT_S} | load for load in loads))
        return Calls([call for one in calls for call in one.calls], calls[0].generator)

    def in_parts(self, times: float, num_clients: int = 1) -> Parts:
        """Short loads, alternating with measurements of the capacity: the machine's speed changes within a
        minute."""
        seconds = self.bench.open_s / NUM_PARTS
        beside, calls = [self.closed_loop(640)], []
        for _ in range(NUM_PARTS):
            calls.append(self.open_loop(times, beside[-1], seconds, num_clients))
            beside.append(self.closed_loop(640))
        return Parts(calls, seconds, [capacity_of(one) for one in beside])


def capacity_of(full: Calls) -> float:
    """Characters/s of a closed loop, corrected for the generator's CPU time."""
    return full.chars / full.seconds / full.left


def steady_rate(storm: Calls, seconds: float) -> float:
    """Characters/s answered from the time when the queue is full until the load ends, so that the queue has
    the same size at both ends."""
    first = min(TIMEOUT_S, seconds / 2)
    answered = (
        chars for begun, took, status, chars in storm.calls if not status and first <= begun + took < seconds
    )
    return sum(answered) / (seconds - first)


def storm_rows(name: str, storm: Calls, seconds: float) -> Iterator[Row]:
    num_refused, in_time = storm.statuses[REFUSED], in_time_of(storm)
    yield Row(f"{name}: in time, of the accepted", in_time, "at least 0.99", in_time >= 0.99)
    refusal_ms = percentile(storm.took(REFUSED), 0.5) * 1e3
    yield Row("  a refusal, median ms", refusal_ms, "at most 10", refusal_ms <= 10)
    yield Row("  refused, of all", num_refused / len(storm.calls))
    yield Row("  refused a second", num_refused / seconds)
    yield Row("  the generator's CPU, in cores", storm.generator)


def in_time_of(storm: Calls) -> float:
    """The share of accepted calls that were answered before their deadline."""
    return storm.statuses[0] / (len(storm.calls) - storm.statuses[REFUSED])


def recovery(probes: Calls, calm_s: float, in_a_row: int = 5) -> float:
    """Seconds until consecutive calls take at most twice their time without load."""
    good = 0
    for begun, took, status, _ in probes.calls:
        good = good + 1 if not status and took <= 2 * calm_s else 0
        if good == in_a_row:
            return begun
    return float("inf")

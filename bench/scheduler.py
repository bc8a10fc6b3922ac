"""Benchmark of the scheduler on the real server: latency and throughput for one caller, many, and above
capacity.

The server, the load generator and the servers for comparison are separate processes on this machine. Every
row is a ratio or a time of measurements in this run. The load generator uses the same cores; its share is
shown, and is subtracted from the capacity in the rows that say so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import click

from bench.bench import REPORTS, in_process
from bench.corpus import read_texts
from bench.report import Row, save, show_machine
from bench.scheduler_common import LOG, REFUSED, TIMEOUT_S, Bench, Calls, generating, percentile
from bench.scheduler_overload import overload
from bench.scheduler_server import POISON

REPORT = REPORTS / "scheduler.json"
CALLERS = (2, 4, 8, 16, 32, 64, 128)
# The usual difference of two measurements of the same thing.
NOISE = 0.04
VECTOR_BYTES = 384 * 4 + 60


# -------------------------------------------------------------------- one caller and many callers


def one_caller(bench: Bench) -> Iterator[Row]:
    for dtype, most in (("float32", 0.75), ("bfloat16", 1.1)):
        served, local = [], []
        with bench.serving("real", dtype) as (_, address), in_process(bench.source, "cpu", dtype) as run:
            num_texts = 20
            for number in range(bench.rounds + 1):
                first = number * num_texts
                calls = bench.load(address, first=first, count=num_texts)
                alone = [run("padded", [text]).seconds for text in bench.texts[first : first + num_texts]]
                if number:
                    served += calls.took()
                    local += alone
        ratio = statistics.median(served) / statistics.median(local)
        yield Row(f"one caller, {dtype}: p50 over transformers'", ratio, f"at most {most}", ratio <= most)


def many_callers(bench: Bench) -> Iterator[Row]:
    rates: dict[int, list[float]] = {callers: [] for callers in CALLERS}
    of_engine, generators = [], []
    with bench.serving("real", "float32") as (_, address), in_process(bench.source, "cpu", "float32") as run:
        for number in range(bench.rounds + 1):
            first, count = number * 1280, 1280
            engine = run("packed", bench.texts[first : first + count])
            for callers in CALLERS:
                # With 64 callers, the texts of the engine's measurement; otherwise the same texts for each
                # number of callers.
                calls = bench.load(
                    address, callers=callers, first=first, count=count if callers == 64 else count // 2
                )
                if number:
                    rates[callers].append(calls.chars / calls.seconds)
                if number and callers == 64:
                    of_engine.append(engine.seconds / calls.seconds / calls.left)
                    generators.append(calls.generator)
    medians = [statistics.median(rates[callers]) for callers in CALLERS]
    click.echo(
        "characters/s by callers: "
        + "  ".join(f"{callers}: {rate:.0f}" for callers, rate in zip(CALLERS, medians, strict=True))
    )
    yield never_falls("2 to 128 callers", medians)
    ratio = statistics.median(of_engine)
    yield Row("64 callers: rate of the packed engine's, generator apart", ratio, "at least 0.9", ratio >= 0.9)
    yield Row("  the generator's CPU meanwhile, in cores", statistics.median(generators))


def never_falls(what: str, rates: Sequence[float]) -> Row:
    """The row for rates by the number of callers, in ascending order."""
    worst = min(rate / best for rate, best in zip(rates[1:], accumulate(rates, max), strict=False))
    return Row(f"{what}: least rate, of the best with fewer", worst, "at least 1 - noise", worst >= 1 - NOISE)


def front(bench: Bench) -> Iterator[Row]:
    """A server with an engine that takes no time, against a `grpc.aio` server that only echoes."""
    rates: dict[str, list[float]] = {"instant": [], "echo": [], "ours": []}
    cpu: dict[str, list[float]] = {"instant": [], "echo": [], "ours": [], "refusal": []}
    with (
        bench.serving("instant") as (instant, instant_address),
        bench.echoing(str(VECTOR_BYTES)) as echo,
        bench.echoing(str(VECTOR_BYTES), "ours") as ours,
    ):
        sides = {"echo": echo, "instant": (instant, instant_address), "ours": ours}
        for number in range(bench.rounds + 1):
            for name, (server, address) in sides.items():
                before = server.ask("state")
                calls = bench.load(address, callers=32, count=4000, among=500)
                assert set(calls.statuses) == {0}
                if number:
                    rates[name].append(calls.rate)
                    cpu[name].append((server.ask("state")["cpu_s"] - before["cpu_s"]) / len(calls.calls))
        by_callers: dict[int, list[float]] = {callers: [] for callers in CALLERS}
        for number in range(bench.rounds + 1):
            for callers in CALLERS:
                calls = bench.load(
                    instant_address, callers=callers, count=min(3000, 500 * callers), among=500
                )
                if number:
                    by_callers[callers].append(calls.rate)
        # While held, the engine has a predicted backlog of an hour, so that every deadline is unreachable.
        instant.ask("hold")
        for number in range(bench.rounds + 1):
            before = instant.ask("state")
            calls = bench.load(instant_address, callers=32, count=3000, among=500, timeout_s=TIMEOUT_S)
            assert set(calls.statuses) == {REFUSED}
            if number:
                cpu["refusal"].append((instant.ask("state")["cpu_s"] - before["cpu_s"]) / len(calls.calls))
        instant.ask("go")
    ratio = statistics.median(rates["instant"]) / statistics.median(rates["echo"])
    costs = {name: statistics.median(seconds) for name, seconds in cpu.items()}
    yield Row("no engine: unary calls/s of a bare echo's", ratio, "at least 0.7", ratio >= 0.7)
    medians = [statistics.median(seen) for seen in by_callers.values()]
    click.echo(
        "calls/s by callers: " + "  ".join(f"{n}: {r:.0f}" for n, r in zip(CALLERS, medians, strict=True))
    )
    yield never_falls("  the same at 2 to 128 callers", medians)
    yield Row("  an answer's server CPU, of an echo's", costs["instant"] / costs["echo"])
    ratio = costs["refusal"] / costs["echo"]
    yield Row("a refusal's server CPU, of an echo's", ratio, "at most 2", ratio <= 2)
    yield Row("  an echo's server CPU, µs", costs["echo"] * 1e6)
    yield Row(
        "  an echo's on the server of calls that ours is built on, of that", costs["ours"] / costs["echo"]
    )


# -------------------------------------- very large requests, cancelled calls and poisoned inputs


def giant(bench: Bench) -> Iterator[Row]:
    """One caller queues all its inputs at once, while another sends one text at a time."""

    def many(num_inputs: int) -> dict[str, Any]:
        # Without deadlines, so that none of these calls is rejected.
        load = {"client": "giant", "callers": 10, "per_call": num_inputs // 10, "count": num_inputs}
        return load | {"address": address, "timeout_s": 600.0}

    def seconds(calls: Calls) -> float:
        assert set(calls.statuses) == {0}
        return calls.seconds

    few = {"client": "small", "pause_s": 0.05, "among": 100}
    alone_s, beside_s = [], []
    with bench.serving("real", "float32") as (server, address):
        few["address"] = address
        bench.load(address, callers=64, first=0, count=640)
        [small_alone] = bench.loads(few | {"count": 200})
        _, small_beside = bench.loads(many(bench.num_inputs), few)
        state = server.ask("state")
        # The machine's speed changes within half a minute: measurements that are compared are short, and
        # alternate.
        part = many(bench.num_inputs // 5)
        for _ in range(bench.rounds):
            alone_s.append(seconds(*bench.loads(part)))
            beside_s += [seconds(bench.loads(part, few)[0]) for _ in range(2)]
            alone_s.append(seconds(*bench.loads(part)))
    extra = (percentile(small_beside.took(), 0.99) - percentile(small_alone.took(), 0.99)) / state["batch_s"]
    yield Row(
        f"one text beside {bench.num_inputs} inputs: p99 more, in batches", extra, "at most 2", extra <= 2
    )
    kept = statistics.median(alone_s) / statistics.median(beside_s)
    yield Row("  the giant's throughput, of it alone", kept, "at least 0.9", kept >= 0.9)


def cancels(bench: Bench) -> Iterator[Row]:
    checked = {"among": 64, "is_checked": True}
    with bench.serving("real", "float32") as (server, address):
        bench.load(address, callers=64, first=0, count=640)
        before = server.ask("state")
        bench.load(address, **checked, count=64)
        leaving, staying = bench.loads(
            {"address": address, "callers": 64, "first": 0, "count": bench.num_cancels, "leaves_s": 0.1},
            {"address": address, "callers": 4} | checked,
        )
        deadline = time.monotonic() + 5
        while held(after := server.ask("state")) and time.monotonic() < deadline:
            time.sleep(0.05)
    left = leaving.statuses[1]
    ran = after["dropped"].get("cancelled running", 0) + after["dropped"].get("cancelled sending", 0)
    leaked = sum(map(abs, held(after))) + max(after["num_tasks"] - before["num_tasks"], 0)
    wrong = sum(count for status, count in staying.statuses.items() if status)
    yield Row(f"{left} calls cancelled: tokens, bytes and tasks left", leaked, "0", leaked == 0)
    yield Row(f"  wrong, of {len(staying.calls)} answers beside them", wrong, "0", wrong == 0)
    yield Row("  never computed, of those that were cancelled", 1 - ran / left)


def held(state: dict[str, Any]) -> tuple[int, ...]:
    return tuple(value for value in (state["queued_tokens"], state["held_bytes"]) if value)


def poison(bench: Bench) -> Iterator[Row]:
    load = {"first": bench.poisoned, "among": 500, "is_checked": True, "poison": POISON}
    with bench.serving("real", "float32") as (server, address):
        server.ask("poison")
        alone = bench.load(address, **load, count=500)
        calls = bench.load(address, **load, callers=32, count=2000)
    wrong = sum(count for status, count in (alone.statuses + calls.statuses).items() if status)
    yield Row(f"1 % poisoned: wrong, of {len(calls.calls)} answers", wrong, "0", wrong == 0)


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "one": one_caller,
    "many": many_callers,
    "front": front,
    "overload": overload,
    "giant": giant,
    "cancels": cancels,
    "poison": poison,
}


@click.command()
@click.option("--only", default=",".join(SECTIONS), show_default=True, help="Sections to run.")
@click.option("--rounds", default=3, show_default=True, help="Rounds, after a warm-up round.")
@click.option("--open-s", default=60.0, show_default=True, help="Seconds of each load above capacity.")
@click.option(
    "--inputs", "num_inputs", default=10_000, show_default=True, help="Inputs of the very large request."
)
@click.option("--cancels", "num_cancels", default=10_000, show_default=True, help="Calls that are cancelled.")
@click.option(
    "--quick",
    is_flag=True,
    help="Run a tenth of each section, in a minute or two; the numbers are not reliable.",
)
def main(only: str, rounds: int, open_s: float, num_inputs: int, num_cancels: int, quick: bool) -> None:
    """Measure the scheduler's targets on the real server with the default model."""
    if unknown := set(only.split(",")) - set(SECTIONS):
        raise click.ClickException(
            f"unknown section {', '.join(unknown)}; known sections are {', '.join(SECTIONS)}"
        )
    if quick:
        rounds, open_s, num_inputs, num_cancels = 1, open_s / 10, num_inputs // 10, num_cancels // 10
    show_machine()
    texts = read_texts()
    poisoned = [f"{POISON} {text}" if number % 100 == 0 else text for number, text in enumerate(texts[:500])]
    REPORTS.mkdir(parents=True, exist_ok=True)
    LOG.unlink(missing_ok=True)
    rows: list[Row] = []
    with generating([*texts, *poisoned], rounds=rounds, open_s=open_s) as bench:
        bench = replace(
            bench, texts=texts, num_inputs=num_inputs, num_cancels=num_cancels, poisoned=len(texts)
        )
        for section in only.split(","):
            for row in SECTIONS[section](bench):
                row.show()
                rows.append(row)
    save(rows, REPORT)


if __name__ == "__main__":
    main()

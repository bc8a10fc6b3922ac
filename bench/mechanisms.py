"""Benchmark: what single mechanisms of the server bring, each turned off and on in turns in one run.

A mechanism stays in the code if its own figure is at least 5 % better with it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import click
import uvloop

from bench.bench import REPORTS
from bench.corpus import read_texts
from bench.report import Row, save, show_machine
from bench.scheduler_common import LOG, REFUSED, TIMEOUT_S, Bench, Talker, generating, talker
from bench.scheduler_overload import NUM_CLIENTS, Storms, capacity_of, in_time_of, steady_rate
from bench.scheduler_server import serve_layertap
from layertap_server import app
from layertap_server.api.early_rejection import EarlyRejection

REPORT = REPORTS / "mechanisms.json"
STORM_S = 10.0
TIMES = 3.0


def no_cached_rejection() -> None:
    EarlyRejection._cached_for = lambda self, asked, call: None  # type: ignore[method-assign]


def no_early_rejection() -> None:
    EarlyRejection.__call__ = lambda self, data, call: None  # type: ignore[method-assign]


def stock_server() -> None:
    create_server = app.create_server
    app.create_server = lambda kind, *rest: create_server("stock", *rest)


Ways = dict[str, Callable[[], None]]
OFF: Ways = {
    "all on": lambda: None,
    "without cached rejections": no_cached_rejection,
    "without any early rejection": no_early_rejection,
}


def servers(stack: ExitStack, names: Sequence[str], *kind: str) -> dict[str, tuple[Talker, str]]:
    """One server for each; they are idle but for the one that is measured."""
    found = {}
    for name in names:
        server = stack.enter_context(talker("bench.mechanisms", "--serve", name, *kind))
        found[name] = server, server.read()
    return found


def storms(bench: Bench, num_clients: int) -> Iterator[Row]:
    """Goodput at three times capacity, of the capacity just before and after."""
    goodputs: dict[str, list[float]] = {name: [] for name in OFF}
    in_time: dict[str, list[float]] = {name: [] for name in OFF}
    with ExitStack() as stack:
        sides = servers(stack, tuple(OFF), "real", "float32")
        for number in range(bench.rounds + 1):
            for name, (_, address) in sides.items():
                side = Storms(bench, address)
                before = side.closed_loop(640)
                storm = side.open_loop(TIMES, before, bench.open_s, num_clients)
                capacity = statistics.mean([capacity_of(before), capacity_of(side.closed_loop(640))])
                if number:
                    goodputs[name].append(steady_rate(storm, bench.open_s) / (capacity * storm.left))
                    in_time[name].append(in_time_of(storm))
    for name in OFF:
        click.echo(f"{name}: " + " ".join(f"{one:.3f}" for one in goodputs[name]))
        what = f"3 times capacity, {num_clients} clients, {name}"
        yield Row(f"{what}: goodput", statistics.median(goodputs[name]))
        yield Row("  in time, of the accepted", statistics.mean(in_time[name]))


def refusals(bench: Bench) -> Iterator[Row]:
    """Server CPU of a refusal, with an engine that is an hour behind."""
    cpu: dict[str, list[float]] = {name: [] for name in OFF}
    with ExitStack() as stack:
        sides = servers(stack, tuple(OFF), "instant")
        for server, _ in sides.values():
            server.ask("hold")
        for number in range(bench.rounds + 1):
            for name, (server, address) in sides.items():
                before = server.ask("state")
                calls = bench.load(address, callers=32, count=3000, among=500, timeout_s=TIMEOUT_S)
                assert set(calls.statuses) == {REFUSED}
                if number:
                    cpu[name].append((server.ask("state")["cpu_s"] - before["cpu_s"]) / len(calls.calls))
        for server, _ in sides.values():
            server.ask("go")
    all_on = statistics.median(cpu["all on"])
    yield Row("a refusal's server CPU, µs", all_on * 1e6)
    for name in list(OFF)[1:]:
        yield Row(f"  {name}, of that", statistics.median(cpu[name]) / all_on)


def compared(bench: Bench, ways: Ways, kind: Sequence[str], callers: int, count: int) -> Iterator[Row]:
    """The rate and the server's CPU of a call in a closed loop, of each way and of the first of them."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    with ExitStack() as stack:
        sides = servers(stack, tuple(ways), *kind)
        for number in range(bench.rounds + 1):
            for name, (server, address) in sides.items():
                before = server.ask("state")
                load = bench.load(address, callers=callers, count=count, among=500)
                if number:
                    rates[name].append(load.chars / load.seconds)
                    cpu[name].append((server.ask("state")["cpu_s"] - before["cpu_s"]) / count)
    first, *others = ways
    yield Row(
        f"{kind[0]} engine, {callers} callers, {first}: CPU of a call, µs",
        statistics.median(cpu[first]) * 1e6,
    )
    for name in others:
        rate = statistics.median(one / two for one, two in zip(rates[name], rates[first], strict=True))
        yield Row(f"  {name}: rate, of that of {first}", rate)
        yield Row("    CPU, of that", statistics.median(cpu[name]) / statistics.median(cpu[first]))


SERVERS: Ways = {"fast": lambda: None, "stock": stock_server}


def grpc_servers(bench: Bench) -> Iterator[Row]:
    """`--grpc-server fast` and `stock`, without an engine and with the default model."""
    yield from compared(bench, SERVERS, ("instant",), 32, 4000)
    yield from compared(bench, SERVERS, ("real", "float32"), 64, 1280)


def hold_up_to(rows: int, num_bytes: int) -> None:
    from layertap_server.engine.cpu import embeddings, pooling  # torch, only in the server's process

    embeddings.HELD_ROWS, pooling.HELD_BYTES = rows, num_bytes


INTERPRETER: Ways = {
    "held in short calls": lambda: None,
    "always released": lambda: hold_up_to(-1, -1),
    "always held": lambda: hold_up_to(2**62, 2**62),
}


def interpreter(bench: Bench) -> Iterator[Row]:
    """Native embeddings and pooling: whether a call releases the interpreter."""
    yield from compared(bench, INTERPRETER, ("real", "float32"), 64, 1280)


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "refusals": refusals,
    "servers": grpc_servers,
    "interpreter": interpreter,
    "storms": lambda bench: storms(bench, 1),
    "clients": lambda bench: storms(bench, NUM_CLIENTS),
}


@click.command()
@click.option("--only", default=",".join(SECTIONS), show_default=True, help="Sections.")
@click.option("--rounds", default=3, show_default=True, help="Rounds, after one to warm up.")
def main(only: str, rounds: int) -> None:
    """Measure the server with each mechanism on and off, in turns."""
    show_machine()
    REPORTS.mkdir(parents=True, exist_ok=True)
    LOG.unlink(missing_ok=True)
    rows: list[Row] = []
    with generating(read_texts(), rounds=rounds, open_s=STORM_S) as bench:
        for section in only.split(","):
            for row in SECTIONS[section](bench):
                row.show()
                rows.append(row)
    save(rows, REPORT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        (OFF | SERVERS | INTERPRETER)[sys.argv[2]]()
        uvloop.run(serve_layertap(*sys.argv[3:]))
    else:
        main()

"""Benchmark: what a call costs in one process, and in a front and an engine process.

The engine takes no time, and each process's CPU time is the system's own count, so that the load generator
and the number of cores do not matter. From the costs follows the throughput that a host with more cores has.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import grpc

from bench.bench import ENCODE, REPORTS, ROOT, request_of
from bench.corpus import read_texts
from bench.fronts_texts import NUM_TEXTS, text_us
from bench.load import ENCODE as GHZ_ENCODE
from bench.load import MAX_TEXTS, find_ghz
from bench.report import Row, save, show_machine
from bench.scheduler_common import Bench, generating
from layertap.v1 import encoder_pb2 as pb

REPORT = REPORTS / "fronts.json"
LOG = REPORTS / "fronts.log"
START_S = 300
# The share of its own speed that a front keeps when several share caches and the kernel's network work.
SHARED = 0.8
ENCODE_STREAM = "/layertap.v1.EncoderService/EncodeStream"
CALLERS = 32
LARGE_MB = 20
# For the section device: calls at once by the texts of each, over so many connections that every front has some.
CALLS_AT_ONCE = {1: 1024, 32: 128}
CONNECTIONS = 64
# The kinds of processes, as in `Served.pids`.
PROCESSES = {"one": "one process", "front": "front", "engine": "engine process"}
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Served:
    """A server with its processes: `one`, or `front` and `engine`."""

    address: str
    metrics_port: int
    pids: dict[str, list[int]] = field(default_factory=dict)

    def busy_s(self) -> float:
        """Seconds that the engine has spent in passes, from the metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as reply:
            found = re.findall(r"^layertap_engine_busy_seconds_total\S* (\S+)", reply.read().decode(), re.M)
        return sum(map(float, found))

    def cpu_s(self) -> dict[str, float]:
        return {name: sum(map(cpu_of, pids)) for name, pids in self.pids.items()}


def cpu_of(pid: int) -> float:
    """The CPU seconds of a process, by the system's count."""
    values = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) * TICK_S


def resident_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 1024


@contextmanager
def serving(num_fronts: int, *flags: str) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "bench.fronts_engine", "--serve", str(num_fronts)),
        *("--metrics-port", str(port)),
        *flags,
    ]
    with (
        LOG.open("a", encoding="utf-8") as log,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process,
    ):
        try:
            assert process.stderr is not None
            served = None
            for line in process.stderr:
                log.write(line)
                log.flush()
                if found := re.search(r"serving on (\S+), ready in", line):
                    served = Served(found[1], port)
                    break
            if served is None:
                raise click.ClickException(f"the server ended; {LOG} says why")
            served.pids = processes_of(process.pid) if num_fronts else {"one": [process.pid]}
            yield served
        finally:
            process.terminate()
            assert process.stderr is not None
            log.write(process.stderr.read())


def processes_of(supervisor: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"front": [], "engine": []}
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text(encoding="ascii")
    for pid in map(int, children.split()):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        found["front" if "processes.front" in command else "engine"].append(pid)
    return found


def costs(bench: Bench, served: Served, per_call: int, num_calls: int) -> dict[str, float]:
    """CPU microseconds of each kind of process for a text."""
    before = served.cpu_s()
    count = num_calls * per_call
    calls = bench.load(served.address, callers=CALLERS, count=count, among=500, per_call=per_call)
    assert set(calls.statuses) == {0}, calls.statuses
    after = served.cpu_s()
    return {name: (after[name] - before[name]) / count * 1e6 for name in after}


def large_costs(served: Served, num_calls: int) -> dict[str, float]:
    """CPU milliseconds of each kind of process for a reply of 20 MB on a stream."""
    num_layers = LARGE_MB * 2**20 // (512 * 384 * 4)
    outputs = pb.OutputSelection(
        hidden_states=pb.HiddenStateSelection(layers=[n % 7 for n in range(num_layers)])
    )
    ids = pb.TokenIds(ids=[101] * 512)
    asked = pb.EncodeRequest(inputs=[pb.Input(token_ids=ids)], outputs=outputs)
    before = served.cpu_s()
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(served.address, options) as channel:
        stream = channel.stream_stream(ENCODE_STREAM)
        frames = stream(
            iter(
                [
                    pb.EncodeStreamRequest(request_id=n, request=asked).SerializeToString()
                    for n in range(num_calls)
                ]
            )
        )
        num_bytes = sum(map(len, frames))
    assert num_bytes > num_calls * num_layers * 512 * 384 * 4
    after = served.cpu_s()
    return {name: (after[name] - before[name]) / num_calls * 1e3 for name in after}


def of_costs(bench: Bench, num_calls: int) -> Iterator[Row]:
    """The costs with one process and with one front, in turns."""
    small: dict[tuple[int, str], list[float]] = {}
    large: dict[str, list[float]] = {}
    with serving(0) as one, serving(1) as several:
        yield Row("a front's resident memory, MB", resident_mb(several.pids["front"][0]), "at most 120")
        for number in range(bench.rounds + 1):
            for served in (one, several):
                found = [(per_call, costs(bench, served, per_call, num_calls)) for per_call in (1, 32)]
                of_large = large_costs(served, 10)
                if number:
                    for per_call, each in found:
                        for name, cost in each.items():
                            small.setdefault((per_call, name), []).append(cost)
                    for name, cost in of_large.items():
                        large.setdefault(name, []).append(cost)
        yield Row("a front's memory after the load, MB", resident_mb(several.pids["front"][0]))
    cost = {key: statistics.median(values) for key, values in small.items()}
    for per_call in (1, 32):
        of_one = {name: cost[per_call, name] for name in PROCESSES}
        yield from compared(f"{per_call} texts a call, %s: CPU µs a text", of_one)
    of_large = {name: statistics.median(large[name]) for name in PROCESSES}
    yield from compared(f"a reply of {LARGE_MB} MB, %s: CPU ms", of_large)
    for per_call in (1, 32):
        for num_fronts in (1, 2, 4, 8, 12):
            by_fronts = SHARED * num_fronts / cost[per_call, "front"]
            by_engine = 1 / cost[per_call, "engine"]
            limit = "fronts" if by_fronts < by_engine else "engine process"
            what = f"predicted texts/s, {per_call} a call, {num_fronts} fronts (limit: {limit})"
            yield Row(what, min(by_fronts, by_engine) * 1e6)


def compared(what: str, costs: dict[str, float]) -> Iterator[Row]:
    """The costs by kind of process, and their ratios to those of one process in the same run, which depend
    less on the machine."""
    for name, process in PROCESSES.items():
        yield Row(what % process, costs[name])
        if name != "one":
            yield Row("  of that of one process", costs[name] / costs["one"])


def of_texts() -> Iterator[Row]:
    """The engine process's part of a text, in batches of a GPU's size."""
    for per_call, limit in ((1, 20), (32, 10)):
        cost = min(asyncio.run(text_us(per_call)) for _ in range(5))
        what = f"batches of {NUM_TEXTS}, {per_call} a call: engine process, CPU µs a text"
        yield Row(what, cost, f"at most {limit}", cost <= limit)


def of_this_machine(bench: Bench, count: int) -> Iterator[Row]:
    """The real engine, which shares the cores with the fronts: one process against one front, in turns."""
    rates: dict[int, list[float]] = {0: [], 1: []}
    latencies: dict[int, list[float]] = {0: [], 1: []}
    with serving(0, "--real") as one, serving(1, "--real") as several:
        for number in range(bench.rounds + 1):
            for num_fronts, served in ((0, one), (1, several)):
                many = bench.load(served.address, callers=64, count=count, first=number * count)
                alone = bench.load(served.address, callers=1, count=count // 8, first=number * count)
                if number:
                    rates[num_fronts].append(many.chars / many.seconds)
                    latencies[num_fronts].append(statistics.median(alone.took()))
    rate = statistics.median(a / b for a, b in zip(rates[1], rates[0], strict=True))
    latency = statistics.median(a / b for a, b in zip(latencies[1], latencies[0], strict=True))
    yield Row("the default model, 64 callers: texts/s with 1 front, of 0", rate)
    yield Row("  one caller: p50 with 1 front, of 0", latency)


def of_faults(bench: Bench) -> Iterator[Row]:
    """How soon the callers of a killed engine process are told, and when there is another."""
    text = " ".join(bench.texts[:200])[:4000]
    long = pb.EncodeRequest(
        inputs=[pb.Input(text=text)] * 16,
        truncation=pb.TRUNCATION_END,
        outputs=pb.OutputSelection(embeddings=[pb.EmbeddingSpec(pooling=pb.POOLING_MEAN)]),
    ).SerializeToString()
    short = request_of([text[:100]])
    begun = time.monotonic()
    with serving(2, "--real") as served, grpc.insecure_channel(served.address) as channel:
        start_s = time.monotonic() - begun
        encode = channel.unary_unary(ENCODE)
        encode(short, timeout=START_S)
        waiting = [encode.future(long, timeout=START_S) for _ in range(8)]
        time.sleep(0.5)
        ended: list[float] = []
        for one in waiting:
            one.add_done_callback(lambda _: ended.append(time.monotonic()))
        killed = time.monotonic()
        os.kill(served.pids["engine"][0], signal.SIGKILL)
        codes = {one.exception().code() for one in waiting}
        assert codes == {grpc.StatusCode.UNAVAILABLE}, codes
        while len(ended) < len(waiting):
            time.sleep(0.001)
        told_ms = (max(ended) - killed) * 1e3
        what = "engine killed: the last of 8 callers is told after, ms"
        yield Row(what, told_ms, "at most 50", told_ms <= 50)
        while True:
            try:
                encode(short, timeout=START_S)
                break
            except grpc.RpcError:
                time.sleep(0.05)
        yield Row("  answers again after, times the server's start", (time.monotonic() - killed) / start_s)


@dataclass(frozen=True, slots=True)
class Ghz:
    """The result of one run of ghz, which is compiled and uses several cores."""

    calls_per_s: float
    cpu_s: float
    seconds: float
    failures: str


def run_ghz(served: Served, data: Path, *, calls_at_once: int, connections: int, seconds: float) -> Ghz:
    command = [
        *(find_ghz(), "--insecure", "--call", GHZ_ENCODE, "--disable-template-data", "-D", str(data)),
        *("-c", str(calls_at_once), "--connections", str(connections)),
        *("-z", f"{seconds}s", "--duration-stop", "wait", "--timeout", "60s", served.address),
    ]
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    took, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    codes = dict(re.findall(r"^\s+\[(.+?)\]\s+(\d+) responses", ended.stdout, re.MULTILINE))
    if not codes:
        raise click.ClickException(f"ghz failed: {(ended.stderr or ended.stdout).strip()}")
    answered = int(codes.pop("OK", 0))
    return Ghz(answered / took, cpu_s, took, ", ".join(f"{count} × {code}" for code, count in codes.items()))


def of_device(
    texts: Sequence[str], model: str, device: str, counts: Sequence[int], seconds: float
) -> Iterator[Row]:
    """Texts per second of the real engine on a device, by the number of fronts, and who is busy meanwhile."""
    texts = texts[:MAX_TEXTS]
    rates: dict[int, float] = {}
    flags = ["--real", "--device", device, *(["--model", model] if model else [])]
    for num_fronts in counts:
        with serving(num_fronts, *flags) as served:
            for per_call in (1, 32):
                data = REPORTS / f"fronts-{per_call}.json"
                groups = [texts[at : at + per_call] for at in range(0, len(texts) - per_call + 1, per_call)]
                data.write_text(json.dumps([request_in_json(group) for group in groups]), encoding="utf-8")
                load = partial(
                    run_ghz, served, data, calls_at_once=CALLS_AT_ONCE[per_call], connections=CONNECTIONS
                )
                load(seconds=1.0)  # to warm up
                busy, cpu = served.busy_s(), served.cpu_s()
                found = load(seconds=seconds)
                busy, after = served.busy_s() - busy, served.cpu_s()
                rate = found.calls_per_s * per_call
                yield Row(f"{device}, {num_fronts} fronts, {per_call} a call: texts/s", rate)
                yield Row(f"  of that of {counts[0]} fronts", rate / rates.setdefault(per_call, rate))
                if found.failures:
                    yield Row(f"  failed: {found.failures}", 0, "none", False)
                yield Row("  the engine's idle share", 1 - busy / found.seconds)
                for name, process in PROCESSES.items():
                    if name in cpu:
                        used = after[name] - cpu[name]
                        yield Row(f"  {process}: cores in use", used / found.seconds)
                        yield Row(f"  {process}: CPU µs a text", used / found.seconds / rate * 1e6)
                yield Row("  ghz: cores in use", found.cpu_s / found.seconds)


def request_in_json(texts: Sequence[str]) -> dict[str, object]:
    inputs = [{"text": text} for text in texts]
    return {"inputs": inputs, "truncation": "TRUNCATION_END", "outputs": {"embeddings": [{}]}}


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Rounds, after one to warm up.")
@click.option(
    "--calls", "num_calls", default=3000, show_default=True, help="Calls in each round, with no engine."
)
@click.option(
    "--texts", "num_texts", default=640, show_default=True, help="Texts in each round, with the model."
)
@click.option(
    "--only", default="texts,costs,machine,faults", show_default=True, help="Sections; also: device."
)
@click.option("--device", default="cuda", show_default=True, help="The device of the section device.")
@click.option("--fronts", default="0,1,2,4,8,12", show_default=True, help="Its numbers of fronts.")
@click.option("--model", default="", help="Its model, a hub name or a folder. [default: the default model]")
@click.option("--seconds", default=5.0, show_default=True, help="The time for each of its values.")
def main(
    rounds: int,
    num_calls: int,
    num_texts: int,
    only: str,
    device: str,
    fronts: str,
    model: str,
    seconds: float,
) -> None:
    """Measure what fronts cost and bring."""
    show_machine()
    REPORTS.mkdir(parents=True, exist_ok=True)
    LOG.unlink(missing_ok=True)
    begun = time.monotonic()
    rows: list[Row] = []
    with generating(read_texts(), rounds=rounds, open_s=1.0) as bench:
        if "texts" in only:
            rows += show_all(of_texts())
        if "costs" in only:
            rows += show_all(of_costs(bench, num_calls))
        if "machine" in only:
            rows += show_all(of_this_machine(bench, num_texts))
        if "faults" in only:
            rows += show_all(of_faults(bench))
        if "device" in only:
            counts = [int(one) for one in fronts.split(",")]
            rows += show_all(of_device(bench.texts, model, device, counts, seconds))
    save(rows, REPORT)
    click.echo(f"{time.monotonic() - begun:.0f} s")


def show_all(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        row.show()
        yield row


if __name__ == "__main__":
    main()

"""Benchmark of the wire: what a result costs between the engine and the caller's arrays, as ratios.

The server is Layertap's own but for the engine, whose results are computed already. Every ratio is of
measurements that took turns in this run, medians over the rounds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np

from bench.wire_peers import ENCODE, HIDDEN_SHAPE, small_request
from layertap import Client, TokenIds
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "build" / "bench" / "wire.json"
STREAM = "/layertap.v1.EncoderService/EncodeStream"
LONG = TokenIds(list(range(1000, 1512)))
HIDDEN_BYTES = int(np.prod(HIDDEN_SHAPE)) * 4
ATTENTION_BYTES = 12 * 12 * 512 * 512 * 4
UNLIMITED = [("grpc.max_receive_message_length", -1)]
BUDGET_BYTES = 640 << 20
NUM_READERS = 10
NUM_SMALL_CALLS, NUM_CALLERS = 1500, 32
WINDOW_S = 3.0


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that the wire must show."""

    what: str
    value: float
    wanted: str
    holds: bool


@contextmanager
def process(module: str, *arguments: str) -> Iterator[tuple[str, int]]:
    """The address that a server prints, and its process id; stopped when left."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        try:
            yield child.stdout.readline().strip(), child.pid
        finally:
            child.stdin.close()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def seconds_of(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def in_turns(actions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round after round in another order; the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in random.Random(number).sample(list(actions.items()), len(actions)):
            taken = seconds_of(action)
            if number:
                times[name].append(taken)
    return times


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(above) / statistics.median(below)


# ----------------------------------------------------------------------- throughput


def read_tcp(connection: socket.socket) -> None:
    view = np.empty(HIDDEN_BYTES, np.uint8).data
    connection.sendall(b"1")
    while view:
        view = view[connection.recv_into(view) :]


def read_plain(stub: Any) -> None:
    tensor = stub.Encode(pb.EncodeRequest()).results[0].hidden_states
    np.frombuffer(tensor.data, np.float32).reshape(tuple(tensor.shape))


def read_stream(client: Client, **outputs: Any) -> None:
    [(_, result)] = client.stream([LONG], model="shared", **outputs)
    assert result.token_count == 512


def throughput(rounds: int) -> list[Row]:
    with ExitStack() as stack:
        socket_path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/layertap.sock"
        served, _ = stack.enter_context(process("bench.wire_server", f"unix_socket={socket_path}"))
        plain, _ = stack.enter_context(process("bench.wire_peers", "plain"))
        tcp, _ = stack.enter_context(process("bench.wire_peers", "tcp"))
        client = stack.enter_context(Client(served))
        unix = stack.enter_context(Client(f"unix:{socket_path}"))
        stub: Any = EncoderServiceStub(  # type: ignore[no-untyped-call]
            stack.enter_context(grpc.insecure_channel(plain, UNLIMITED))
        )
        host, port = tcp.split(":")
        connection = stack.enter_context(socket.create_connection((host, int(port))))
        times = in_turns(
            {
                "tcp": lambda: read_tcp(connection),
                "plain": lambda: read_plain(stub),
                "hidden": lambda: read_stream(client, hidden_states=True),
                "unix": lambda: read_stream(unix, hidden_states=True),
                "attentions": lambda: read_stream(client, attentions=True),
                "float16": lambda: read_stream(client, hidden_states=True, dtype="float16"),
            },
            rounds,
        )
    rates = {
        name: (ATTENTION_BYTES if name == "attentions" else HIDDEN_BYTES) / statistics.median(taken) / 1e6
        for name, taken in times.items()
    }
    click.echo("  ".join(f"{name} {rate:.0f} MB/s" for name, rate in rates.items()))
    of_tcp, of_plain = rates["hidden"] / rates["tcp"], rates["hidden"] / rates["plain"]
    of_hidden, of_unix = rates["attentions"] / rates["hidden"], rates["unix"] / rates["hidden"]
    return [
        Row("20 MB of hidden states, of raw TCP's rate", of_tcp, "at least 0.35", of_tcp >= 0.35),
        Row("the same, of a plain unary reply's rate", of_plain, "at least 5", of_plain >= 5),
        Row("151 MB of attentions, of the hidden states' rate", of_hidden, "at least 1", of_hidden >= 0.95),
        Row("a Unix socket's rate, of TCP's", of_unix, "", True),
        Row("float16, time of float32's", ratio(times["float16"], times["hidden"]), "", True),
    ]


# --------------------------------------------------------------------------- memory


def resident_bytes(pid: int, field: str = "VmRSS") -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def attention_request(request_id: int = 1) -> bytes:
    request = pb.EncodeRequest(
        model="fresh",
        inputs=[pb.Input(token_ids=pb.TokenIds(ids=LONG.ids))],
        outputs=pb.OutputSelection(attentions=pb.AttentionSelection()),
    )
    return bytes(pb.EncodeStreamRequest(request_id=request_id, request=request).SerializeToString())


@contextmanager
def peak_growth(pid: int) -> Iterator[Callable[[], int]]:
    """How far the process grew at most since this began."""
    before = resident_bytes(pid)
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # begins the peak anew
    yield lambda: resident_bytes(pid, "VmHWM") - before


def memory() -> list[Row]:
    with (
        process(
            "bench.wire_server",
            f"max_inflight_result_bytes={BUDGET_BYTES}",
            f"max_result_bytes={BUDGET_BYTES}",
        ) as (address, pid),
        grpc.insecure_channel(address, UNLIMITED) as channel,
    ):
        stream = channel.stream_stream(STREAM)
        for _ in stream(iter([attention_request()])):
            pass  # what is allocated once
        with peak_growth(pid) as growth:
            for _ in stream(iter([attention_request()])):
                time.sleep(0.01)
            alone = growth() / ATTENTION_BYTES

        with ExitStack() as stack, peak_growth(pid) as growth:
            calls, first = [], []
            for _ in range(NUM_READERS):
                own = stack.enter_context(
                    grpc.insecure_channel(address, [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)])
                )
                calls.append(own.stream_stream(STREAM)(iter([attention_request()])))
                first.append(pb.EncodeStreamResponse.FromString(next(calls[-1])))  # and no more
            refused = sum(frame.end.status.code == 8 for frame in first)
            for call in calls:
                call.cancel()
            ten = growth() / BUDGET_BYTES
    fit = BUDGET_BYTES // ATTENTION_BYTES
    return [
        Row("memory for a slow reader, of its 151 MB", alone, "at most 1.2", alone <= 1.2),
        Row("memory for ten who stop, of the budget", ten, "at most 1.2", ten <= 1.2),
        Row(
            "told RESOURCE_EXHAUSTED, of the ten",
            refused,
            f"{NUM_READERS - fit}",
            refused == NUM_READERS - fit,
        ),
    ]


# ---------------------------------------------------------------------- small calls


def small_calls(address: str) -> list[float]:
    command = [sys.executable, "-m", "bench.wire_peers", "small", address, str(WINDOW_S)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    times: list[float] = json.loads(ended.stdout)
    return times


@contextmanager
def large_results(address: str) -> Iterator[list[int]]:
    """One result of 20 MB after another is read, by a thread; the list grows with each."""
    read: list[int] = []
    leaving = threading.Event()

    def texts() -> Iterator[TokenIds]:
        while not leaving.is_set():
            yield LONG

    def run() -> None:
        with Client(address) as client:
            for index, _ in client.stream(texts(), model="shared", hidden_states=True):
                read.append(index)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield read
    finally:
        leaving.set()
        thread.join()


def beside(rounds: int) -> list[Row]:
    alone, busy, num_read = [], [], 0
    with process("bench.wire_server") as (address, _):
        for _ in range(rounds):
            alone.append(float(np.percentile(small_calls(address), 99)))
            with large_results(address) as read:
                busy.append(float(np.percentile(small_calls(address), 99)))
                num_read += len(read)
    rate = num_read * HIDDEN_BYTES / (rounds * WINDOW_S) / 1e6
    click.echo(
        f"p99 of a small call {statistics.median(alone) * 1e3:.2f} ms alone, "
        f"{statistics.median(busy) * 1e3:.2f} ms beside a stream of {rate:.0f} MB/s"
    )
    slower = ratio(busy, alone)
    return [Row("p99 of small calls beside it, times alone", slower, "at most 2", slower <= 2)]


async def unary_calls(channel: Any) -> None:
    encode = channel.unary_unary(ENCODE)
    requests = iter([small_request().SerializeToString()] * NUM_SMALL_CALLS)

    async def caller() -> None:
        for request in requests:
            pb.EncodeResponse.FromString(await encode(request))

    await asyncio.gather(*(caller() for _ in range(NUM_CALLERS)))


async def streamed_calls(channel: Any) -> None:
    room = asyncio.Semaphore(NUM_CALLERS)

    async def requests() -> Any:
        for request_id in range(NUM_SMALL_CALLS):
            await room.acquire()
            message = pb.EncodeStreamRequest(
                request_id=request_id, request=small_request(), accepts_whole=True
            )
            yield message.SerializeToString()

    async for message in channel.stream_stream(STREAM)(requests()):
        if pb.EncodeStreamResponse.FromString(message).WhichOneof("frame") in ("whole", "end"):
            room.release()


async def small_in_turns(address: str, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"unary": [], "stream": [], "sdk": []}
    text = TokenIds(list(range(1000, 1016)))
    async with grpc.aio.insecure_channel(address) as channel:
        for number in range(rounds + 1):
            for name, calls in (("unary", unary_calls), ("stream", streamed_calls)):
                begun = time.perf_counter()
                await calls(channel)
                if number:
                    times[name].append(time.perf_counter() - begun)
            with Client(address) as client:
                begun = time.perf_counter()
                client.encode([text] * NUM_SMALL_CALLS, embeddings=True)
                if number:
                    times["sdk"].append(time.perf_counter() - begun)
    return times


def small(rounds: int) -> list[Row]:
    with process("bench.wire_server") as (address, _):
        times = asyncio.run(small_in_turns(address, rounds))
    rates = {name: NUM_SMALL_CALLS / statistics.median(taken) for name, taken in times.items()}
    click.echo("  ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items()))
    streamed, sdk = ratio(times["unary"], times["stream"]), ratio(times["unary"], times["sdk"])
    return [
        Row("small requests streamed one by one, of unary's rate", streamed, "at least 1.5", streamed >= 1.5),
        Row("texts of the SDK's encode, of unary's rate", sdk, "at least 1.5", sdk >= 1.5),
    ]


@click.command()
@click.option(
    "--rounds", default=9, show_default=True, help="Rounds of each throughput, after one to warm up."
)
def main(rounds: int) -> None:
    """Measure the wire: throughput, memory, and what small calls feel of large results."""
    click.echo(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if os.getloadavg()[0] > 0.5:
        click.echo("the machine is busy: its other work distorts even the ratios")
    rows = [*throughput(rounds), *memory(), *beside(3), *small(5)]
    click.echo()
    for row in rows:
        verdict = "" if not row.wanted else "yes" if row.holds else "NO"
        click.echo(f"{row.what:<52}{row.value:>8.2f}   {row.wanted:<14}{verdict}")
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    click.echo(f"\nmedians of measurements in turns; also in {REPORT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

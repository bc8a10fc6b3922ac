"""Benchmark of the transfer of results from the engine to the caller's arrays, as ratios.

The server is Layertap's own, with an engine whose results are prepared. Every ratio is of measurements that
alternate in this run, as a median over the rounds.
"""

from __future__ import annotations

import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np

from bench.report import Row, save, show_machine
from bench.wire_common import HIDDEN_BYTES, LONG, ROOT, STREAM, in_turns, process, ratio
from bench.wire_small import beside, small
from layertap import Client
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub

REPORT = ROOT / "build" / "bench" / "wire.json"
ATTENTION_BYTES = 12 * 12 * 512 * 512 * 4
UNLIMITED = [("grpc.max_receive_message_length", -1)]
BUDGET_BYTES = 640 << 20
NUM_READERS = 10


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
    of_unix = rates["unix"] / rates["hidden"]
    # Ratios within the same round: the machine's speed changes between rounds.
    pairs = zip(times["hidden"], times["attentions"], strict=True)
    of_hidden = [ATTENTION_BYTES / HIDDEN_BYTES * hidden / attentions for hidden, attentions in pairs]
    value = statistics.median(of_hidden)
    first, _, third = statistics.quantiles(of_hidden, n=4)
    noise = (third - first) / len(of_hidden) ** 0.5
    return [
        Row("20 MB of hidden states, of raw TCP's rate", of_tcp, "at least 0.35", of_tcp >= 0.35),
        Row("the same, of a plain unary reply's rate", of_plain, "at least 5", of_plain >= 5),
        Row(
            "151 MB of attentions, of the hidden states' rate", value, "at least 1", value + noise >= 1, noise
        ),
        Row("a Unix socket's rate, of TCP's", of_unix),
        Row("float16, time of float32's", ratio(times["float16"], times["hidden"])),
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
    """The largest growth of the process's memory during the block."""
    before = resident_bytes(pid)
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # resets the peak
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
            pass  # warm-up: memory that is allocated once
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
                first.append(
                    pb.EncodeStreamResponse.FromString(next(calls[-1]))
                )  # reads only the first frame
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


@click.command()
@click.option(
    "--rounds", default=9, show_default=True, help="Rounds of each throughput, after a warm-up round."
)
def main(rounds: int) -> None:
    """Measure transfers: throughput, memory, and the effect of large results on small calls."""
    show_machine()
    rows = [*throughput(rounds), *memory(), *beside(3), *small(5)]
    click.echo()
    for row in rows:
        row.show()
    save(rows, REPORT)


if __name__ == "__main__":
    main()

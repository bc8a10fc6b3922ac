"""Small calls: at the same time as a stream of large results, and in large numbers."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import click
import grpc
import numpy as np

from bench.report import Row
from bench.wire_common import HIDDEN_BYTES, LONG, ROOT, STREAM, process, ratio
from bench.wire_peers import ENCODE, small_request
from layertap import Client, TokenIds
from layertap.v1 import encoder_pb2 as pb

NUM_SMALL_CALLS, NUM_CALLERS = 1500, 32
WINDOW_S = 2.5


def small_calls(address: str) -> list[float]:
    command = [sys.executable, "-m", "bench.wire_peers", "small", address, str(WINDOW_S)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    times: list[float] = json.loads(ended.stdout)
    return times


@contextmanager
def large_results(address: str) -> Iterator[list[int]]:
    """A thread reads one result of 20 MB after another; the list grows with each."""
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


@contextmanager
def computing() -> Iterator[None]:
    """Runs one busy process per core, to measure the effect of the operating system's scheduling on a
    call."""
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            stack.enter_context(process("bench.wire_peers", "burn"))
        yield


def beside(rounds: int) -> list[Row]:
    """The 99th percentile of small calls: alone, during large results, and during unrelated busy
    processes."""
    times: dict[str, list[float]] = {"alone": [], "paced": [], "unpaced": [], "computing": []}
    num_read: dict[str, int] = {"paced": 0, "unpaced": 0}

    def measure(kind: str, address: str) -> None:
        times[kind].append(float(np.percentile(small_calls(address), 99)))

    with (
        process("bench.wire_server") as (paced, _),
        process("bench.wire_server", "bytes_per_s_beside_calls=0") as (unpaced, _),
    ):
        for _ in range(rounds):
            measure("alone", paced)
            for kind, address in (("paced", paced), ("unpaced", unpaced)):
                with large_results(address) as read:
                    measure(kind, address)
                    num_read[kind] += len(read)
            with computing():
                measure("computing", paced)
    rates = {kind: num * HIDDEN_BYTES / (rounds * WINDOW_S) / 1e6 for kind, num in num_read.items()}
    click.echo(
        "p99 of a small call, ms: "
        + ", ".join(f"{kind} {statistics.median(taken) * 1e3:.2f}" for kind, taken in times.items())
        + "; the stream beside it, MB/s: "
        + ", ".join(f"{kind} {rate:.0f}" for kind, rate in rates.items())
    )
    slower = {kind: ratio(taken, times["alone"]) for kind, taken in times.items()}
    return [
        Row("p99 of small calls beside it, times alone", slower["paced"], "at most 2", slower["paced"] <= 2),
        Row("the same with bytes_per_s_beside_calls=0", slower["unpaced"]),
        Row("the same beside processes that only compute", slower["computing"]),
    ]


async def unary_calls(channel: Any) -> None:
    encode = channel.unary_unary(ENCODE)
    requests = iter([small_request().SerializeToString()] * NUM_SMALL_CALLS)

    async def caller() -> None:
        for request in requests:
            pb.EncodeResponse.FromString(await encode(request))

    await asyncio.gather(*(caller() for _ in range(NUM_CALLERS)))


@cache
def small_stream_requests() -> list[bytes]:
    return [
        pb.EncodeStreamRequest(
            request_id=request_id, request=small_request(), accepts_whole=True, accepts_grouped=True
        ).SerializeToString()
        for request_id in range(NUM_SMALL_CALLS)
    ]


async def streamed_calls(channel: Any) -> None:
    """Requests are serialized in advance, as in `unary_calls`, since the server is measured, not the
    caller."""
    room = asyncio.Semaphore(NUM_CALLERS)

    async def requests() -> Any:
        for message in small_stream_requests():
            await room.acquire()
            yield message

    async for message in channel.stream_stream(STREAM)(requests()):
        reply = pb.EncodeStreamResponse.FromString(message)
        for frame in reply.grouped.frames or [reply]:
            if frame.WhichOneof("frame") in ("whole", "end"):
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

"""Benchmark: texts per second through a server, as ratios to the same model in process.

Starts a server on a free port and sends it natural text, one or more texts per call, from callers that each
wait for their reply. In between, measures transformers and the packed engine on the same texts. Each round
uses new texts: a batch of sizes that have occurred before is faster than natural ones are.
"""

import asyncio
import json
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import IO, Any

import click
import grpc

from bench.corpus import Corpus, corpus_option
from layertap.v1 import encoder_pb2
from layertap_server.config import Config

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "bench"
ENCODE = "/layertap.v1.EncoderService/Encode"
CALLERS = (1, 8, 64)
IN_PROCESS = {
    "padded": "transformers, padded batches of 32",
    "sorted": "the same, sorted by length",
    "packed": "the packed engine, no server",
}
START_S = 120
# The same as in bench.inprocess, which is not imported here since it needs torch.
NUM_COMPARED = 32
CALL_TIMEOUT_S = 60
# The largest allowed difference from transformers in a component of a unit vector.
TOLERANCES = {"float32": 2e-5, "bfloat16": 5e-3, "float16": 2e-3}


@dataclass(frozen=True, slots=True)
class Measured:
    """One way to encode all texts once: its time, and the vectors of the first few texts."""

    seconds: float
    vectors: list[list[float]]
    # Cores that the load generator kept busy.
    generator_cpu: float = 0.0


@contextmanager
def child(command: Sequence[str], **pipes: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(START_S)


@contextmanager
def server(model: str, device: str, dtype: str) -> Iterator[str]:
    """Yields the address of a server that is ready; stops it at the end."""
    with tempfile.TemporaryFile("w+") as log:
        command = [
            str(Path(sys.executable).with_name("layertap-server")),
            "--port",
            "0",
            "--device",
            device,
            "--dtype",
            dtype,
        ]
        with child([*command, "--model", f"bench={model}"], stderr=log) as process:
            yield wait_for_address(process, log)


def wait_for_address(process: subprocess.Popen[str], log: IO[str]) -> str:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends and process.poll() is None:
        log.seek(0)
        if found := re.search(r"serving on (\S+),", log.read()):
            return found[1]
        time.sleep(0.05)
    log.seek(0)
    raise click.ClickException(f"the server did not start:\n{log.read()}")


@contextmanager
def in_process(model: str, device: str, dtype: str) -> Iterator[Callable[[str, Sequence[str]], Measured]]:
    """Measures one of IN_PROCESS in a separate process, which imports torch."""
    command = [sys.executable, "-m", "bench.inprocess", model, device, dtype]
    with child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        requests, replies = process.stdin, process.stdout
        assert requests is not None
        assert replies is not None

        def measure(way: str, texts: Sequence[str]) -> Measured:
            print(json.dumps([way, texts]), file=requests, flush=True)
            reply = replies.readline()
            if not reply:
                raise click.ClickException("the process with torch ended; its error is above")
            return Measured(**json.loads(reply))

        yield measure


async def served(address: str, requests: Sequence[bytes], num_callers: int) -> Measured:
    """Sends each request once, from callers that each wait for their reply. Replies are not parsed."""
    replies: dict[int, bytes] = {}
    numbers = iter(range(len(requests)))
    async with grpc.aio.insecure_channel(address) as channel:
        encode = channel.unary_unary(ENCODE)

        async def caller() -> None:
            for number in numbers:
                replies[number] = await encode(requests[number], timeout=CALL_TIMEOUT_S)

        await channel.channel_ready()
        began, began_cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(caller() for _ in range(num_callers)))
        seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    vectors = [vector for number in sorted(replies)[:NUM_COMPARED] for vector in vectors_of(replies[number])]
    return Measured(seconds, vectors[:NUM_COMPARED], cpu / seconds)


def run_served(address: str, requests: Sequence[bytes], num_callers: int) -> Measured:
    return asyncio.run(served(address, requests, num_callers))


def request_of(texts: Sequence[str]) -> bytes:
    request = encoder_pb2.EncodeRequest(
        inputs=[encoder_pb2.Input(text=text) for text in texts],
        outputs=encoder_pb2.OutputSelection(
            embeddings=[encoder_pb2.EmbeddingSpec(pooling=encoder_pb2.POOLING_MEAN, normalize=True)]
        ),
        truncation=encoder_pb2.TRUNCATION_END,
    )
    return bytes(request.SerializeToString())


def vectors_of(reply: bytes) -> list[list[float]]:
    results = encoder_pb2.EncodeResponse.FromString(reply).results
    tensors = [tensor for result in results for tensor in result.embeddings]
    return [list(struct.unpack(f"<{tensor.shape[0]}f", tensor.data)) for tensor in tensors]


def measure_all(
    model: str, device: str, dtype: str, texts: Sequence[str], num_texts: int, num_inputs: int, rounds: int
) -> dict[str, list[Measured]]:
    """Measures every way in each round, so that other work on the machine affects all alike."""
    measured: dict[str, list[Measured]] = {}
    endless = cycle(texts)
    with server(model, device, dtype) as address, in_process(model, device, dtype) as run:
        for number in range(rounds + 1):  # The first round is a warm-up.
            in_round = list(islice(endless, num_texts))
            requests = [
                request_of(in_round[first : first + num_inputs]) for first in range(0, num_texts, num_inputs)
            ]
            ways: dict[str, Callable[[], Measured]] = {
                f"served, {num_callers} at a time": partial(run_served, address, requests, num_callers)
                for num_callers in CALLERS
            }
            ways |= {label: partial(run, way, in_round) for way, label in IN_PROCESS.items()}
            for label, measure in ways.items():
                click.echo(f"{dtype}, round {number} of {rounds}: {label}", err=True)
                result = measure()
                if number:
                    measured.setdefault(label, []).append(result)
    check_vectors(measured, TOLERANCES[dtype])
    return measured


def check_vectors(measured: dict[str, list[Measured]], tolerance: float) -> None:
    """Raises if the results of two ways differ: their speed is comparable only for equal results."""
    expected = measured[IN_PROCESS["padded"]][0].vectors
    for way, results in measured.items():
        pairs = zip(results[0].vectors, expected, strict=True)
        worst = max(
            abs(one - other) for ours, theirs in pairs for one, other in zip(ours, theirs, strict=True)
        )
        if worst > tolerance:
            raise click.ClickException(
                f"{way}: differs from transformers by {worst:.1e}, over {tolerance:.0e}"
            )


COLUMNS = "{:<36}{:>10}{:>14}{:>14}{:>14}{:>16}"
HEADINGS = ("", "texts/s", *(f"times {way}" for way in IN_PROCESS), "generator's CPU")


def show(dtype: str, measured: dict[str, list[Measured]], num_texts: int) -> None:
    """Prints a row for each way: its rate, and its ratio to each of IN_PROCESS, as medians over the
    rounds."""
    click.echo(f"\n{dtype}\n{COLUMNS.format(*HEADINGS)}")
    for way, results in measured.items():
        ratios = [
            statistics.median(
                base.seconds / result.seconds for base, result in zip(measured[label], results, strict=True)
            )
            for label in IN_PROCESS.values()
        ]
        rate = num_texts / statistics.median(result.seconds for result in results)
        cpu = statistics.median(result.generator_cpu for result in results)
        click.echo(
            COLUMNS.format(
                way, f"{rate:.0f}", *(f"{ratio:.2f}" for ratio in ratios), f"{cpu:.0%}" if cpu else ""
            )
        )


@click.command()
@click.option("--model", default="", help="A hub name or a folder. [default: the server's default model]")
@corpus_option
@click.option(
    "--texts",
    "num_texts",
    default=320,
    show_default=True,
    help="Texts in each round; every round has new ones.",
)
@click.option("--inputs", "num_inputs", default=1, show_default=True, help="Texts in each call.")
@click.option("--rounds", default=5, show_default=True, help="Rounds, after a warm-up round.")
@click.option("--device", default="cpu", show_default=True, help="Device of all of them: cpu or cuda.")
@click.option("--dtypes", default="float32,bfloat16", show_default=True, help="Types to compute in.")
def main(
    model: str, corpus: Corpus, num_texts: int, num_inputs: int, rounds: int, device: str, dtypes: str
) -> None:
    """Compare a served model with the same model in process."""
    name, source = (model, model) if model else next(iter(Config().models().items()))
    texts = corpus.texts
    REPORTS.mkdir(parents=True, exist_ok=True)
    click.echo(
        f"{name} on {device}: {rounds} rounds of {num_texts} texts, {num_inputs} a call, {os.cpu_count()} cores"
    )
    if (busy := os.getloadavg()[0]) > 0.5:
        click.echo(f"the machine is busy (load {busy:.1f}): other work distorts even the ratios")
    for dtype in dtypes.split(","):
        measured = measure_all(source, device, dtype, texts, num_texts, num_inputs, rounds)
        show(dtype, measured, num_texts)
        seconds = {way: [result.seconds for result in results] for way, results in measured.items()}
        report = {"model": name, "dtype": dtype, "num_texts": num_texts, "seconds": seconds}
        (REPORTS / f"{device}-{dtype}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    click.echo("\ntimes X: texts/s over those of X in the same round; every round is in build/bench/")


if __name__ == "__main__":
    main()

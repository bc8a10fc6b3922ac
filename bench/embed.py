"""What `SentenceEncoder.encode` and `Client.embed` add to a stream of the same texts.

A server in another process answers at once, so the ratio shows the client's own work; a real server makes it
smaller. Each round runs all of them in turn, and the ratios are medians over the rounds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import grpc
import numpy as np

from layertap import Client, SentenceEncoder
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceServicer, add_EncoderServiceServicer_to_server

DIMENSIONS = 384
MAX_RATIO = 1.1
_VECTOR = np.linspace(-1, 1, DIMENSIONS, dtype=np.float32).tobytes()
_RESULT = pb.EncodeResult(
    token_count=3,
    embeddings=[pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[DIMENSIONS], data=_VECTOR)],
)


class Instant(EncoderServiceServicer):
    """Answers each text with the same vector, at once."""

    def EncodeStream(  # noqa: N802
        self, requests: Iterator[pb.EncodeStreamRequest], context: object
    ) -> Iterator[pb.EncodeStreamResponse]:
        for request in requests:
            results = [_RESULT] * len(request.request.inputs)
            yield pb.EncodeStreamResponse(
                request_id=request.request_id, whole=pb.EncodeResponse(results=results)
            )

    def GetModel(self, request: pb.GetModelRequest, context: object) -> pb.GetModelResponse:  # noqa: N802
        model = pb.Model(name="instant", max_tokens=512, embedding_size=DIMENSIONS, hidden_size=DIMENSIONS)
        return pb.GetModelResponse(model=model)


def serve() -> None:
    """Serves until the standard input ends; prints the port."""
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(8))
    add_EncoderServiceServicer_to_server(Instant(), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(None).wait()


@contextmanager
def instant_server() -> Iterator[str]:
    command = [sys.executable, "-c", "from bench.embed import serve; serve()"]
    with subprocess.Popen(
        command,
        cwd=Path(__file__).resolve().parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()
        process.wait()


@click.command()
@click.option("--texts", "num_texts", default=20_000, show_default=True, help="Texts of a round.")
@click.option("--rounds", default=5, show_default=True, help="Rounds; the first one is not counted.")
@click.option("--check", is_flag=True, help=f"Exit with 1 if a ratio is above {MAX_RATIO}.")
def main(num_texts: int, rounds: int, check: bool) -> None:
    """Times of embedding texts, relative to `Client.stream` of the same texts."""
    texts = [f"text number {index}" for index in range(num_texts)]
    with instant_server() as address, Client(address, connections=1) as client:
        encoder = SentenceEncoder(client)

        def stream() -> None:
            for _ in client.stream(texts, embeddings=True, truncation="end"):
                pass

        ways: dict[str, Callable[[], object]] = {
            "Client.stream": stream,
            "Client.embed": lambda: client.embed(texts, truncation="end"),
            "SentenceEncoder.encode": lambda: encoder.encode(texts),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            # In turns, forwards and backwards, so that a drift of the machine meets all alike.
            for name in list(ways) if number % 2 else list(ways)[::-1]:
                wall, cpu = time.perf_counter(), time.process_time()
                ways[name]()
                if number:
                    times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    of_stream = times["Client.stream"]
    worst = 0.0
    print(f"{'':24} {'time':>16} {'CPU time':>10}")
    for name, found in times.items():
        wall, cpu = (
            statistics.median(one[kind] / base[kind] for one, base in zip(found, of_stream, strict=True))
            for kind in (0, 1)
        )
        worst = max(worst, wall)
        per_text = statistics.median(one[0] for one in found) / num_texts * 1e6
        print(f"{name:24} {per_text:6.1f} µs/text {wall:.3f} {cpu:10.3f}")
    if check and worst > MAX_RATIO:
        sys.exit(1)


if __name__ == "__main__":
    main()

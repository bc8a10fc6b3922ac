"""The load generator of `bench.scheduler`: a separate process that uses little CPU time, and reports it.

The first line of standard input has the texts, as JSON. Each further line is a list of loads to run at the
same time, as keyword arguments of `Load`; the answer has the result of each call, and the CPU time used.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc
import numpy as np

from bench.bench import ENCODE, request_of
from bench.echo_server import cpu_s
from layertap.v1 import encoder_pb2 as pb

OK, CANCELLED, WRONG = 0, 1, -1
# The allowed difference of a component between a text's vector in a batch and alone.
TOLERANCE = 2e-5
# The start in seconds after the beginning of the load, the duration in seconds, the gRPC status or `WRONG`,
# and the number of characters of its texts.
Call = tuple[float, float, int, int]


@dataclass(slots=True, kw_only=True)
class Load:
    """Calls of `Encode`: from `callers` that each wait for their reply, or at a fixed `rate`."""

    address: str
    callers: int = 1
    # Calls per second with random arrival times, for this many seconds.
    rate: float = 0.0
    seconds: float = 0.0
    # `count` texts, starting with text `first`. With count 0, until the other loads are done.
    first: int = 0
    count: int = 0
    # The number of different texts, which are repeated; 0: all texts.
    among: int = 0
    per_call: int = 1
    timeout_s: float = 60.0
    pause_s: float = 0.0
    # The client's name, sent as metadata. Each name has its own share of the engine.
    client: str = ""
    # Calls are cancelled after a random time of up to this many seconds.
    leaves_s: float = 0.0
    # Whether vectors are compared with those of the same texts alone.
    is_checked: bool = False
    # Texts with this word are expected to fail.
    poison: str = ""
    calls: list[Call] = field(default_factory=list)


class Generator:
    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self._requests = [request_of([text]) for text in texts]
        self._alone: dict[int, np.ndarray] = {}

    async def run(self, loads: list[Load]) -> float:
        """Runs the loads at the same time, each on its own connection. Returns the CPU seconds used."""
        began_cpu = cpu_s()
        others_done = asyncio.Event()
        tasks = {id(load): asyncio.create_task(self._run(load, others_done)) for load in loads}
        await asyncio.gather(*(tasks[id(load)] for load in loads if load.count or load.rate))
        others_done.set()
        await asyncio.gather(*tasks.values())
        return cpu_s() - began_cpu

    async def _run(self, load: Load, others_done: asyncio.Event) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(load.address, options) as channel:
            encode = channel.unary_unary(ENCODE)
            await channel.channel_ready()
            begun = time.perf_counter()
            if load.rate:
                await self._open(load, encode, begun)
                return
            numbers = self._numbers(load, others_done)

            async def caller() -> None:
                for number in numbers:
                    await self._call(load, encode, number, begun)
                    if load.pause_s:
                        await asyncio.sleep(load.pause_s)

            await asyncio.gather(*(caller() for _ in range(load.callers)))

    async def _open(self, load: Load, encode: Callable[..., object], begun: float) -> None:
        """Poisson arrivals. Calls that are due are sent before replies are processed."""
        chance, due, number, tasks = random.Random(load.first), begun, load.first, set()
        while due < begun + load.seconds:
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            task = asyncio.create_task(self._call(load, encode, number, begun))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            due += chance.expovariate(load.rate)
        await asyncio.gather(*tasks)

    def _numbers(self, load: Load, others_done: asyncio.Event) -> Iterator[int]:
        done = 0
        while done < load.count if load.count else not others_done.is_set():
            yield load.first + (done % load.among if load.among else done)
            done += load.per_call

    async def _call(self, load: Load, encode: Callable[..., object], number: int, begun: float) -> None:
        texts = [self.texts[at % len(self.texts)] for at in range(number, number + load.per_call)]
        metadata = (("layertap-client", load.client),) if load.client else None
        at = time.perf_counter()
        call = encode(self._request(number, load.per_call), timeout=load.timeout_s, metadata=metadata)
        if load.leaves_s:
            asyncio.get_running_loop().call_later(random.uniform(0, load.leaves_s), call.cancel)  # type: ignore[attr-defined]
        try:
            reply: bytes = await call  # type: ignore[misc]
            code = OK
        except grpc.RpcError as error:
            code = error.code().value[0]
        except asyncio.CancelledError:
            code = CANCELLED
        took = time.perf_counter() - at
        if load.is_checked and not code and not self._is_right(number, reply):
            code = WRONG
        if load.poison and load.poison in texts[0]:
            code = OK if code == grpc.StatusCode.INTERNAL.value[0] else WRONG
        load.calls.append((at - begun, took, code, sum(map(len, texts))))

    def _request(self, number: int, per_call: int) -> bytes:
        requests = (self._requests[at % len(self._requests)] for at in range(number, number + per_call))
        if per_call == 1:
            return next(requests)
        whole = pb.EncodeRequest.FromString(next(requests))
        for one in requests:
            whole.inputs.extend(pb.EncodeRequest.FromString(one).inputs)
        return bytes(whole.SerializeToString())

    def _is_right(self, number: int, reply: bytes) -> bool:
        """Compares a text's vectors with the first one that it got."""
        [result] = pb.EncodeResponse.FromString(reply).results
        vector = np.frombuffer(result.embeddings[0].data, np.float32)
        expected = self._alone.setdefault(number % len(self.texts), vector)
        return bool(np.abs(vector - expected).max() <= TOLERANCE)


async def main() -> None:
    generator = Generator(json.loads(sys.stdin.readline()))
    while line := await asyncio.to_thread(sys.stdin.readline):
        loads = [Load(**one) for one in json.loads(line)]
        cpu = await generator.run(loads)
        print(json.dumps({"cpu_s": cpu, "calls": [load.calls for load in loads]}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())

"""Kills and stops processes of a server under load, by chance, and checks what its callers see.

`python -m processes.faults --number 200 --seed 1` (with tests/ and the sources in PYTHONPATH); `--engine real`
has the default model instead of an engine that starts at once, and kills its process more seldom.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from layertap.v1 import encoder_pb2 as pb
from server.process import Process, process
from server.support import WAIT_S
from server.test_metrics import free_port, scrape

NUM_CALLERS = 8
HEALTH_S = 2.0
SERVICE = "/layertap.v1.EncoderService"
# What a call may end with when the process that had it is gone, stopped or starting.
ALLOWED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass
class Report:
    faults: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Engine:
    """What the engine of a run is like."""

    is_real: bool = False
    # The marks are the first of the ids that an input has.
    num_marks: int = 90_000
    num_layers: int = 300
    # The share of the faults that are the engine process's, and the time in which it is there again.
    share: float = 1 / 3
    start_s: float = 60.0
    # After it, no more faults are made.
    max_s: float = 900.0
    # By id and number of tokens: the values that came first.
    first: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def is_right(self, values: np.ndarray, token: int, num_tokens: int) -> bool:
        """Whether the hidden state belongs to this input. The real engine's are compared with the first."""
        if not self.is_real:
            return bool((values == token).all())
        first = self.first.setdefault((token, num_tokens), values)
        return values.shape == first.shape and np.allclose(values, first, atol=1e-4)


REAL = Engine(is_real=True, num_marks=60, num_layers=30, share=1 / 15, start_s=240.0)


def request(mark: int, dice: random.Random, engine: Engine) -> pb.EncodeRequest:
    """One to four inputs whose outputs have some hundred bytes, or a megabyte each."""
    outputs = pb.OutputSelection(last_hidden_state=True)
    num_tokens = dice.randrange(1, 12)
    if dice.random() < 0.3:
        outputs.hidden_states.layers.extend([0, -1, *[3] * dice.randrange(engine.num_layers)])
        num_tokens = 40
    inputs = [
        pb.Input(token_ids=pb.TokenIds(ids=[mark + n] * num_tokens)) for n in range(dice.randrange(1, 5))
    ]
    return pb.EncodeRequest(inputs=inputs, outputs=outputs)


def check(asked: pb.EncodeRequest, response: pb.EncodeResponse, report: Report, engine: Engine) -> None:
    for one, result in zip(asked.inputs, response.results, strict=True):
        token, num_tokens = one.token_ids.ids[0], len(one.token_ids.ids)
        last = np.frombuffer(result.last_hidden_state.data, np.float32)
        states = np.frombuffer(result.hidden_states.data, np.float32)
        # The second of the hidden states is the last one.
        found = [last, states[last.size : 2 * last.size] if engine.is_real else states]
        if not all(engine.is_right(values, token, num_tokens) for values in found if values.size):
            report.wrong.append(f"values {last[:5]} where those of {token} belong")


async def call(
    address: str, dice: random.Random, report: Report, stop: asyncio.Event, engine: Engine
) -> None:
    """One caller: unary calls one after another, each on a new connection now and then; some are cancelled."""
    while not stop.is_set():
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(address, options) as channel:
            encode = channel.unary_unary(
                f"{SERVICE}/Encode", pb.EncodeRequest.SerializeToString, pb.EncodeResponse.FromString
            )
            for _ in range(dice.randrange(5, 60)):
                wanted = request(dice.randrange(1, engine.num_marks), dice, engine)
                asked = encode(wanted, timeout=WAIT_S)
                if dice.random() < 0.05:
                    asyncio.get_running_loop().call_later(dice.random() * 0.01, asked.cancel)
                try:
                    response = await asked
                except asyncio.CancelledError:
                    report.ended["cancelled"] += 1
                    continue
                except grpc.aio.AioRpcError as error:
                    report.ended[error.code().name] += 1
                    too_large = "max_message_bytes" in (error.details() or "")
                    is_full = engine.is_real and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                    if error.code() not in ALLOWED and not too_large and not is_full:
                        report.wrong.append(f"{error.code()}: {error.details()}")
                    if stop.is_set():
                        return
                    await asyncio.sleep(0.02)
                    continue
                report.ended["OK"] += 1
                check(wanted, response, report, engine)
                if stop.is_set():
                    return


def processes_of(pid: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"front": [], "engine": []}
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    for child in map(int, listed.split()):
        with suppress(OSError):
            command = Path(f"/proc/{child}/cmdline").read_bytes().decode()
            for name in found:
                if f".{name}" in command or f"_{name}" in command:
                    found[name].append(child)
    return found


async def healthy(address: str, wanted: bool, within_s: float) -> bool:
    """Whether the server says so within this time, on a connection of its own."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options) as channel:
            with suppress(grpc.aio.AioRpcError):
                stub = health_pb2_grpc.HealthStub(channel)
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                if (answer.status == health_pb2.HealthCheckResponse.SERVING) is wanted:
                    return True
        await asyncio.sleep(0.02)
    return False


async def break_things(
    server: Process, address: str, number: int, dice: random.Random, report: Report, engine: Engine
) -> None:
    begun = time.monotonic()
    for _ in range(number):
        if time.monotonic() - begun > engine.max_s:
            return
        await asyncio.sleep(dice.random() * 0.4)
        kind = "engine" if dice.random() < engine.share else "front"
        living = processes_of(server.pid)[kind]
        if not living:
            continue
        victim = dice.choice(living)
        how = dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
        with suppress(ProcessLookupError):
            os.kill(victim, how)
            report.faults[f"{how.name} {kind}"] += 1
            if how is signal.SIGSTOP:
                await asyncio.sleep(dice.random())
                os.kill(victim, signal.SIGCONT)
        if dice.random() < 0.5 and not await healthy(address, True, engine.start_s):
            report.wrong.append("not serving again")


async def run(
    server: Process, address: str, metrics_port: int, number: int, seed: int, engine: Engine
) -> Report:
    report, stop, dice = Report(), asyncio.Event(), random.Random(seed)
    callers = [
        asyncio.create_task(call(address, random.Random(seed * 1000 + n), report, stop, engine))
        for n in range(NUM_CALLERS)
    ]
    await break_things(server, address, number, dice, report, engine)
    if not await healthy(address, True, engine.start_s):
        report.wrong.append("not serving at the end")
    before = report.ended["OK"]
    for _ in range(1200):
        await asyncio.sleep(0.05)
        if report.ended["OK"] > before + 50:
            break
    else:
        report.wrong.append("it does not answer at the end")
    stop.set()
    await asyncio.gather(*callers)
    held: dict[tuple[str, ...], float] = {}
    deadline = time.monotonic() + 20.0
    names = ("held_result_bytes", "engine_held_result_bytes", "queue_tokens", "queue_requests")
    while time.monotonic() < deadline:
        samples = await asyncio.to_thread(scrape, metrics_port, None)
        held = {key: value for key, value in samples.items() if key[0].removeprefix("layertap_") in names}
        if len(held) == len(names) and not any(held.values()):
            break
        await asyncio.sleep(0.1)
    else:
        report.wrong.append(f"still held: {held}")
    return report


def main(number: int, seed: int, engine: Engine | None = None) -> Report:
    engine = Engine() if engine is None else engine
    port = free_port()
    script = (sys.executable, str(Path(__file__).with_name("instant_server.py")), str(port))
    if engine.is_real:
        script += ("real",)
    with process(command=script) as server:
        address = server.wait_until_serving()
        report = asyncio.run(run(server, address, port, number, seed, engine))
        children = [pid for pids in processes_of(server.pid).values() for pid in pids]
        server.send(signal.SIGTERM)
        status = server.wait()
        if status != 0:
            report.wrong.append(f"exit status {status}")
        if any(Path(f"/proc/{pid}").exists() for pid in children):
            report.wrong.append("a process is left")
        report.wrong += [line for line in server.lines if "Traceback" in line or "never retrieved" in line]
        if report.wrong:
            print(*server.lines[-40:], sep="\n", file=sys.stderr)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=["instant", "real"], default="instant")
    options = parser.parse_args()
    begun = time.monotonic()
    found = main(options.number, options.seed, REAL if options.engine == "real" else None)
    print(dict(found.faults), dict(found.ended), f"{time.monotonic() - begun:.0f} s")
    print(*found.wrong, sep="\n")
    sys.exit(bool(found.wrong))

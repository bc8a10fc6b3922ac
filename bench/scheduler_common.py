"""Shared by the sections of `bench.scheduler`: its processes, and the results of a load."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from bench.bench import REPORTS, child
from bench.report import NUM_CORES
from layertap_server.config import Config

LOG = REPORTS / "scheduler.log"
REFUSED = 8  # RESOURCE_EXHAUSTED
# The deadline of calls above capacity.
TIMEOUT_S = 1.0


class Talker:
    """A process that answers each line of its input with a line of JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise click.ClickException(f"a process ended; {LOG} says why")
        return line

    def tell(self, line: str) -> None:
        print(line, file=self._process.stdin, flush=True)

    def ask(self, line: str) -> Any:
        self.tell(line)
        return json.loads(self.read())


@contextmanager
def talker(module: str, *arguments: str) -> Iterator[Talker]:
    command = [sys.executable, "-m", module, *arguments]
    with (
        LOG.open("a", encoding="utf-8") as log,
        child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        yield Talker(process)


@dataclass(frozen=True, slots=True)
class Calls:
    """The results of a load. Times are in seconds from the beginning of the load."""

    calls: Sequence[tuple[float, float, int, int]]  # begun, took, status, characters
    # Cores that the generator used, including its other loads at the same time.
    generator: float

    def took(self, *statuses: int) -> list[float]:
        """The times in seconds of the calls with this status, in ascending order; by default, of answered
        calls."""
        return sorted(took for _, took, status, _ in self.calls if status in (statuses or (0,)))

    @property
    def seconds(self) -> float:
        return max(begun + took for begun, took, _, _ in self.calls)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(status for _, _, status, _ in self.calls)

    @property
    def chars(self) -> int:
        """The characters of the answered texts: the amount of work is about proportional to them."""
        return sum(chars for _, _, status, chars in self.calls if not status)

    @property
    def rate(self) -> float:
        return len(self.took()) / self.seconds

    @property
    def left(self) -> float:
        """The share of the machine that the generator did not use."""
        return 1 - self.generator / NUM_CORES


@dataclass(frozen=True, slots=True)
class Bench:
    """The load generator and the settings of all sections."""

    source: str
    texts: Sequence[str]
    generator: Talker
    rounds: int
    open_s: float
    num_inputs: int = 0
    num_cancels: int = 0
    # The index of the first of those texts of which one in a hundred is poisoned.
    poisoned: int = 0

    def load(self, address: str, **load: Any) -> Calls:
        [calls] = self.loads({"address": address} | load)
        return calls

    def loads(self, *loads: dict[str, Any]) -> list[Calls]:
        """Runs the loads at the same time."""
        begun = time.perf_counter()
        reply = self.generator.ask(json.dumps(loads))
        generator = reply["cpu_s"] / (time.perf_counter() - begun)
        return [Calls(calls, generator) for calls in reply["calls"]]

    @contextmanager
    def serving(self, *arguments: str) -> Iterator[tuple[Talker, str]]:
        with talker("bench.scheduler_server", *arguments) as server:
            yield server, server.read()

    @contextmanager
    def echoing(self, *arguments: str) -> Iterator[tuple[Talker, str]]:
        with talker("bench.echo_server", *arguments) as server:
            yield server, server.read()


@contextmanager
def generating(texts: Sequence[str], *, rounds: int, open_s: float) -> Iterator[Bench]:
    """A load generator with these texts."""
    with talker("bench.scheduler_load") as generator:
        generator.tell(json.dumps(list(texts)))
        yield Bench(
            source=next(iter(Config().models().values())),
            texts=texts,
            generator=generator,
            rounds=rounds,
            open_s=open_s,
        )


def percentile(values: Sequence[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)] if values else float("nan")

"""Shared by the parts of `bench.wire`: server processes, and alternating measurements."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.wire_peers import HIDDEN_SHAPE
from layertap import TokenIds

ROOT = Path(__file__).resolve().parent.parent
STREAM = "/layertap.v1.EncoderService/EncodeStream"
LONG = TokenIds(list(range(1000, 1512)))
HIDDEN_BYTES = int(np.prod(HIDDEN_SHAPE)) * 4


@contextmanager
def process(module: str, *arguments: str) -> Iterator[tuple[str, int]]:
    """Yields the address that a server prints, and its process id; stops it at the end."""
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
    """The seconds of each, in rounds of varying order. The first round is a warm-up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in random.Random(number).sample(list(actions.items()), len(actions)):
            taken = seconds_of(action)
            if number:
                times[name].append(taken)
    return times


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(above) / statistics.median(below)

"""The metrics of all processes as those of one server."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from layertap_server.metrics import Sample, gauge

# Samples that are told apart by process; of all others the processes' sum is the server's.
OF_A_PROCESS = ("event_loop_lag_seconds",)

Key = tuple[str, tuple[tuple[str, str], ...]]


class MergedSamples:
    """Sums the samples of the processes. The counters of a process that has ended stay in the sums.

    The supervisor's event loop writes, and the thread of the metrics server reads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The last samples of each living process, by its name.
        self._living: dict[str, Sequence[Sample]] = {}
        # The sums of the counters of processes that have ended.
        self._ended: dict[Key, Sample] = {}
        self._models: set[str] = set()

    def put(self, process: str, samples: Sequence[Sample]) -> None:
        with self._lock:
            self._living[process] = samples
            self._models.update(dict(one.labels)["model"] for one in samples if one.title == "engine_up")

    def end(self, process: str) -> None:
        """The process has ended."""
        with self._lock:
            for one in self._living.pop(process, ()):
                if one.is_counter:
                    add(self._ended, one)

    def collect(self) -> Iterator[Sample]:
        sums: dict[Key, Sample] = {}
        with self._lock:
            for model in self._models:  # 0 while there is no engine process
                add(sums, gauge("engine_up", "1 while the engine is up", 0.0, model=model))
            for one in self._ended.values():
                add(sums, one)
            for process, samples in self._living.items():
                for one in samples:
                    if one.title in OF_A_PROCESS:
                        one = one._replace(labels=(*one.labels, ("process", process)))
                    add(sums, one)
        yield from sorted(sums.values(), key=lambda one: one.title)


def add(sums: dict[Key, Sample], one: Sample) -> None:
    key = one.title, one.labels
    known = sums.get(key)
    sums[key] = one if known is None else known._replace(value=known.value + one.value)

"""Metrics that show where the bottleneck is, for Prometheus, on a port of their own.

Nothing is counted here: `api.samples` and `engine_samples` read the counters of the service and of the engines.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from layertap_server.config import Config
from layertap_server.start_checks import StartError

LAG_PERIOD_S = 0.25
# The worst of this many measurements, those of ten seconds, is exported.
NUM_LAGS = 40


class Sample(NamedTuple):
    """One number; `labels` are pairs of a name and a value."""

    title: str
    text: str
    is_counter: bool
    labels: tuple[tuple[str, str], ...]
    value: float


class MetricsServer:
    """Serves samples over HTTP until `close`. Raises `OSError` when the port is taken."""

    def __init__(self, collect: Callable[[], Iterable[Sample]], host: str, port: int) -> None:
        """`collect` is called at each scrape, on a thread of the HTTP server."""
        self._collect = collect
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(port, host, registry)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """prometheus_client calls this."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for one in self._collect():
            family = families.get(one.title)
            if family is None:
                kind = CounterMetricFamily if one.is_counter else GaugeMetricFamily
                names = tuple(name for name, _ in one.labels)
                family = families[one.title] = kind(f"layertap_{one.title}", one.text, labels=names)
            family.add_metric(tuple(value for _, value in one.labels), one.value)
        return families.values()


def serve_metrics(collect: Callable[[], Iterable[Sample]], config: Config) -> MetricsServer:
    """The metrics server on the configured port. Raises `StartError` when the port is taken."""
    host, port = config.host, config.metrics_port
    try:
        return MetricsServer(collect, host, port)
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port} for metrics: {error.strerror}; choose another --metrics-port"
        ) from error


class LoopLag:
    """Measures by how much the event loop is late for a timer, until `close`."""

    def __init__(self) -> None:
        self._lags: deque[float] = deque([0.0], maxlen=NUM_LAGS)
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def close(self) -> None:
        self._watching.cancel()

    @property
    def largest_s(self) -> float:
        """The largest delay in the last ten seconds."""
        return max(self._lags)

    async def _watch(self) -> None:
        while True:
            begun_s = time.monotonic()
            await asyncio.sleep(LAG_PERIOD_S)
            self._lags.append(max(time.monotonic() - begun_s - LAG_PERIOD_S, 0.0))


def dropped(name: str, cause: str, stage: str, number: int) -> Sample:
    text = "Requests that were cancelled or whose deadline passed, by stage"
    return counter("dropped", text, number, model=name, cause=cause, stage=stage)


def gauge(title: str, text: str, value: float, **labels: str) -> Sample:
    return Sample(title, text, False, tuple(labels.items()), float(value))


def counter(title: str, text: str, value: float, **labels: str) -> Sample:
    return Sample(title, text, True, tuple(labels.items()), float(value))

"""Prometheus metrics that show where the bottleneck is, on a port of their own.

Nothing is counted here: at each scrape, the collector reads the counters of the service, the schedulers and
the engines.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from layertap_server.api.service import EncoderService
from layertap_server.served_model import EngineState, ServedModel

LAG_PERIOD_S = 0.25
# The worst of this many measurements, those of ten seconds, is exported.
NUM_LAGS = 40


class Metrics:
    """The metrics of one server, served over HTTP until `close`. Raises `OSError` when the port is taken."""

    def __init__(self, service: EncoderService, host: str, port: int) -> None:
        self._service = service
        self._lags: deque[float] = deque([0.0], maxlen=NUM_LAGS)
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(port, host, registry)
        self._watching = asyncio.get_running_loop().create_task(self._watch_loop())

    def close(self) -> None:
        self._watching.cancel()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    async def _watch_loop(self) -> None:
        """Measures by how much the event loop is late for a timer."""
        while True:
            begun_s = time.monotonic()
            await asyncio.sleep(LAG_PERIOD_S)
            self._lags.append(max(time.monotonic() - begun_s - LAG_PERIOD_S, 0.0))

    def collect(self) -> Iterator[Metric]:
        """prometheus_client calls this, on a thread of its own."""
        service = self._service
        yield gauge(
            "event_loop_lag_seconds",
            "Largest delay of the event loop in the last ten seconds",
            max(self._lags),
        )
        held = service.budget.reserved_bytes
        yield gauge(
            "held_result_bytes", "Bytes of results that are reserved or computed, and not sent yet", held
        )
        yield counter(
            "refused", "Requests answered with an error, by its reason", ("reason",), service.refused
        )
        reply_bytes = {output.name.lower(): num for output, num in service.reply_bytes.copy().items()}
        yield counter("reply_bytes", "Tensor bytes in replies, by output", ("output",), reply_bytes)
        models = list(service.models.items())
        for families in zip(*(families_of(name, model) for name, model in models), strict=True):
            first, *others = families
            for other in others:
                first.samples.extend(other.samples)
            yield first


def families_of(name: str, model: ServedModel) -> Iterator[Metric]:
    """The metrics of one model: for each model the same families in the same order."""
    scheduler, stats, cost = model.scheduler, model.scheduler.stats, model.scheduler.admission.cost

    def one_gauge(title: str, text: str, value: float) -> Metric:
        return gauge(title, text, value, name)

    def one_counter(title: str, text: str, value: float) -> Metric:
        return counter(title, text, ("model",), {name: value})

    num_waiting, age_s = scheduler.waiting()
    yield one_gauge("engine_up", "1 while the engine is up", model.state is EngineState.UP)
    yield one_counter("engine_restarts", "Restarts of the engine's threads", model.num_restarts)
    yield one_gauge("queue_tokens", "Tokens in the queue", scheduler.queued_tokens)
    yield one_gauge("queue_requests", "Requests in the queue", num_waiting)
    yield one_gauge("queue_age_seconds", "Age of the oldest request in the queue", age_s)
    yield one_counter(
        "queue_seconds", "Time in the queue until the first batch, summed over requests", stats.queue_ns / 1e9
    )
    yield one_counter("started_requests", "Requests that have started in a batch", stats.num_started)
    yield one_counter("engine_busy_seconds", "Time in forward passes; the rest is idle", stats.busy_ns / 1e9)
    yield one_counter("batches", "Batches that were run", stats.num_batches)
    yield one_counter("failed_batches", "Batches that failed, and were split", stats.num_failed_batches)
    yield one_counter("batch_inputs", "Inputs in those batches", stats.num_inputs)
    yield one_counter("batch_tokens", "Tokens in those batches", stats.num_tokens)
    yield one_counter(
        "batch_room_tokens", "Largest number of tokens that these batches could have had", stats.room_tokens
    )
    yield one_counter(
        "engine_rows", "Rows computed; those beyond the batches' tokens are padding", model.num_rows
    )
    yield one_gauge(
        "batch_max_tokens",
        "Limit of tokens in a batch, within the memory available now",
        scheduler.batch_tokens,
    )
    yield one_counter(
        "out_of_memory", "Batches that did not fit into memory", scheduler.memory_limit.num_failures
    )
    outcomes = {
        "admitted": stats.num_admitted,
        "answered": stats.num_answered,
        "failed": stats.num_failed,
    }
    labelled = {(name, outcome): value for outcome, value in outcomes.items()}
    yield counter("requests", "Requests by their outcome", ("model", "outcome"), labelled)
    dropped = {(name, *key): count for key, count in stats.dropped.copy().items()}
    dropped[name, "cancelled", "tokenizing"] = model.tokenization.num_cancelled
    labels = ("model", "cause", "stage")
    yield counter(
        "dropped", "Requests that were cancelled or whose deadline passed, by stage", labels, dropped
    )
    yield one_gauge("prediction_error_ratio", "Mean error of a batch's predicted time", cost.error)
    yield one_gauge("pace_ratio", "Current time of batches relative to their usual time", cost.slowdown)
    parts = {
        "batch": cost.fixed_ns,
        "token": cost.per_token_ns,
        "byte": cost.per_byte_ns,
        "map_element": cost.per_map_element_ns,
        "pooled_element": cost.per_pooled_element_ns,
        "output_step": cost.per_step_ns,
    }
    family = GaugeMetricFamily(
        "layertap_cost_seconds", "Predicted time of each unit of work", labels=("model", "per")
    )
    for part, value_ns in parts.items():
        family.add_metric((name, part), value_ns / 1e9)
    yield family


def gauge(title: str, text: str, value: float, model: str | None = None) -> Metric:
    family = GaugeMetricFamily(f"layertap_{title}", text, labels=() if model is None else ("model",))
    family.add_metric(() if model is None else (model,), float(value))
    return family


def counter(title: str, text: str, labels: tuple[str, ...], values: Any) -> Metric:
    """A family of counters; `values` are by label value, or by a tuple of label values."""
    family = CounterMetricFamily(f"layertap_{title}", text, labels=labels)
    for key, value in dict(values).items():
        family.add_metric((key,) if isinstance(key, str) else key, float(value))
    return family

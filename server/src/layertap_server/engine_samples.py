"""The metrics of the engine of one model."""

from __future__ import annotations

from collections.abc import Iterator

from layertap_server.engine_host import EngineHost
from layertap_server.metrics import Sample, counter, dropped, gauge
from layertap_server.serving import EngineState


def engine_samples(name: str, host: EngineHost) -> Iterator[Sample]:
    """The samples of the engine of the model `name`."""
    scheduler, stats, cost = host.scheduler, host.scheduler.stats, host.scheduler.admission.cost

    def one_gauge(title: str, text: str, value: float) -> Sample:
        return gauge(title, text, value, model=name)

    def one_counter(title: str, text: str, value: float) -> Sample:
        return counter(title, text, value, model=name)

    num_waiting, age_s = scheduler.waiting()
    yield one_gauge("engine_up", "1 while the engine is up", host.state is EngineState.UP)
    yield one_counter("engine_restarts", "Restarts of the engine's threads", host.num_restarts)
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
        "engine_rows", "Rows computed; those beyond the batches' tokens are padding", host.num_rows
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
    for outcome, number in outcomes.items():
        yield counter("requests", "Requests by their outcome", number, model=name, outcome=outcome)
    for (cause, stage), number in stats.dropped.copy().items():
        yield dropped(name, cause, stage, number)
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
    for part, value_ns in parts.items():
        text = "Predicted time of each unit of work"
        yield gauge("cost_seconds", text, value_ns / 1e9, model=name, per=part)

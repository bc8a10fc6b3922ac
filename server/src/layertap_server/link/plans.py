"""Output plans and model facts as JSON, and the check that a plan fits a model.

The front has resolved a request against the model before it sends the plan. The engine checks it again: a
fault in a front must not make the engine read or write outside of its memory.
"""

from __future__ import annotations

import zlib
from typing import Any

from layertap_server.link.plain_data import from_json, layout, to_json
from layertap_server.link.records import FORMAT, RecordError
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import EmbeddingPlan, LayerMerge, OutputPlan, Pooling

# What both ends of a link must have in common. It changes with the fields of plans and facts.
VERSION = f"{FORMAT}.{zlib.crc32((layout(OutputPlan) + layout(ModelFacts)).encode()):08x}"


def plan_to_json(plan: OutputPlan) -> Any:
    return to_json(plan)


def plan_from_json(data: Any) -> OutputPlan:
    """Raises `RecordError` for what is no plan."""
    try:
        return from_json(OutputPlan, data)
    except (TypeError, ValueError) as error:
        raise RecordError(f"no plan: {error}") from None


def facts_to_json(facts: ModelFacts) -> Any:
    return to_json(facts)


def facts_from_json(data: Any) -> ModelFacts:
    """Raises `TypeError` or `ValueError`."""
    return from_json(ModelFacts, data)


def check_plan(plan: OutputPlan, facts: ModelFacts, num_tokens: int) -> None:
    """Raises `RecordError` if the plan names something that the model, or a text of `num_tokens`, does not
    have."""
    last = facts.last_index
    if not plan.needs_model:
        raise RecordError("a plan without outputs")
    check_range(plan.hidden_states, last + 1, "hidden states")
    check_places(plan.hidden_places, plan.hidden_states)
    if plan.needs_pooler and not facts.has_pooler:
        raise RecordError("a plan with the pooler of a model without one")
    maps = plan.attentions
    if maps is not None:
        if not facts.has_attentions or not maps.layers or not maps.heads:
            raise RecordError("a plan with attention maps that the model does not have")
        check_range(maps.layers, facts.num_layers, "layers")
        check_range(maps.heads, facts.num_attention_heads, "heads")
        check_range(maps.query_positions, num_tokens, "query positions")
        check_counts(maps.head_counts, maps.heads)
        check_places(maps.layer_places, maps.layers)
        check_places(maps.head_places, maps.heads)
        check_places(maps.query_places, maps.query_positions)
    for one in plan.embeddings:
        check_embedding(one, facts, num_tokens)


def check_embedding(one: EmbeddingPlan, facts: ModelFacts, num_tokens: int) -> None:
    if not one.layers or not one.segments:
        raise RecordError("an embedding of nothing")
    check_range(one.layers, facts.last_index + 1, "layers")
    check_counts(one.layer_counts, one.layers)
    check_places(one.layer_places, one.layers)
    if not all(0 <= first < last <= num_tokens for first, last in one.segments):
        raise RecordError("an embedding of tokens that the text does not have")
    if one.is_projected and not facts.projected_size:
        raise RecordError("an embedding by modules that the model does not have")
    num_layers = 1
    if one.layer_merge is LayerMerge.CONCAT:
        num_layers = len(one.layers if one.layer_places is None else one.layer_places)
    num_poolings = len(one.pooling) if isinstance(one.pooling, tuple) else 1
    num_poolings *= 2 if one.pooling is Pooling.MEAN_MAX else 1
    size = facts.projected_size if one.is_projected else facts.hidden_size * num_layers * num_poolings
    if not 0 < one.dimensions <= size:
        raise RecordError(f"an embedding of {one.dimensions} dimensions, of {size}")


def check_range(values: tuple[int, ...] | None, end: int, what: str) -> None:
    if values and not (min(values) >= 0 and max(values) < end and len(set(values)) == len(values)):
        raise RecordError(f"a plan with {what} that are not there")


def check_places(places: tuple[int, ...] | None, values: tuple[int, ...] | None) -> None:
    if places is not None and not (values and places and min(places) >= 0 and max(places) < len(values)):
        raise RecordError("a plan with places that are not there")


def check_counts(counts: tuple[int, ...] | None, values: tuple[int, ...]) -> None:
    if counts is not None and not (len(counts) == len(values) and min(counts) > 0):
        raise RecordError("a plan with counts that do not fit")

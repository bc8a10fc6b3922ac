"""Output plans and model facts as plain JSON, and the check that a plan fits a model.

The front has resolved a request against the model before it sends the plan. The engine checks it again: a
fault in a front must not make the engine read or write outside of its memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from layertap_server.link.records import RecordError
from layertap_server.model_facts import ModelFacts, TokenizerOptions
from layertap_server.plan import (
    AttentionPlan,
    DType,
    EmbeddingPlan,
    Encoding,
    HeadKind,
    LayerMerge,
    OutputPlan,
    Pooling,
)

Poolings = Pooling | tuple[Pooling, ...]


def plan_to_json(plan: OutputPlan) -> list[Any]:
    maps = plan.attentions
    return [
        plan.wire_dtype,
        plan.last_hidden_state,
        plan.pooler_output,
        plan.hidden_states,
        plan.hidden_places,
        None
        if maps is None
        else [
            maps.layers,
            maps.heads,
            maps.mean_over_heads,
            maps.query_positions,
            maps.head_counts,
            maps.layer_places,
            maps.head_places,
            maps.query_places,
        ],
        [
            [
                one.pooling,
                one.layers,
                one.layer_merge,
                one.normalize,
                one.dimensions,
                one.encoding,
                one.segments,
                one.has_spans,
                one.is_projected,
                one.cuts_normalized,
                one.layer_counts,
                one.layer_places,
            ]
            for one in plan.embeddings
        ],
    ]


def plan_from_json(data: Any) -> OutputPlan:
    """Raises `RecordError` for what is no plan."""
    try:
        dtype, last, pooler, states, state_places, maps, embeddings = data
        return OutputPlan(
            wire_dtype=DType(dtype),
            last_hidden_state=bool(last),
            pooler_output=bool(pooler),
            hidden_states=numbers_or_none(states),
            hidden_places=numbers_or_none(state_places),
            attentions=None if maps is None else attentions_from(*maps),
            embeddings=tuple(embedding_from(*one) for one in embeddings),
        )
    except (TypeError, ValueError) as error:
        raise RecordError(f"no plan: {error}") from None


def attentions_from(
    layers: Any,
    heads: Any,
    mean: Any,
    queries: Any,
    head_counts: Any,
    layer_places: Any,
    head_places: Any,
    query_places: Any,
) -> AttentionPlan:
    return AttentionPlan(
        layers=numbers(layers),
        heads=numbers(heads),
        mean_over_heads=bool(mean),
        query_positions=numbers_or_none(queries),
        head_counts=numbers_or_none(head_counts),
        layer_places=numbers_or_none(layer_places),
        head_places=numbers_or_none(head_places),
        query_places=numbers_or_none(query_places),
    )


def embedding_from(
    pooling: Any,
    layers: Any,
    merge: Any,
    normalize: Any,
    dimensions: Any,
    encoding: Any,
    segments: Any,
    has_spans: Any,
    is_projected: Any,
    cuts_normalized: Any,
    layer_counts: Any,
    layer_places: Any,
) -> EmbeddingPlan:
    return EmbeddingPlan(
        pooling=poolings_from(pooling),
        layers=numbers(layers),
        layer_merge=LayerMerge(merge),
        normalize=bool(normalize),
        dimensions=number(dimensions),
        encoding=Encoding(encoding),
        segments=tuple((number(first), number(last)) for first, last in segments),
        has_spans=bool(has_spans),
        is_projected=bool(is_projected),
        cuts_normalized=bool(cuts_normalized),
        layer_counts=numbers_or_none(layer_counts),
        layer_places=numbers_or_none(layer_places),
    )


def poolings_from(data: Any) -> Poolings:
    return tuple(Pooling(one) for one in data) if isinstance(data, list | tuple) else Pooling(data)


def number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def numbers(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple([number(value) for value in values])


def numbers_or_none(values: Iterable[Any] | None) -> tuple[int, ...] | None:
    return None if values is None else numbers(values)


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
    check_scores(plan, facts, num_tokens)


def check_scores(plan: OutputPlan, facts: ModelFacts, num_tokens: int) -> None:
    """Checks logits and sparse vectors."""
    logits, sparse = plan.logits, plan.sparse
    if logits is not None:
        of_model = facts.num_labels, facts.head.scores_tokens
        if facts.head is HeadKind.NONE or (logits.num_labels, logits.scores_tokens) != of_model:
            raise RecordError("a plan with logits that the model does not have")
        if not 0 <= logits.top_k <= facts.num_labels:
            raise RecordError(f"the {logits.top_k} highest of {facts.num_labels} labels")
        positions = logits.positions
        if positions is not None and not (
            logits.scores_tokens and positions and min(positions) >= 0 and max(positions) < num_tokens
        ):
            raise RecordError("a plan with logits of tokens that are not there")
    if sparse is not None and not (facts.has_sparse and 0 < sparse.max_entries <= facts.num_labels):
        raise RecordError("a plan with a sparse vector that the model does not have")


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


def facts_to_json(facts: ModelFacts) -> dict[str, Any]:
    data = {spec.name: getattr(facts, spec.name) for spec in fields(facts)}
    data["prompts"] = dict(facts.prompts)
    data["tokenizer"] = {**asdict(facts.tokenizer), "arguments": dict(facts.tokenizer.arguments)}
    return data


def facts_from_json(data: dict[str, Any]) -> ModelFacts:
    return ModelFacts(
        **{
            **data,
            "default_pooling": poolings_from(data["default_pooling"]),
            "compute_dtype": DType(data["compute_dtype"]),
            "tokenizer": TokenizerOptions(**data["tokenizer"]),
        }
    )

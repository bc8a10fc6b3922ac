"""Output plans and model facts as JSON, and the check that a plan fits a model.

The front has resolved a request against the model before it sends the plan. The engine checks it again: a
fault in a front must not make the engine read or write outside of its memory.
"""

from __future__ import annotations

import zlib
from typing import Any

from layertap_server.enums import HeadKind, LayerMerge, Pooling, concatenated
from layertap_server.link.plain_data import from_json, layout, to_json
from layertap_server.link.records import FORMAT, RecordError
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import AttentionPlan, EmbeddingPlan, LogitsPlan
from layertap_server.plan import NUM_OUTER_TOKENS, OutputPlan

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
    check_positions(plan.last_positions, num_tokens)
    check_positions(plan.hidden_positions, num_tokens)
    check_places(plan.hidden_places, plan.hidden_states)
    if plan.needs_pooler and not facts.has_pooler:
        raise RecordError("a plan with the pooler of a model without one")
    maps = plan.attentions
    if maps is not None:
        if not facts.has_attentions or not maps.layers or not maps.num_maps:
            raise RecordError("a plan with attention maps that the model does not have")
        check_range(maps.layers, facts.num_layers, "layers")
        check_positions(maps.key_positions, num_tokens)
        check_pairs(maps, facts)
        check_range(maps.heads, facts.num_attention_heads, "heads")
        check_range(maps.query_positions, num_tokens, "query positions")
        check_counts(maps.head_counts, maps.heads)
        check_places(maps.layer_places, maps.layers)
        check_places(maps.head_places, maps.heads)
        check_places(maps.query_places, maps.query_positions)
    if plan.contacts and not (facts.has_contacts and num_tokens > NUM_OUTER_TOKENS):
        raise RecordError("a plan with a contact map that the model, or the text, does not have")
    for one in plan.embeddings:
        check_embedding(one, facts, num_tokens)
    if plan.logits is not None:
        check_logits(plan.logits, facts, num_tokens)
    if plan.sparse is not None and not (facts.has_sparse and 0 < plan.sparse.max_entries <= facts.num_labels):
        raise RecordError("a plan with a sparse vector that the model does not have")


def check_logits(one: LogitsPlan, facts: ModelFacts, num_tokens: int) -> None:
    is_own = (one.num_labels, one.scores_tokens) == (facts.num_labels, facts.head.scores_tokens)
    if facts.head is HeadKind.NONE or not is_own or not 0 <= one.top_k <= one.num_labels:
        raise RecordError("a plan with logits that the model does not have")
    if one.positions is not None and not one.scores_tokens:
        raise RecordError("a plan with logits of tokens, of a head that scores texts")
    check_positions(one.positions, num_tokens)


def check_embedding(one: EmbeddingPlan, facts: ModelFacts, num_tokens: int) -> None:
    if not one.layers or not one.segments:
        raise RecordError("an embedding of nothing")
    check_range(one.layers, facts.last_index + 1, "layers")
    check_counts(one.layer_counts, one.layers)
    check_places(one.layer_places, one.layers)
    if one.kept is not None:
        check_range(one.kept, num_tokens, "tokens")
        num_tokens = len(one.kept)
    if not all(0 <= first < last <= num_tokens for first, last in one.segments):
        raise RecordError("an embedding of tokens that the text does not have")
    if one.pooling is Pooling.NONE and one.has_spans:
        raise RecordError("an embedding of spans without pooling")
    if one.is_projected > (facts.projected_size > 0) or one.projects_tokens > (
        facts.projected_token_size > 0
    ):
        raise RecordError("an embedding by modules that the model does not have")
    num_layers = 1
    if one.layer_merge is LayerMerge.CONCAT:
        num_layers = len(one.layers if one.layer_places is None else one.layer_places)
    poolings = concatenated(one.pooling)
    if len(poolings) > 1 and (Pooling.NONE in poolings or Pooling.POOLER in poolings):
        raise RecordError("an embedding by poolings that cannot be concatenated")
    if (one.is_projected or one.projects_tokens) and num_layers > 1:
        raise RecordError("an embedding of several layers by modules")
    size = facts.projected_token_size if one.projects_tokens else facts.hidden_size * num_layers
    size = facts.projected_size if one.is_projected else size * len(poolings)
    if not 0 < one.dimensions <= size:
        raise RecordError(f"an embedding of {one.dimensions} dimensions, of {size}")


def check_range(values: tuple[int, ...] | None, end: int, what: str) -> None:
    if values and not (min(values) >= 0 and max(values) < end and len(set(values)) == len(values)):
        raise RecordError(f"a plan with {what} that are not there")


def check_positions(values: tuple[int, ...] | None, num_tokens: int) -> None:
    """Positions that are only copied, so that they may repeat."""
    if values is not None and not (values and min(values) >= 0 and max(values) < num_tokens):
        raise RecordError("a plan with tokens that are not there")


def check_pairs(maps: AttentionPlan, facts: ModelFacts) -> None:
    pairs = maps.pairs
    if pairs is None:
        if maps.pair_places is not None:
            raise RecordError("a plan with places of pairs that are not there")
        return
    check_range(
        tuple([layer * facts.num_attention_heads + head for layer, head in pairs]),
        facts.num_layers * facts.num_attention_heads,
        "pairs",
    )
    check_range(tuple({head for _, head in pairs}), facts.num_attention_heads, "heads")
    check_places(maps.pair_places, maps.layers and tuple(range(len(pairs))))
    is_plain = not maps.heads and not maps.mean_over_heads and maps.layer_places is None is maps.head_places
    if (
        list(pairs) != sorted(pairs)
        or maps.layers != tuple(sorted({layer for layer, _ in pairs}))
        or not is_plain
    ):
        raise RecordError("a plan with pairs that are not those of its layers")


def check_places(places: tuple[int, ...] | None, values: tuple[int, ...] | None) -> None:
    if places is not None and not (values and places and min(places) >= 0 and max(places) < len(values)):
        raise RecordError("a plan with places that are not there")


def check_counts(counts: tuple[int, ...] | None, values: tuple[int, ...]) -> None:
    if counts is not None and not (len(counts) == len(values) and min(counts) > 0):
        raise RecordError("a plan with counts that do not fit")

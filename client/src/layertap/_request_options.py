"""The keyword options of a request, from its message: the inverse of `_requests.encode_request`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from layertap._enums import (
    ACTIVATIONS,
    ENCODINGS,
    LAYER_MERGES,
    POOLINGS,
    PRIORITIES,
    TRUNCATIONS,
    UNITS,
    WIRE_DTYPES,
    name_of,
)
from layertap._types import Attentions, Embedding, EncodeOptions, HiddenStates, Logits, Span, Sparse
from layertap.v1 import encoder_pb2 as pb


def options_of(request: pb.EncodeRequest) -> EncodeOptions:
    """The options with which `encode_request` makes this request; those with their default are left out."""
    outputs = request.outputs
    flags = ("last_hidden_state", "pooler_output", "tokens", "contacts")
    options: dict[str, Any] = {name: True for name in flags if getattr(outputs, name)}
    if outputs.last_hidden_state_positions:
        options["last_hidden_state_positions"] = tuple(outputs.last_hidden_state_positions)
    if outputs.HasField("hidden_states"):
        states = outputs.hidden_states
        options["hidden_states"] = HiddenStates(tuple(states.layers), tuple(states.positions))
    if outputs.HasField("attentions"):
        maps = outputs.attentions
        options["attentions"] = Attentions(
            layers=tuple(maps.layers),
            heads=tuple(maps.heads),
            mean_over_heads=maps.mean_over_heads,
            query_positions=tuple(maps.query_positions),
            key_positions=tuple(maps.key_positions),
            pairs=tuple((pair.layer, pair.head) for pair in maps.pairs),
        )
    if outputs.embeddings:
        options["embeddings"] = [_embedding(spec) for spec in outputs.embeddings]
    if outputs.HasField("logits"):
        logits = outputs.logits
        activation: Any = _name(logits.activation, ACTIVATIONS)
        options["logits"] = Logits(tuple(logits.positions), logits.top_k, activation)
    if outputs.HasField("sparse"):
        options["sparse"] = Sparse(outputs.sparse.top_k)
    others = {
        "model": request.model,
        "dtype": _name(request.wire_dtype, WIRE_DTYPES),
        "truncation": _name(request.truncation, TRUNCATIONS),
        "max_tokens": request.max_tokens,
        "prompt_name": request.prompt_name,
        "prompt": request.prompt,
        "priority": _name(request.priority, PRIORITIES),
    }
    options |= {name: value for name, value in others.items() if value}
    return cast(EncodeOptions, options)


def _embedding(spec: pb.EmbeddingSpec) -> Embedding:
    poolings = tuple(_name(one, POOLINGS) for one in spec.poolings)
    named: Any = {
        "pooling": poolings or _name(spec.pooling, POOLINGS),
        "layer_merge": _name(spec.layer_merge, LAYER_MERGES),
        "encoding": _name(spec.encoding, ENCODINGS),
    }
    return Embedding(
        layers=tuple(spec.layers),
        normalize=spec.normalize if spec.HasField("normalize") else None,
        dimensions=spec.dimensions,
        spans=tuple(_span(span) for span in spec.spans),
        exclude_special_tokens=spec.exclude_special_tokens,
        without_projection=spec.without_projection,
        **named,
    )


def _span(span: pb.Span) -> Span:
    unit: Any = _name(span.unit, UNITS) or "character"
    return Span(span.start, span.end, unit)


def _name(number: int, known: Mapping[str, int]) -> str | None:
    return name_of(number, known) or None

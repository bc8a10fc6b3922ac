"""Checks the outputs that a request selects against the model's facts and converts them to plain data. Its
inputs are checked in `input_validation.py`.

Everything that can be refused before tokenizing is refused in these two; `planning.py` checks the rest once
an input's tokens are known. Each error names the field as it is spelled in the contract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import numpy as np

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import (
    CONFIGURED_ONLY,
    AttentionPlan,
    DType,
    Encoding,
    LayerMerge,
    Places,
    Pooling,
    concatenated,
    counted,
    distinct,
)

WIRE_DTYPES = {0: DType.FLOAT32, 1: DType.FLOAT32, 2: DType.FLOAT16, 3: DType.BFLOAT16}

# Limits for one request, far above what is needed: each embedding and span costs microseconds on the event
# loop, for every input.
MAX_EMBEDDINGS = 256
MAX_SPANS = 512
# The limit for all inputs of a request together: each vector takes a few hundred bytes besides its data.
MAX_VECTORS = 2**16
# The limit for one vector. In float32 it takes 16 MiB, and several times that while it is converted.
MAX_DIMENSIONS = 2**22
# More indices than this are checked as an array.
MANY_INDICES = 64

EnumT = TypeVar("EnumT", bound=IntEnum)


@dataclass(frozen=True, slots=True)
class Span:
    start: int
    end: int
    in_characters: bool


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """An EmbeddingSpec with the model's defaults filled in. Its spans are not resolved to tokens yet."""

    pooling: Pooling | tuple[Pooling, ...]
    # Each layer is listed once, as in `EmbeddingPlan`.
    layers: tuple[int, ...]
    layer_counts: tuple[int, ...] | None
    layer_places: Places | None
    layer_merge: LayerMerge
    normalize: bool
    dimensions: int
    encoding: Encoding
    spans: tuple[Span, ...]
    # Whether it uses the pooling configured with the model; its other settings then apply too.
    is_configured: bool = False
    is_projected: bool = False
    cuts_normalized: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """An OutputSelection, valid for the model."""

    wire_dtype: DType
    last_hidden_state: bool
    pooler_output: bool
    # Each hidden state is listed once, as in `OutputPlan`.
    hidden_states: tuple[int, ...] | None
    hidden_places: Places | None
    # Its query positions are as requested: whether two name the same row depends on the input's length.
    attentions: AttentionPlan | None
    embeddings: tuple[EmbeddingRequest, ...]
    tokens: bool

    @property
    def needs_model(self) -> bool:
        """Whether any output needs a forward pass; as `OutputPlan.needs_model`, before there is a plan."""
        layers = self.hidden_states is not None or self.attentions is not None
        return bool(self.last_hidden_state or self.pooler_output or layers or self.embeddings)

    @property
    def wants_configured(self) -> bool:
        """Whether one of the embeddings is the model's configured one."""
        return any(embedding.is_configured for embedding in self.embeddings)


def known_enum(
    kind: type[EnumT], value: int, default: EnumT, field: str, hidden: Sequence[EnumT] = ()
) -> EnumT:
    """The enum's member with this number; the default for 0.

    Raises a `RequestError` that names the field for an unknown number and for that of a `hidden` member.
    """
    if value == 0:
        return default
    try:
        if value in hidden:
            raise ValueError
        return kind(value)
    except ValueError:
        known = ", ".join(f"{member.value} ({member.name})" for member in kind if member not in hidden)
        raise errors.invalid_argument(
            field, f"unknown value {value}; known values are {known}", reason="UNKNOWN_ENUM"
        ) from None


def indices_in(values: Sequence[int], size: int, field: str, what: str) -> tuple[int, ...]:
    """The indices as 0…size-1, where negative ones count from the end; all indices if `values` is empty."""
    if not values:
        return tuple(range(size))
    if len(values) > MANY_INDICES:
        array = np.array(values[:], np.int64)
        if array.min() >= -size and array.max() < size:
            return tuple((array % size).tolist())
    for i, value in enumerate(values):
        if not -size <= value < size:
            raise errors.invalid_argument(
                f"{field}[{i}]",
                f"{value} is out of range: there are {size} {what}, 0 to {size - 1} or -{size} to -1",
                reason="OUT_OF_RANGE",
            )
    return tuple(value % size for value in values)


def check_count(num: int, limit: int, field: str) -> None:
    if num > limit:
        raise errors.invalid_argument(
            field, f"{num} exceed {limit}, the limit for one request; split the request", reason="TOO_MANY"
        )


def parse_selection(request: pb.EncodeRequest, facts: ModelFacts) -> Selection:
    outputs = request.outputs
    check_count(len(outputs.embeddings), MAX_EMBEDDINGS, "outputs.embeddings")
    check_count(sum(len(spec.spans) for spec in outputs.embeddings), MAX_SPANS, "outputs.embeddings.spans")
    if request.wire_dtype not in WIRE_DTYPES:
        raise errors.invalid_argument(
            "wire_dtype",
            f"unknown value {request.wire_dtype}; known values for float tensors are 1 (FLOAT32), 2 (FLOAT16), 3 (BFLOAT16)",
            reason="UNKNOWN_ENUM",
        )
    wire_dtype = WIRE_DTYPES[request.wire_dtype]
    hidden_states, hidden_places = None, None
    if outputs.HasField("hidden_states"):
        field = "outputs.hidden_states.layers"
        asked = indices_in(outputs.hidden_states.layers, facts.num_layers + 1, field, "hidden states")
        hidden_states, hidden_places = distinct(asked)
    selection = Selection(
        wire_dtype=wire_dtype,
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=outputs.pooler_output,
        hidden_states=hidden_states,
        hidden_places=hidden_places,
        attentions=parse_attentions(outputs.attentions, facts) if outputs.HasField("attentions") else None,
        embeddings=tuple(
            parse_embedding(spec, f"outputs.embeddings[{i}]", facts, wire_dtype)
            for i, spec in enumerate(outputs.embeddings)
        ),
        tokens=outputs.tokens,
    )
    if outputs.pooler_output:
        require_pooler(facts, "outputs.pooler_output")
    if not (
        outputs.last_hidden_state
        or outputs.pooler_output
        or outputs.tokens
        or outputs.embeddings
        or selection.hidden_states is not None
        or selection.attentions is not None
    ):
        raise errors.invalid_argument(
            "outputs", "nothing is selected; set at least one output", reason="NOTHING_SELECTED"
        )
    return selection


def check_num_vectors(selection: Selection, num_inputs: int) -> None:
    if (num := num_inputs * len(selection.embeddings)) > MAX_VECTORS:
        raise errors.invalid_argument(
            "outputs.embeddings",
            f"{num_inputs} inputs with {len(selection.embeddings)} embeddings each are {num} vectors, more than "
            f"{MAX_VECTORS}, the limit for one request; split the request",
            reason="TOO_MANY",
        )


def require_pooler(facts: ModelFacts, field: str) -> None:
    if not facts.has_pooler:
        raise errors.output_unavailable(
            "NO_POOLER",
            field,
            f"the model '{facts.name}' has no pooler; request an embedding with another pooling",
        )


def parse_attentions(asked: pb.AttentionSelection, facts: ModelFacts) -> AttentionPlan:
    field = "outputs.attentions"
    if not facts.has_attentions:
        raise errors.output_unavailable(
            "NO_ATTENTIONS", field, f"the model '{facts.name}' has no attention maps; do not select any"
        )
    layers, layer_places = distinct(indices_in(asked.layers, facts.num_layers, f"{field}.layers", "layers"))
    asked_heads = indices_in(asked.heads, facts.num_attention_heads, f"{field}.heads", "heads")
    heads, head_counts, head_places = asked_heads, None, None
    if asked.mean_over_heads:
        heads, head_counts = counted(asked_heads)
    else:
        heads, head_places = distinct(asked_heads)
    return AttentionPlan(
        layers=layers,
        heads=heads,
        mean_over_heads=asked.mean_over_heads,
        query_positions=tuple(asked.query_positions) or None,
        head_counts=head_counts,
        layer_places=layer_places,
        head_places=head_places,
    )


def parse_embedding(
    spec: pb.EmbeddingSpec, field: str, facts: ModelFacts, wire_dtype: DType
) -> EmbeddingRequest:
    is_configured = spec.pooling == 0
    if is_configured and facts.embedding_unsupported:
        raise errors.output_unavailable(
            "EMBEDDING_UNSUPPORTED",
            f"{field}.pooling",
            f"the configured embedding of '{facts.name}' is not supported: {facts.embedding_unsupported}; set a pooling",
        )
    pooling = (
        facts.default_pooling
        if is_configured
        else known_enum(Pooling, spec.pooling, Pooling.MEAN, f"{field}.pooling", CONFIGURED_ONLY)
    )
    layer_merge = known_enum(LayerMerge, spec.layer_merge, LayerMerge.CONCAT, f"{field}.layer_merge")
    encoding = known_enum(Encoding, spec.encoding, Encoding(wire_dtype.value), f"{field}.encoding")
    layers: tuple[int, ...] = (facts.last_index,)
    if spec.layers:
        layers = indices_in(spec.layers, facts.num_layers + 1, f"{field}.layers", "hidden states")
    if pooling is Pooling.POOLER:
        require_pooler(facts, f"{field}.pooling")
        if layers not in ((facts.last_index,), (facts.num_layers,)):
            raise errors.invalid_argument(
                f"{field}.layers",
                "the model's pooler reads only the last layer; leave this empty",
                reason="POOLER_LAYERS",
            )
        layers = (facts.last_index,)
        if spec.spans:
            raise errors.invalid_argument(
                f"{field}.spans",
                "the model's pooler reads the whole input; leave this empty",
                reason="POOLER_SPANS",
            )
    width = facts.hidden_size * (len(layers) if layer_merge is LayerMerge.CONCAT else 1)
    is_projected = is_configured and facts.projected_size > 0
    if is_projected and width != facts.hidden_size:
        raise errors.invalid_argument(
            f"{field}.layers",
            f"these layers give {width} dimensions, and the modules of the model's configured embedding need "
            f"{facts.hidden_size}; leave this empty, set layer_merge to MEAN or SUM, or set a pooling",
            reason="LAYERS_DO_NOT_FIT",
        )
    width = facts.projected_size if is_projected else width * len(concatenated(pooling))
    if spec.dimensions > width:
        raise errors.invalid_argument(
            f"{field}.dimensions",
            f"{spec.dimensions} is more than the vector's {width}",
            reason="OUT_OF_RANGE",
        )
    default_dimensions = facts.default_dimensions if is_configured and facts.default_dimensions else width
    # As sentence-transformers does: it truncates after normalizing if the request sets neither of the two.
    cuts_normalized = default_dimensions < width and not spec.dimensions and not spec.HasField("normalize")
    dimensions = spec.dimensions or min(default_dimensions, width)
    if dimensions > MAX_DIMENSIONS:
        raise errors.invalid_argument(
            f"{field}.layers",
            f"the vector would have {dimensions} dimensions, more than the limit of {MAX_DIMENSIONS}; select fewer "
            "layers, or set dimensions",
            reason="TOO_MANY",
        )
    counts, places = None, None
    if layer_merge is LayerMerge.CONCAT:
        # Layers after the last dimension that is kept are not needed. (Of several poolings, the first one's
        # vectors of all layers come first.)
        needed = width if is_projected or cuts_normalized else dimensions
        layers, places = distinct(layers[: math.ceil(needed / facts.hidden_size)])
    else:
        layers, counts = counted(layers)
        if len(layers) == 1 and layer_merge is LayerMerge.MEAN:
            counts = None
    spans = []
    for i, span in enumerate(spec.spans):
        span_field = f"{field}.spans[{i}]"
        unit = known_enum(SpanUnit, span.unit, SpanUnit.CHARACTER, f"{span_field}.unit")
        if span.start >= span.end:
            raise errors.invalid_argument(
                span_field,
                f"[{span.start}, {span.end}) is empty; end must be after start",
                reason="EMPTY_SPAN",
            )
        spans.append(Span(span.start, span.end, unit is SpanUnit.CHARACTER))
    return EmbeddingRequest(
        pooling=pooling,
        layers=layers,
        layer_counts=counts,
        layer_places=places,
        layer_merge=layer_merge,
        normalize=spec.normalize if spec.HasField("normalize") else facts.default_normalize,
        dimensions=dimensions,
        encoding=encoding,
        spans=tuple(spans),
        is_configured=is_configured,
        is_projected=is_projected,
        cuts_normalized=cuts_normalized,
    )


class SpanUnit(IntEnum):
    """`layertap.v1.Span.Unit`."""

    CHARACTER = 1
    TOKEN = 2

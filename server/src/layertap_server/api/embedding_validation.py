"""Checks an EmbeddingSpec against the model's facts and fills in the model's defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors
from layertap_server.api.field_values import indices_in, known_enum
from layertap_server.enums import DType, Encoding, LayerMerge, Pooling, concatenated
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import Places, counted, distinct

# The limit for one vector. In float32 it takes 16 MiB, and several times that while it is converted.
MAX_DIMENSIONS = 2**22
# The limit of poolings that are concatenated, far above the number of different ones.
MAX_POOLINGS = 16


class SpanUnit(IntEnum):
    """`layertap.v1.Span.Unit`."""

    CHARACTER = 1
    TOKEN = 2
    WORD = 3


@dataclass(frozen=True, slots=True)
class Span:
    start: int
    end: int
    unit: SpanUnit


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
    excludes_special: bool = False
    # Whether it uses the pooling configured with the model; its other settings then apply too.
    is_configured: bool = False
    is_projected: bool = False
    projects_tokens: bool = False
    cuts_normalized: bool = False

    @property
    def depends_on_text(self) -> bool:
        """Whether the rows that it is computed from depend on more than the number of tokens."""
        return self.excludes_special or any(span.unit is not SpanUnit.TOKEN for span in self.spans)


def parse_embedding(
    spec: pb.EmbeddingSpec, field: str, facts: ModelFacts, wire_dtype: DType
) -> EmbeddingRequest:
    is_configured = spec.pooling == 0 and not spec.poolings
    if is_configured and facts.embedding_unsupported:
        raise errors.output_unavailable(
            "EMBEDDING_UNSUPPORTED",
            f"{field}.pooling",
            f"the configured embedding of '{facts.name}' is not supported: {facts.embedding_unsupported}; set a pooling",
        )
    pooling = facts.default_pooling if is_configured else parse_pooling(spec, field)
    layer_merge = known_enum(LayerMerge, spec.layer_merge, LayerMerge.CONCAT, f"{field}.layer_merge")
    encoding = known_enum(Encoding, spec.encoding, Encoding(wire_dtype.value), f"{field}.encoding")
    layers: tuple[int, ...] = (facts.last_index,)
    if spec.layers:
        layers = indices_in(spec.layers, facts.num_layers + 1, f"{field}.layers", "hidden states")
    if pooling is Pooling.POOLER:
        check_pooler(spec, field, layers, facts)
        layers = (facts.last_index,)
    if pooling is Pooling.NONE and spec.spans:
        raise errors.conflicting(
            f"{field}.spans", "without pooling, each token has a vector; leave this empty"
        )
    width = facts.hidden_size * (len(layers) if layer_merge is LayerMerge.CONCAT else 1)
    projects_tokens = is_configured and facts.projected_token_size > 0
    is_projected = is_configured and facts.projected_size > 0 and not spec.without_projection
    if (projects_tokens or is_projected) and width != facts.hidden_size:
        raise errors.invalid_argument(
            f"{field}.layers",
            f"these layers give {width} dimensions, and the modules of the model's configured embedding need "
            f"{facts.hidden_size}; leave this empty, set layer_merge to MEAN or SUM, or set a pooling",
            reason="LAYERS_DO_NOT_FIT",
        )
    if projects_tokens:
        width = facts.projected_token_size
    width = facts.projected_size if is_projected else width * len(concatenated(pooling))
    if spec.dimensions > width:
        raise errors.invalid_argument(
            f"{field}.dimensions",
            f"{spec.dimensions} is more than the vector's {width}",
            reason="OUT_OF_RANGE",
        )
    # The configured number of dimensions is that of the vector behind the modules.
    is_whole = is_configured and is_projected == (facts.projected_size > 0)
    default_dimensions = facts.default_dimensions if is_whole and facts.default_dimensions else width
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
        needed = width if is_projected or projects_tokens or cuts_normalized else dimensions
        layers, places = distinct(layers[: math.ceil(needed / facts.hidden_size)])
    else:
        layers, counts = counted(layers)
        if len(layers) == 1 and layer_merge is LayerMerge.MEAN:
            counts = None
    return EmbeddingRequest(
        pooling=pooling,
        layers=layers,
        layer_counts=counts,
        layer_places=places,
        layer_merge=layer_merge,
        normalize=spec.normalize if spec.HasField("normalize") else facts.default_normalize,
        dimensions=dimensions,
        encoding=encoding,
        spans=parse_spans(spec.spans, f"{field}.spans"),
        excludes_special=spec.exclude_special_tokens,
        is_configured=is_configured,
        is_projected=is_projected,
        projects_tokens=projects_tokens,
        cuts_normalized=cuts_normalized,
    )


def parse_pooling(spec: pb.EmbeddingSpec, field: str) -> Pooling | tuple[Pooling, ...]:
    """The pooling, or the poolings to concatenate, that a spec names."""
    if not spec.poolings:
        return known_enum(Pooling, spec.pooling, Pooling.MEAN, f"{field}.pooling")
    if spec.pooling:
        raise errors.conflicting(
            f"{field}.pooling", "poolings are in place of it; leave one of the two empty"
        )
    if len(spec.poolings) > MAX_POOLINGS:
        raise errors.invalid_argument(
            f"{field}.poolings", f"{len(spec.poolings)} exceed the limit of {MAX_POOLINGS}", reason="TOO_MANY"
        )
    named = [known_enum(Pooling, one, None, f"{field}.poolings[{i}]") for i, one in enumerate(spec.poolings)]
    if len(named) == 1:
        return named[0]
    for i, one in enumerate(named):
        if one in (Pooling.NONE, Pooling.POOLER):
            raise errors.conflicting(
                f"{field}.poolings[{i}]",
                f"{one.name} cannot be concatenated with other poolings; ask for it as an embedding of its own",
            )
    return tuple([single for one in named for single in concatenated(one)])


def check_pooler(spec: pb.EmbeddingSpec, field: str, layers: tuple[int, ...], facts: ModelFacts) -> None:
    """Refuses what the model's own pooler cannot do."""
    require_pooler(facts, f"{field}.pooling")
    if layers not in ((facts.last_index,), (facts.num_layers,)):
        raise errors.invalid_argument(
            f"{field}.layers",
            "the model's pooler reads only the last layer; leave this empty",
            reason="POOLER_LAYERS",
        )
    if spec.spans:
        raise errors.invalid_argument(
            f"{field}.spans",
            "the model's pooler reads the whole input; leave this empty",
            reason="POOLER_SPANS",
        )
    if spec.exclude_special_tokens:
        raise errors.conflicting(
            f"{field}.exclude_special_tokens", "the model's pooler reads the whole input; leave this off"
        )


def require_pooler(facts: ModelFacts, field: str) -> None:
    if not facts.has_pooler:
        raise errors.output_unavailable(
            "NO_POOLER",
            field,
            f"the model '{facts.name}' has no pooler; request an embedding with another pooling",
        )


def parse_spans(spans: Sequence[pb.Span], field: str) -> tuple[Span, ...]:
    found = []
    for i, span in enumerate(spans):
        unit = known_enum(SpanUnit, span.unit, SpanUnit.CHARACTER, f"{field}[{i}].unit")
        if span.start >= span.end:
            raise errors.invalid_argument(
                f"{field}[{i}]",
                f"[{span.start}, {span.end}) is empty; end must be after start",
                reason="EMPTY_SPAN",
            )
        found.append(Span(span.start, span.end, unit))
    return tuple(found)

"""What single outputs of one input ask for: resolved indices, and shapes.

An index that was asked for repeatedly is computed once, where computing costs more than a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from layertap_server.enums import Activation, Encoding, LayerMerge, Pooling, concatenated

Places = tuple[int, ...]
"""Of indices that were asked for repeatedly: for each that was asked, its number among those that are computed."""


def distinct(asked: tuple[int, ...]) -> tuple[tuple[int, ...], Places | None]:
    """The indices to compute, each once, and their places in the reply; None if no index is repeated."""
    if len(set(asked)) == len(asked):
        return asked, None
    values, places = np.unique(np.array(asked, np.int64), return_inverse=True)
    return tuple(values.tolist()), tuple(places.tolist())


def counted(asked: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The indices to compute, each once, and how often each was asked for; None if no index is repeated."""
    if len(set(asked)) == len(asked):
        return asked, None
    values, counts = np.unique(np.array(asked, np.int64), return_counts=True)
    return tuple(values.tolist()), tuple(counts.tolist())


def num_asked(computed: Sequence[int], places: Places | None) -> int:
    return len(computed if places is None else places)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Attention maps of `layers` × `heads`, or of `pairs` of a layer and a head; indices in 0…L-1 and 0…A-1.

    The listed indices are those to compute: an index that was asked for repeatedly is listed once, and the
    `…_places` are its places in the reply. `head_counts` are the weights of the heads in the mean over heads.
    """

    # With pairs: the layers of the pairs, ascending, and no heads.
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    mean_over_heads: bool
    # The rows of the maps; None: every row.
    query_positions: tuple[int, ...] | None
    head_counts: tuple[int, ...] | None = None
    layer_places: Places | None = None
    head_places: Places | None = None
    query_places: Places | None = None
    # The columns of the maps, as asked for: a column is only copied. None: every column.
    key_positions: tuple[int, ...] | None = None
    # (layer, head), ascending.
    pairs: tuple[tuple[int, int], ...] | None = None
    pair_places: Places | None = None

    @property
    def places(self) -> tuple[Places | None, Places | None, Places | None]:
        """The places of layers (or pairs), heads and rows."""
        first = self.layer_places if self.pairs is None else self.pair_places
        return first, self.head_places, self.query_places

    @property
    def num_maps(self) -> int:
        """The number of maps that are computed."""
        return len(self.layers) * len(self.heads) if self.pairs is None else len(self.pairs)

    def num_queries(self, num_tokens: int) -> int:
        """The number of rows that are computed of each map."""
        return num_tokens if self.query_positions is None else len(self.query_positions)

    def heads_of(self, layer: int) -> tuple[int, ...]:
        """The heads that are computed in a layer."""
        if self.pairs is None:
            return self.heads
        return tuple([head for of, head in self.pairs if of == layer])

    def computed_shape(self, num_tokens: int) -> tuple[int, int, int, int]:
        """(layers, heads or 1, rows, columns), or (pairs, 1, rows, columns), without repeats."""
        num_keys = num_tokens if self.key_positions is None else len(self.key_positions)
        leading = (len(self.layers), 1 if self.mean_over_heads else len(self.heads))
        if self.pairs is not None:
            leading = (len(self.pairs), 1)
        return *leading, self.num_queries(num_tokens), num_keys

    def shape(self, num_tokens: int) -> tuple[int, ...]:
        """The same with the repeats that were asked for."""
        *computed, num_keys = self.computed_shape(num_tokens)
        asked = [
            number if places is None else len(places)
            for number, places in zip(computed, self.places, strict=True)
        ]
        return (*asked, num_keys)


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """One pooled vector, or one for each span or token, over hidden states `layers` (0…L).

    Each hidden state is listed, and pooled, once. Where it was asked for repeatedly, `layer_counts` are its
    weight in a mean or a sum of layers, and `layer_places` its places in a concatenation.
    """

    # Several are concatenated.
    pooling: Pooling | tuple[Pooling, ...]
    layers: tuple[int, ...]
    layer_merge: LayerMerge
    normalize: bool
    # Leading dimensions kept before normalizing.
    dimensions: int
    encoding: Encoding
    # Half-open token ranges, one for each span; without spans, the one range that pooling covers, or whose
    # tokens have a vector each.
    segments: tuple[tuple[int, int], ...]
    has_spans: bool
    # Whether the modules that the model has behind its configured pooling are applied
    # (`ModelFacts.projected_size`).
    is_projected: bool = False
    # Whether the modules that it has before that pooling are applied (`ModelFacts.projected_token_size`).
    projects_tokens: bool = False
    # Whether the vector is cut after normalizing (as with sentence-transformers' truncate_dim) and not
    # before.
    cuts_normalized: bool = False
    layer_counts: tuple[int, ...] | None = None
    layer_places: Places | None = None
    # Where some tokens in the ranges are left out: the positions of all others. `segments` are then ranges of
    # this tuple.
    kept: tuple[int, ...] | None = None
    # Vectors of one kind differ only in the text and the ranges that they are computed from.
    kind: tuple[object, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kind = (
            self.pooling,
            self.layers,
            self.layer_counts,
            self.layer_places,
            self.layer_merge,
            self.normalize,
            self.dimensions,
            self.encoding,
            self.is_projected,
            self.projects_tokens,
            self.cuts_normalized,
        )
        object.__setattr__(self, "kind", kind)

    @property
    def merges_rows(self) -> bool:
        """Whether layers are merged row by row, before pooling. Maximum pooling needs this, since the maximum
        of a sum is not the sum of the maxima. All other poolings are linear, so their layers are pooled
        first, and the vectors are merged."""
        is_merged = len(self.layers) > 1 and self.layer_merge is not LayerMerge.CONCAT
        return is_merged and Pooling.MAX in concatenated(self.pooling)

    @property
    def layer_weights(self) -> list[float]:
        """The weight of each layer in a mean or a sum of layers."""
        counts = self.layer_counts or (1,) * len(self.layers)
        total = sum(counts) if self.layer_merge is LayerMerge.MEAN else 1
        return [count / total for count in counts]

    @property
    def num_vectors(self) -> int:
        if self.pooling is Pooling.NONE:
            return sum([last - first for first, last in self.segments])
        return len(self.segments)

    def shape(self) -> tuple[int, ...]:
        """(D,), (spans, D) or (tokens, D); a binary vector's D counts bytes."""
        width = math.ceil(self.dimensions / 8) if self.encoding is Encoding.BINARY else self.dimensions
        return (self.num_vectors, width) if self.has_spans or self.pooling is Pooling.NONE else (width,)


@dataclass(frozen=True, slots=True)
class LogitsPlan:
    """What the model's head scores: the whole input, or each of its tokens."""

    num_labels: int
    scores_tokens: bool
    # Of a head that scores tokens, the tokens to score, as asked for; None: every token.
    positions: tuple[int, ...] | None = None
    # The number of labels returned for each row, with their ids; 0: all, without ids.
    top_k: int = 0
    activation: Activation = Activation.NONE

    def num_rows(self, num_tokens: int) -> int:
        if not self.scores_tokens:
            return 1
        return num_tokens if self.positions is None else len(self.positions)

    def shape(self, num_tokens: int) -> tuple[int, ...]:
        """(labels,) or (tokens, labels), where `top_k` takes the place of labels."""
        width = self.top_k or self.num_labels
        return (self.num_rows(num_tokens), width) if self.scores_tokens else (width,)


@dataclass(frozen=True, slots=True)
class SparsePlan:
    """A vector over the vocabulary, of which the entries above zero are returned, `max_entries` at most."""

    max_entries: int
    # Whether they are the highest ones, highest first; else all of them, by id.
    by_weight: bool = False

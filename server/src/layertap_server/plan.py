"""What one input asks for, as plain data: resolved indices, and the exact shape of every output.

This is the interface between the front (service, tokenization) and the engine. It uses no protobuf and no
torch. The enums have the contract's numbers, so that a constructor call converts them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


class DType(IntEnum):
    """`layertap.v1.DataType`."""

    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    INT8 = 4
    UINT8 = 5
    INT32 = 6

    @property
    def itemsize(self) -> int:
        return {DType.FLOAT32: 4, DType.INT32: 4, DType.FLOAT16: 2, DType.BFLOAT16: 2}.get(self, 1)


class Pooling(IntEnum):
    """`layertap.v1.Pooling`."""

    MEAN = 1
    CLS = 2
    MAX = 3
    LAST_TOKEN = 4
    MEAN_MAX = 5
    POOLER = 6
    # None: a vector for each token.
    NONE = 7
    # The mean, where a token's weight is its position in its text, from 1.
    WEIGHTED_MEAN = 8
    # The sum, divided by the square root of the number of tokens.
    MEAN_SQRT_LEN = 9


def concatenated(pooling: Pooling | tuple[Pooling, ...]) -> tuple[Pooling, ...]:
    """The single poolings whose vectors are concatenated."""
    if isinstance(pooling, tuple):
        return pooling
    return (Pooling.MEAN, Pooling.MAX) if pooling is Pooling.MEAN_MAX else (pooling,)


class LayerMerge(IntEnum):
    """`layertap.v1.LayerMerge`."""

    CONCAT = 1
    MEAN = 2
    SUM = 3


class Encoding(IntEnum):
    """`layertap.v1.EmbeddingEncoding`."""

    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    INT8 = 4
    BINARY = 5

    @property
    def dtype(self) -> DType:
        return DType.UINT8 if self is Encoding.BINARY else DType(self.value)


class Activation(IntEnum):
    """`layertap.v1.Activation`."""

    NONE = 1
    SOFTMAX = 2
    SIGMOID = 3


class HeadKind(IntEnum):
    """`layertap.v1.HeadKind`."""

    NONE = 0
    SEQUENCE_CLASSIFICATION = 1
    TOKEN_CLASSIFICATION = 2
    MASKED_LANGUAGE = 3

    @property
    def scores_tokens(self) -> bool:
        return self in (HeadKind.TOKEN_CLASSIFICATION, HeadKind.MASKED_LANGUAGE)


class OutputField(IntEnum):
    """Field numbers of the tensors in `layertap.v1.EncodeResult`, which is also their order."""

    LAST_HIDDEN_STATE = 4
    POOLER_OUTPUT = 5
    HIDDEN_STATES = 6
    ATTENTIONS = 7
    EMBEDDINGS = 8
    LOGITS = 9
    LOGIT_IDS = 10
    SPARSE_IDS = 11
    SPARSE_WEIGHTS = 12
    CONTACTS = 14


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


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a reply, known before anything is computed."""

    field: OutputField
    dtype: DType
    # With `is_bound`, the largest that it may be: the reply has the shape of the data.
    shape: tuple[int, ...]
    # The number of scales in the reply in addition to the data: one for each int8 vector.
    num_scales: int = 0
    is_bound: bool = False
    # Bytes of the data, without the scales.
    nbytes: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", math.prod(self.shape) * self.dtype.itemsize)

    def of(self, data: TensorData) -> TensorSpec:
        """The spec of these data: where the shape is only bound, with the number of entries that there are."""
        if not self.is_bound:
            return self
        return dataclasses.replace(self, shape=(data.data.nbytes // self.dtype.itemsize,), is_bound=False)


@dataclass(slots=True)
class TensorData:
    """The values of a `TensorSpec`: `data` is contiguous in memory, in the wire's element type.

    `scales` are float32, one for each int8 vector. bfloat16 values are given as a uint16 array of their bits,
    since numpy has no such type.
    """

    data: npt.NDArray[np.generic]
    scales: npt.NDArray[np.generic] | None = None


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """All outputs that one input asks for, with indices resolved against the model and the input."""

    wire_dtype: DType
    last_hidden_state: bool = False
    pooler_output: bool = False
    # Each index once; where some were asked for repeatedly, `hidden_places` are their places in the reply.
    hidden_states: tuple[int, ...] | None = None
    attentions: AttentionPlan | None = None
    embeddings: tuple[EmbeddingPlan, ...] = ()
    hidden_places: Places | None = None
    # Rows of last_hidden_state, and of each of the hidden states, as asked for; None: every row.
    last_positions: tuple[int, ...] | None = None
    hidden_positions: tuple[int, ...] | None = None
    logits: LogitsPlan | None = None
    sparse: SparsePlan | None = None
    contacts: bool = False
    # Whether any output is computed with the model's own pooler.
    needs_pooler: bool = field(init=False, repr=False, compare=False)
    # Whether any output is computed from the whole last hidden state.
    needs_last: bool = field(init=False, repr=False, compare=False)
    # The highest hidden state that an output names by its index, where the maps of layer i count as hidden
    # state i + 1; 0 where there is none.
    _highest: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_pooled = any(embedding.pooling is Pooling.POOLER for embedding in self.embeddings)
        object.__setattr__(self, "needs_pooler", self.pooler_output or is_pooled)
        of_last = self.pooler_output or self.logits is not None or self.sparse is not None
        object.__setattr__(self, "needs_last", of_last)
        named = self.hidden_indices(0)
        if self.attentions is not None:
            named.update(layer + 1 for layer in self.attentions.layers)
        object.__setattr__(self, "_highest", max(named, default=0))

    def num_layers_needed(self, num_layers: int) -> int:
        """The number of layers that have to run for it, of the model's `num_layers`."""
        return num_layers if self.last_hidden_state or self.needs_last or self.contacts else self._highest

    @property
    def needs_model(self) -> bool:
        """Whether any output needs the model; a request for tokens alone does not."""
        return bool(
            self.last_hidden_state
            or self.needs_last
            or self.hidden_states is not None
            or self.attentions is not None
            or self.embeddings
            or self.contacts
        )

    @property
    def embeddings_at(self) -> int:
        """The index of the first embedding among the `specs`."""
        has_states, has_maps = self.hidden_states is not None, self.attentions is not None
        return self.last_hidden_state + self.pooler_output + has_states + has_maps

    def hidden_indices(self, num_layers: int) -> set[int]:
        """The hidden states (0…L) that the outputs need."""
        indices: set[int] = set(self.hidden_states or ())
        if self.last_hidden_state or self.needs_last:
            indices.add(num_layers)
        for embedding in self.embeddings:
            indices.update(embedding.layers)
        return indices

    def repeated(self, output: OutputField) -> tuple[Places | None, ...]:
        """For each leading dimension of an output, the places of its indices; empty where no index was
        repeated."""
        places: tuple[Places | None, ...] = ()
        if output is OutputField.HIDDEN_STATES:
            places = (self.hidden_places,)
        elif output is OutputField.ATTENTIONS and self.attentions is not None:
            places = self.attentions.places
        return places if any(one is not None for one in places) else ()

    def specs(self, num_tokens: int, hidden_size: int) -> tuple[TensorSpec, ...]:
        """The reply's tensors, in the contract's order."""
        dtype = self.wire_dtype
        specs: list[TensorSpec] = []
        if self.last_hidden_state:
            num_rows = num_tokens if self.last_positions is None else len(self.last_positions)
            specs.append(TensorSpec(OutputField.LAST_HIDDEN_STATE, dtype, (num_rows, hidden_size)))
        if self.pooler_output:
            specs.append(TensorSpec(OutputField.POOLER_OUTPUT, dtype, (hidden_size,)))
        if self.hidden_states is not None:
            num_states = num_asked(self.hidden_states, self.hidden_places)
            num_rows = num_tokens if self.hidden_positions is None else len(self.hidden_positions)
            shape: tuple[int, ...] = (num_states, num_rows, hidden_size)
            specs.append(TensorSpec(OutputField.HIDDEN_STATES, dtype, shape))
        if self.attentions is not None:
            specs.append(TensorSpec(OutputField.ATTENTIONS, dtype, self.attentions.shape(num_tokens)))
        for embedding in self.embeddings:
            num_scales = embedding.num_vectors if embedding.encoding is Encoding.INT8 else 0
            specs.append(
                TensorSpec(OutputField.EMBEDDINGS, embedding.encoding.dtype, embedding.shape(), num_scales)
            )
        if self.logits is not None:
            shape = self.logits.shape(num_tokens)
            specs.append(TensorSpec(OutputField.LOGITS, dtype, shape))
            if self.logits.top_k:
                specs.append(TensorSpec(OutputField.LOGIT_IDS, DType.INT32, shape))
        if self.sparse is not None:
            shape = (self.sparse.max_entries,)
            specs.append(TensorSpec(OutputField.SPARSE_IDS, DType.INT32, shape, is_bound=True))
            specs.append(TensorSpec(OutputField.SPARSE_WEIGHTS, dtype, shape, is_bound=True))
        if self.contacts:
            num_residues = max(num_tokens - NUM_OUTER_TOKENS, 0)
            specs.append(TensorSpec(OutputField.CONTACTS, dtype, (num_residues, num_residues)))
        return tuple(specs)


class OutputCost(NamedTuple):
    """The work for an input's outputs in addition to the layers of the model, known before anything runs."""

    # Elements of attention maps that are computed, whether or not they are returned.
    map_elements: int = 0
    # Elements of hidden states that are read for pooling, and of vectors that are made of them.
    pooled_elements: int = 0
    # Operations that take some time however small they are.
    num_steps: int = 0


NO_COST = OutputCost()


@dataclass(slots=True)
class Work:
    """One input, ready for the engine: its token ids, and the outputs that it asks for."""

    input_ids: Int64Array  # (T,)
    token_type_ids: Int64Array | None  # (T,), None where the model takes none
    plan: OutputPlan
    specs: tuple[TensorSpec, ...] = field(compare=False)
    # The work for its outputs in addition to the layers.
    cost: OutputCost = NO_COST
    num_tokens: int = field(init=False)
    # Bytes of its output tensors, with their scales.
    result_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.input_ids)
        self.result_bytes = 0
        for spec in self.specs:
            self.result_bytes += spec.nbytes + 4 * spec.num_scales


# The special tokens at the start and the end of a protein, which a contact map leaves out.
NUM_OUTER_TOKENS = 2

Outputs = Sequence[TensorData]  # of one input, in the order of its `Work.specs`

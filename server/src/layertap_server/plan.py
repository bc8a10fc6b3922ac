"""What one input wants, in plain data: resolved indices, and the exact shape of every answer.

The line between the front (service, tokenization) and the engine. No protobuf, no torch: the enums
carry the contract's numbers, so translating them is a constructor call.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

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

    @property
    def itemsize(self) -> int:
        return {DType.FLOAT32: 4, DType.FLOAT16: 2, DType.BFLOAT16: 2}.get(self, 1)


class Pooling(IntEnum):
    """`layertap.v1.Pooling`, and what sentence-transformers knows beyond it: `CONFIGURED_ONLY`."""

    MEAN = 1
    CLS = 2
    MAX = 3
    LAST_TOKEN = 4
    MEAN_MAX = 5
    POOLER = 6
    # The mean, where a token's weight is its position in its text, from 1.
    WEIGHTED_MEAN = 8
    # The sum, divided by the square root of the number of tokens.
    MEAN_SQRT_LEN = 9


# Only as a model's configured pooling: the contract has no name for them.
CONFIGURED_ONLY = (Pooling.WEIGHTED_MEAN, Pooling.MEAN_SQRT_LEN)


def concatenated(pooling: Pooling | tuple[Pooling, ...]) -> tuple[Pooling, ...]:
    """The single poolings whose vectors stand side by side."""
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


class OutputField(IntEnum):
    """Field numbers of the tensors in `layertap.v1.EncodeResult`, which is also their order."""

    LAST_HIDDEN_STATE = 4
    POOLER_OUTPUT = 5
    HIDDEN_STATES = 6
    ATTENTIONS = 7
    EMBEDDINGS = 8


@dataclass(frozen=True, slots=True)
class TokenizerOptions:
    """How sentence-transformers loads the model's tokenizer, where its files say anything of that."""

    # Of the checkpoint, where the tokenizer is; empty: at its root.
    subfolder: str = ""
    # Arguments of the tokenizer's class; `model_max_length` is the configured token limit.
    arguments: Mapping[str, Any] = field(default_factory=dict)
    # Whether texts are put in small letters before anything else, whatever the tokenizer does.
    lower_case: bool = False


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The shape of a served model and what it can answer."""

    name: str
    architecture: str
    revision: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    vocab_size: int
    # 0: the model takes no token types.
    type_vocab_size: int
    # Special tokens included.
    max_tokens: int
    has_pooler: bool
    has_attentions: bool
    # Of the configured embedding, sentence-transformers' own; several are concatenated.
    default_pooling: Pooling | tuple[Pooling, ...]
    default_normalize: bool
    # Whether whole-input pooling covers the tokens of a prompt.
    pool_prompt: bool
    prompts: Mapping[str, str]
    compute_dtype: DType
    device: str
    # Texts end to end without padding, or padded sub-batches sorted by length.
    packed: bool
    # What computes the attention, in words.
    attention: str
    # Whether last_hidden_state is another tensor than hidden state L: behind a final norm, as in CLIP's text model.
    is_last_apart: bool = False
    # Whether the tokenizer gives texts no ids and no types but those that the model has embeddings for.
    text_ids_fit: bool = True
    # Dimensions of the configured embedding behind its modules; 0: none stand beside the pooling.
    projected_size: int = 0
    # Leading dimensions that the configured embedding keeps after normalizing (truncate_dim); 0: all.
    default_dimensions: int = 0
    # The prompt put before texts whose configured embedding is asked for without naming one.
    default_prompt_name: str = ""
    # Most tokens of an input whose configured embedding is asked for; 0: `max_tokens`.
    max_embedding_tokens: int = 0
    # Why the configured embedding cannot be given; empty where it can.
    embedding_unsupported: str = ""
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)

    @property
    def last_index(self) -> int:
        """The number that stands for last_hidden_state among hidden states: L, or L + 1 where it is apart."""
        return self.num_layers + self.is_last_apart


Places = tuple[int, ...]
"""Of indices that were asked for repeatedly: for each that was asked, its number among those that are computed."""


def distinct(asked: tuple[int, ...]) -> tuple[tuple[int, ...], Places | None]:
    """The indices to compute, each once, and where they belong in the reply; None: just as they are."""
    if len(set(asked)) == len(asked):
        return asked, None
    values, places = np.unique(np.array(asked, np.int64), return_inverse=True)
    return tuple(values.tolist()), tuple(places.tolist())


def counted(asked: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The indices to compute, each once, and how often each was asked for; None: once each."""
    if len(set(asked)) == len(asked):
        return asked, None
    values, counts = np.unique(np.array(asked, np.int64), return_counts=True)
    return tuple(values.tolist()), tuple(counts.tolist())


def num_asked(computed: Sequence[int], places: Places | None) -> int:
    return len(computed if places is None else places)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Attention maps of `layers` × `heads`, indices in 0…L-1 and 0…A-1, for the rows `query_positions`.

    What is listed is what is computed: an index that was asked for repeatedly is listed once, and
    the `…_places` say where in the reply it belongs. For the mean over heads, `head_counts` weigh them.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    mean_over_heads: bool
    # None: every row.
    query_positions: tuple[int, ...] | None
    head_counts: tuple[int, ...] | None = None
    layer_places: Places | None = None
    head_places: Places | None = None
    query_places: Places | None = None

    @property
    def places(self) -> tuple[Places | None, Places | None, Places | None]:
        """Of layers, heads and rows."""
        return self.layer_places, self.head_places, self.query_places

    def computed_shape(self, num_tokens: int) -> tuple[int, int, int, int]:
        """(layers, heads or 1, rows, T) without repeats."""
        num_queries = num_tokens if self.query_positions is None else len(self.query_positions)
        return len(self.layers), 1 if self.mean_over_heads else len(self.heads), num_queries, num_tokens

    def shape(self, num_tokens: int) -> tuple[int, ...]:
        """(layers asked, heads asked or 1, rows asked, T)"""
        *computed, _ = self.computed_shape(num_tokens)
        asked = [
            number if places is None else len(places)
            for number, places in zip(computed, self.places, strict=True)
        ]
        return (*asked, num_tokens)


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """One pooled vector, or one for each span, over hidden states `layers` (0…L).

    Each hidden state is listed, and pooled, once. Where it was asked for repeatedly, `layer_counts` weigh it
    in a mean or a sum of layers, and `layer_places` say where it stands in a concatenation.
    """

    # Several are concatenated.
    pooling: Pooling | tuple[Pooling, ...]
    layers: tuple[int, ...]
    layer_merge: LayerMerge
    normalize: bool
    # Leading dimensions kept before normalizing.
    dimensions: int
    encoding: Encoding
    # Half-open token ranges; without spans the one range that pooling covers.
    segments: tuple[tuple[int, int], ...]
    has_spans: bool
    # Whether the modules configured with the model (`ModelFacts.projected_size`) follow.
    is_projected: bool = False
    # Whether the vector is cut after normalizing, as sentence-transformers' truncate_dim is, not before.
    cuts_normalized: bool = False
    layer_counts: tuple[int, ...] | None = None
    layer_places: Places | None = None
    # Vectors of one kind differ in nothing but what they are of.
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
            self.cuts_normalized,
        )
        object.__setattr__(self, "kind", kind)

    @property
    def merges_rows(self) -> bool:
        """Whether layers are merged row by row, before pooling: a maximum of sums is no sum of maxima. All else that
        is pooled is linear, and layers are merged once each is a vector."""
        is_merged = len(self.layers) > 1 and self.layer_merge is not LayerMerge.CONCAT
        return is_merged and Pooling.MAX in concatenated(self.pooling)

    @property
    def layer_weights(self) -> list[float]:
        """Of each layer in a mean or a sum of them."""
        counts = self.layer_counts or (1,) * len(self.layers)
        total = sum(counts) if self.layer_merge is LayerMerge.MEAN else 1
        return [count / total for count in counts]

    def shape(self) -> tuple[int, ...]:
        """(D,) or (spans, D); a binary vector's D counts bytes."""
        width = math.ceil(self.dimensions / 8) if self.encoding is Encoding.BINARY else self.dimensions
        return (len(self.segments), width) if self.has_spans else (width,)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a reply, known before anything is computed."""

    field: OutputField
    dtype: DType
    shape: tuple[int, ...]
    # Scales that travel beside the data: one for each int8 vector.
    num_scales: int = 0
    # Of the data.
    nbytes: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", math.prod(self.shape) * self.dtype.itemsize)


@dataclass(slots=True)
class TensorData:
    """The values of a `TensorSpec`: `data` is contiguous in memory, in the wire's element type.

    `scales` are float32, one for each int8 vector. bfloat16 travels as the uint16 array of its bits, since numpy has no such type.
    """

    data: npt.NDArray[np.generic]
    scales: npt.NDArray[np.generic] | None = None


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """Everything one input wants, with indices resolved against the model and the input."""

    wire_dtype: DType
    last_hidden_state: bool = False
    pooler_output: bool = False
    # Each once; where some were asked for repeatedly, `hidden_places` say where in the reply they belong.
    hidden_states: tuple[int, ...] | None = None
    attentions: AttentionPlan | None = None
    embeddings: tuple[EmbeddingPlan, ...] = ()
    hidden_places: Places | None = None
    # Whether any of it comes of the model's own pooler.
    needs_pooler: bool = field(init=False, repr=False, compare=False)
    # The highest hidden state that is named, 0 where none is.
    _highest: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_pooled = any(embedding.pooling is Pooling.POOLER for embedding in self.embeddings)
        object.__setattr__(self, "needs_pooler", self.pooler_output or is_pooled)
        named = self.hidden_indices(0)
        if self.attentions is not None:
            named.update(layer + 1 for layer in self.attentions.layers)
        object.__setattr__(self, "_highest", max(named, default=0))

    def num_layers_needed(self, num_layers: int) -> int:
        """The layers that run for it, of so many."""
        return num_layers if self.last_hidden_state or self.pooler_output else self._highest

    @property
    def needs_model(self) -> bool:
        """Whether a forward pass is needed: tokens alone are not worth one."""
        return bool(
            self.last_hidden_state
            or self.pooler_output
            or self.hidden_states is not None
            or self.attentions is not None
            or self.embeddings
        )

    def hidden_indices(self, num_layers: int) -> set[int]:
        """The hidden states (0…L) that answering needs."""
        indices: set[int] = set(self.hidden_states or ())
        if self.last_hidden_state or self.pooler_output:
            indices.add(num_layers)
        for embedding in self.embeddings:
            indices.update(embedding.layers)
        return indices

    def repeated(self, output: OutputField) -> tuple[Places | None, ...]:
        """Of an output, for each leading dimension where its indices belong; nothing where none was repeated."""
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
            specs.append(TensorSpec(OutputField.LAST_HIDDEN_STATE, dtype, (num_tokens, hidden_size)))
        if self.pooler_output:
            specs.append(TensorSpec(OutputField.POOLER_OUTPUT, dtype, (hidden_size,)))
        if self.hidden_states is not None:
            num_states = num_asked(self.hidden_states, self.hidden_places)
            shape = (num_states, num_tokens, hidden_size)
            specs.append(TensorSpec(OutputField.HIDDEN_STATES, dtype, shape))
        if self.attentions is not None:
            specs.append(TensorSpec(OutputField.ATTENTIONS, dtype, self.attentions.shape(num_tokens)))
        for embedding in self.embeddings:
            num_scales = len(embedding.segments) if embedding.encoding is Encoding.INT8 else 0
            specs.append(
                TensorSpec(OutputField.EMBEDDINGS, embedding.encoding.dtype, embedding.shape(), num_scales)
            )
        return tuple(specs)


class OutputCost(NamedTuple):
    """The work that an input's outputs take beside the layers of the model, known before anything runs."""

    # Elements of attention maps that are computed, whether or not they are returned.
    map_elements: int = 0
    # Elements of hidden states that are read for pooling, and of vectors that are made of them.
    pooled_elements: int = 0
    # Operations that take some time however small they are.
    num_steps: int = 0


NO_COST = OutputCost()


@dataclass(slots=True)
class Work:
    """One input, ready for the engine: its ids and what it wants."""

    input_ids: Int64Array  # (T,)
    token_type_ids: Int64Array | None  # (T,), None where the model takes none
    plan: OutputPlan
    specs: tuple[TensorSpec, ...] = field(compare=False)
    # What its outputs take beside the layers.
    cost: OutputCost = NO_COST
    num_tokens: int = field(init=False)
    # Of its tensors.
    result_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.input_ids)
        self.result_bytes = 0
        for spec in self.specs:
            self.result_bytes += spec.nbytes + 4 * spec.num_scales


Outputs = Sequence[TensorData]  # of one input, in the order of its `Work.specs`

"""What callers give: inputs and selections, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
IntArray: TypeAlias = npt.NDArray[np.int64]

PoolingName: TypeAlias = Literal[
    "mean", "cls", "max", "last_token", "mean_max", "pooler", "none", "weighted_mean", "mean_sqrt_len"
]
LayerMergeName: TypeAlias = Literal["concat", "mean", "sum"]
EncodingName: TypeAlias = Literal["float32", "float16", "bfloat16", "int8", "binary"]
DtypeName: TypeAlias = Literal["float32", "float16", "bfloat16"]
ActivationName: TypeAlias = Literal["none", "softmax", "sigmoid"]
TruncationName: TypeAlias = Literal["end", "start"]
PriorityName: TypeAlias = Literal["low", "normal", "high"]

# --------------------------------------------------------------------- inputs


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that the model encodes as one input, for example for entailment or re-ranking."""

    first: str
    second: str


@dataclass(frozen=True, slots=True)
class TokenIds:
    """An input that is already tokenized. The server adds no special tokens.

    `type_ids` is None, or has the length of `ids`.
    """

    ids: Sequence[int] | IntArray
    type_ids: Sequence[int] | IntArray | None = None


@dataclass(frozen=True, slots=True)
class Words:
    """An input that is already split into words, for example for named-entity recognition."""

    words: Sequence[str]


Input: TypeAlias = str | Pair | TokenIds | Words

# ----------------------------------------------------------------- selections


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The hidden states to return. An empty selection means all.

    `layers` are indices of hidden states (0: the embedding output, 1 to L: the layers), and `positions` the
    rows (token positions) to return. Negative indices count from the end.
    """

    layers: Sequence[int] = ()
    positions: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Attentions:
    """The attention maps to return. An empty selection means all.

    `layers` are indices from 0 to L-1, `heads` from 0 to A-1. `query_positions` are the rows and
    `key_positions` the columns (token positions) to return; the values remain those of the softmax over all
    tokens. Negative indices count from the end. `mean_over_heads` returns the mean of the selected heads.

    `pairs` are single heads of single layers, each (layer, head), in place of `layers` and `heads`. The
    result is then (pairs, 1, rows, columns).
    """

    layers: Sequence[int] = ()
    heads: Sequence[int] = ()
    mean_over_heads: bool = False
    query_positions: Sequence[int] = ()
    key_positions: Sequence[int] = ()
    pairs: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """The half-open range [start, end) of a text, in characters (Unicode code points), tokens or words."""

    start: int
    end: int
    unit: Literal["character", "token", "word"] = "character"


@dataclass(frozen=True, slots=True)
class Embedding:
    """How to pool hidden states into vectors. `pooling` and `normalize` default to the model's configuration.

    `pooling` is a name, or a list of names whose vectors are concatenated. "none" pools nothing and returns
    a vector for each token, (T, D), as late interaction needs them.

    `layers` are indices of hidden states (0: the embedding output, 1 to L: the layers, -1: the last layer,
    the default); several are combined by `layer_merge` (default: "concat"). `dimensions` keeps only that
    many leading dimensions, before normalizing (0: all). `encoding` is the element type of the vectors
    (None: the call's `dtype`). "int8" is returned as `Quantized`; "binary" as uint8 with one sign bit for
    each dimension, most significant bit first: `np.unpackbits(vector, axis=-1, count=D)` returns the bits.

    With `spans`, each span is pooled separately, from one pass over the whole text, and the result is
    (spans, D). Without them it is (D,).

    `exclude_special_tokens` leaves special tokens out of what is pooled. `without_projection` returns the
    pooled vector before the modules, such as Dense, that the model is configured with.
    """

    pooling: PoolingName | Sequence[PoolingName] | None = None
    layers: Sequence[int] = ()
    layer_merge: LayerMergeName | None = None
    normalize: bool | None = None
    dimensions: int = 0
    encoding: EncodingName | None = None
    spans: Sequence[Span] = ()
    exclude_special_tokens: bool = False
    without_projection: bool = False


@dataclass(frozen=True, slots=True)
class Logits:
    """Which scores of the model's head to return, and how.

    `positions` are the token positions to return, for a head that scores each token; negative positions
    count from the end. Empty: all T. `top_k` returns only the k highest scores of each row, highest first,
    and their labels in `Result.logit_ids`. 0: all, in the order of the labels. `activation` is applied to
    the logits first; None: the logits as they are.
    """

    positions: Sequence[int] = ()
    top_k: int = 0
    activation: ActivationName | None = None


@dataclass(frozen=True, slots=True)
class Sparse:
    """The entries of the sparse vector to return: the `top_k` highest, highest first. 0: all above zero, by
    id."""

    top_k: int = 0


class EncodeOptions(TypedDict, total=False):
    """The keyword options of every call that returns outputs. All are optional.

    `model`: the name of a served model. Empty: the server's default model.
    `last_hidden_state`, `pooler_output`, `tokens`: whether to return this output.
    `last_hidden_state_positions`: the rows of the last hidden state to return, as token positions; negative
    positions count from the end. None: all T.
    `hidden_states`: True for all, a list of indices (0: the embedding output, 1 to L: the layers, -1: the
    last layer), or `HiddenStates`.
    `attentions`: True for all, a list of layers, or `Attentions`.
    `embeddings`: True for the pooling configured with the model, an `Embedding`, or a list of them.
    `logits`: the scores of the model's head: True for all, or `Logits`.
    `sparse`: a sparse vector over the vocabulary (SPLADE): True for all entries above zero, or `Sparse`.
    `contacts`: whether to return the contact map of a protein.
    `dtype`: the element type of float tensors in the reply. Default: "float32".
    `truncation`: at which end to drop tokens over the limit, "end" or "start". None: such texts are rejected.
    `max_tokens`: the limit of tokens, up to that of the model. 0: the limit configured for the model's
    embedding if that is requested without a pooling of your own, otherwise the model's limit.
    `prompt_name`: a prompt configured with the model, which is put before each text. Empty: no prompt, or
    the model's default prompt if its configured embedding is requested.
    `prompt`: a text to put before each text, instead of a configured prompt.
    `priority`: "low", "normal" or "high". Default: "normal".
    """

    model: str
    last_hidden_state: bool
    last_hidden_state_positions: Sequence[int] | None
    pooler_output: bool
    hidden_states: bool | Sequence[int] | HiddenStates | None
    attentions: bool | Sequence[int] | Attentions | None
    embeddings: bool | Embedding | Sequence[Embedding] | None
    tokens: bool
    logits: bool | Logits | None
    sparse: bool | Sparse | None
    contacts: bool
    dtype: DtypeName
    truncation: TruncationName | None
    max_tokens: int
    prompt_name: str
    prompt: str
    priority: PriorityName | None

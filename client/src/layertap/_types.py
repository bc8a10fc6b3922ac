"""Inputs, selections, results and models, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
IntArray: TypeAlias = npt.NDArray[np.int64]

PoolingName: TypeAlias = Literal["mean", "cls", "max", "last_token", "mean_max", "pooler"]
LayerMergeName: TypeAlias = Literal["concat", "mean", "sum"]
EncodingName: TypeAlias = Literal["float32", "float16", "bfloat16", "int8", "binary"]
DtypeName: TypeAlias = Literal["float32", "float16", "bfloat16"]

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
class Attentions:
    """The attention maps to return. An empty selection means all.

    `layers` are indices from 0 to L-1, `heads` from 0 to A-1, and `query_positions` the rows (token
    positions) to return. Negative indices count from the end. `mean_over_heads` returns the mean of the
    selected heads.
    """

    layers: Sequence[int] = ()
    heads: Sequence[int] = ()
    mean_over_heads: bool = False
    query_positions: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """The half-open range [start, end) of a text, in characters (Unicode code points) or in tokens."""

    start: int
    end: int
    unit: Literal["character", "token"] = "character"


@dataclass(frozen=True, slots=True)
class Embedding:
    """How to pool hidden states into vectors. `pooling` and `normalize` default to the model's configuration.

    `layers` are indices of hidden states (0: the embedding output, 1 to L: the layers, -1: the last layer,
    the default); several are combined by `layer_merge` (default: "concat"). `dimensions` keeps only that
    many leading dimensions, before normalizing (0: all). `encoding` is the element type of the vectors
    (None: the call's `dtype`). "int8" is returned as `Quantized`; "binary" as uint8 with one sign bit for
    each dimension, most significant bit first: `np.unpackbits(vector, axis=-1, count=D)` returns the bits.

    With `spans`, each span is pooled separately, from one pass over the whole text, and the result is
    (spans, D). Without them it is (D,).
    """

    pooling: PoolingName | None = None
    layers: Sequence[int] = ()
    layer_merge: LayerMergeName | None = None
    normalize: bool | None = None
    dimensions: int = 0
    encoding: EncodingName | None = None
    spans: Sequence[Span] = ()


class EncodeOptions(TypedDict, total=False):
    """The keyword options of every call that returns outputs. All are optional.

    `model`: the name of a served model. Empty: the server's default model.
    `last_hidden_state`, `pooler_output`, `tokens`: whether to return this output.
    `hidden_states`: True for all, or a list of indices (0: the embedding output, 1 to L: the layers, -1: the
    last layer).
    `attentions`: True for all, a list of layers, or `Attentions`.
    `embeddings`: True for the pooling configured with the model, an `Embedding`, or a list of them.
    `dtype`: the element type of float tensors in the reply. Default: "float32".
    `truncation`: at which end to drop tokens over the limit, "end" or "start". None: such texts are rejected.
    `max_tokens`: the limit of tokens, up to that of the model. 0: the limit configured for the model's
    embedding if that is requested without a pooling of your own, otherwise the model's limit.
    `prompt_name`: a prompt configured with the model, which is put before each text. Empty: no prompt, or
    the model's default prompt if its configured embedding is requested.
    `priority`: "low", "normal" or "high". Default: "normal".
    """

    model: str
    last_hidden_state: bool
    pooler_output: bool
    hidden_states: bool | Sequence[int] | None
    attentions: bool | Sequence[int] | Attentions | None
    embeddings: bool | Embedding | Sequence[Embedding] | None
    tokens: bool
    dtype: DtypeName
    truncation: Literal["end", "start"] | None
    max_tokens: int
    prompt_name: str
    priority: Literal["low", "normal", "high"] | None


# -------------------------------------------------------------------- results


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The tokens of one input: parallel arrays of length T, including special tokens.

    `starts` and `ends` are the half-open range of characters that a token covers; both are 0 for a special
    token. `word_ids` and `sequence_ids` (0: the first text, 1: the second) are -1 for a special token.
    """

    ids: IntArray
    tokens: tuple[str, ...]
    type_ids: IntArray
    starts: IntArray
    ends: IntArray
    special: npt.NDArray[np.bool_]
    word_ids: IntArray
    sequence_ids: IntArray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Timing:
    """The times that a request took in each stage, in nanoseconds, and the size of its (last) batch."""

    tokenize_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    total_ns: int = 0
    batch_inputs: int = 0
    batch_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """Vectors as 8-bit integers: int8 `values` (..., D) and float32 `scale` (...), one for each vector."""

    values: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The vectors in float32, (..., D): values times scale."""
        return self.values * self.scale[..., None]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Result:
    """The requested outputs of one input, trimmed to its T tokens. Outputs that were not requested are None.

    Shapes: `last_hidden_state` (T, H), `pooler_output` (H,), `hidden_states` (selected layers, T, H),
    `attentions` (selected layers, selected heads or 1, selected query positions, T), `embeddings` one (D,)
    or (spans, D) for each requested `Embedding`, which is a `Quantized` for int8.

    Arrays may be read-only views of the received message: copy an array to change it. float16 is returned
    as float16; bfloat16, which numpy does not have, is returned as float32 with exactly the same values.
    """

    token_count: int
    truncated_tokens: int
    tokens: Tokens | None
    last_hidden_state: Array | None
    pooler_output: Array | None
    hidden_states: Array | None
    attentions: Array | None
    embeddings: tuple[Array | Quantized, ...]
    timing: Timing

    @property
    def embedding(self) -> Array | Quantized:
        """The only embedding of this result.

        Raises:
            ValueError: the result has no embedding, or more than one.
        """
        if len(self.embeddings) != 1:
            raise ValueError(
                f"this result holds {len(self.embeddings)} embeddings; take them from `embeddings`"
            )
        return self.embeddings[0]

    def arrays(self) -> dict[str, Array]:
        """All arrays by name: `last_hidden_state`, …, `embeddings.0` (with `embeddings.0.scale` if it is
        int8), and for tokens `tokens.ids`, `tokens.starts` and so on."""
        named: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
        }
        for index, vector in enumerate(self.embeddings):
            if isinstance(vector, Quantized):
                named |= {f"embeddings.{index}": vector.values, f"embeddings.{index}.scale": vector.scale}
            else:
                named[f"embeddings.{index}"] = vector
        if self.tokens is not None:
            for field in fields(self.tokens):
                named[f"tokens.{field.name}"] = getattr(self.tokens, field.name)
        return {name: array for name, array in named.items() if isinstance(array, np.ndarray)}

    def __repr__(self) -> str:
        held = "".join(f", {name}={array.dtype}{array.shape}" for name, array in self.arrays().items())
        return f"Result(token_count={self.token_count}, truncated_tokens={self.truncated_tokens}{held})"


# --------------------------------------------------------------------- models


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The server's limits: inputs of a request, bytes of a message, bytes of the result of one request."""

    max_inputs_per_request: int
    max_message_bytes: int
    max_result_bytes: int


@dataclass(frozen=True, slots=True)
class Model:
    """A served model: its shape, its outputs and its limits.

    `architecture` is the model type in the checkpoint's configuration, such as "bert". `max_tokens` includes
    special tokens. `prompts` maps the name of a prompt to its text. `default_pooling` is empty if the
    configured pooling has no name in `PoolingName`. `embedding_unsupported` says why the server cannot
    compute the configured embedding; it is empty if it can. `connections` is the number of connections that
    a busy client should open.
    """

    name: str
    architecture: str
    revision: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    vocab_size: int
    max_tokens: int
    has_pooler: bool
    has_attentions: bool
    default_pooling: str
    default_normalize: bool
    prompts: dict[str, str]
    compute_dtype: str
    device: str
    limits: ModelLimits
    embedding_unsupported: str = ""
    connections: int = 1

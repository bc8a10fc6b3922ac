"""What a caller gives and gets: inputs, selections, results and models, as plain frozen data."""

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
    """Two texts that the model reads as one input, as for entailment or re-ranking."""

    first: str
    second: str


@dataclass(frozen=True, slots=True)
class TokenIds:
    """An input that is tokenized already; special tokens are the caller's to add.

    `type_ids` is None or as long as `ids`.
    """

    ids: Sequence[int] | IntArray
    type_ids: Sequence[int] | IntArray | None = None


@dataclass(frozen=True, slots=True)
class Words:
    """An input that is split into words already, as for named-entity recognition."""

    words: Sequence[str]


Input: TypeAlias = str | Pair | TokenIds | Words

# ----------------------------------------------------------------- selections


@dataclass(frozen=True, slots=True)
class Attentions:
    """Which attention maps to return; an empty selection means all.

    `layers` count from 0 to L-1, `heads` from 0 to A-1, `query_positions` are the rows (token
    positions) to return; negative numbers count from the end. `mean_over_heads` averages the
    selected heads into one.
    """

    layers: Sequence[int] = ()
    heads: Sequence[int] = ()
    mean_over_heads: bool = False
    query_positions: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open [start, end) of a text, in characters (Unicode code points) or in tokens."""

    start: int
    end: int
    unit: Literal["character", "token"] = "character"


@dataclass(frozen=True, slots=True)
class Embedding:
    """How to pool hidden states into vectors; what is left out is as configured with the model.

    `layers` are hidden-state indices (0 the embedding output, 1 to L the layers, -1 the last; empty:
    -1), made one by `layer_merge` ("concat" when left out). `dimensions` keeps that many leading
    dimensions, before normalizing (0: all). `encoding` is the vectors' element type (None: the
    call's `dtype`); "int8" comes back as `Quantized`, "binary" as uint8 with one sign bit a
    dimension, most significant bit first: `np.unpackbits(vector, axis=-1, count=D)` gives the bits.
    `spans` are pooled each by itself, in one pass over the whole text, giving (spans, D); without
    them the vector is (D,).
    """

    pooling: PoolingName | None = None
    layers: Sequence[int] = ()
    layer_merge: LayerMergeName | None = None
    normalize: bool | None = None
    dimensions: int = 0
    encoding: EncodingName | None = None
    spans: Sequence[Span] = ()


class EncodeOptions(TypedDict, total=False):
    """The keyword options that every call for outputs takes. All are optional.

    `model`: a served model's name; empty is the server's default.
    `last_hidden_state`, `pooler_output`, `tokens`: whether to return each.
    `hidden_states`: True for all, or a list of indices (0 the embedding output, 1 to L, -1 the last).
    `attentions`: True for all, a list of layers, or `Attentions`.
    `embeddings`: True for the pooling configured with the model, an `Embedding`, or a list of them.
    `dtype`: element type on the wire of every float tensor (default "float32").
    `truncation`: "end" or "start" to drop tokens over the limit there; None refuses such texts.
    `max_tokens`: that limit, up to the model's own. 0: the one configured for the model's embedding where that is
    asked for without a pooling of your own, else the model's.
    `prompt_name`: a prompt configured with the model, put before each text. Empty: none, or its default prompt
    where its configured embedding is asked for.
    `priority`: "low", "normal" or "high".
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
    """The tokens of one input: parallel arrays of length T, special tokens included.

    `starts` and `ends` are the characters that each token covers, half-open, both 0 for a special
    token. `word_ids` and `sequence_ids` (0 the first text, 1 the second) are -1 for a special token.
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
    """Where the time of a request went, in nanoseconds, and the (last) batch that it rode in."""

    tokenize_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    total_ns: int = 0
    batch_inputs: int = 0
    batch_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """Vectors as 8-bit integers: int8 `values` of (..., D), float32 `scale` of (...), one a vector."""

    values: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The vectors as float32, (..., D): values times scale."""
        return self.values * self.scale[..., None]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Result:
    """What was asked about one input, trimmed to its T tokens; None for what was not asked.

    Shapes: `last_hidden_state` (T, H), `pooler_output` (H,), `hidden_states` (layers asked, T, H),
    `attentions` (layers asked, heads asked or 1, query positions asked, T), `embeddings` one (D,) or
    (spans, D) for each `Embedding` asked, `Quantized` where that is int8.

    Arrays may be read-only views of the received bytes: copy one to change it. float16 stays
    float16; numpy has no bfloat16, so it arrives as float32 holding exactly the same values.
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
        """The one embedding of this result.

        Raises:
            ValueError: there is none, or more than one.
        """
        if len(self.embeddings) != 1:
            raise ValueError(
                f"this result holds {len(self.embeddings)} embeddings; take them from `embeddings`"
            )
        return self.embeddings[0]

    def arrays(self) -> dict[str, Array]:
        """Every array by name: `last_hidden_state`, …, `embeddings.0` (and `embeddings.0.scale` where
        it is int8), and with the tokens `tokens.ids`, `tokens.starts` and so on."""
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
    """What the server allows: inputs a request, bytes a message, bytes of one request's result."""

    max_inputs_per_request: int
    max_message_bytes: int
    max_result_bytes: int


@dataclass(frozen=True, slots=True)
class Model:
    """One served model: its shape, its outputs and its limits.

    `architecture` is as in the checkpoint's configuration ("bert", …); `max_tokens` counts special
    tokens; `prompts` maps a prompt's name to its text. `default_pooling` is empty where the configured one has no
    name; `embedding_unsupported` says why the configured embedding cannot be given, and is empty where it can.
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

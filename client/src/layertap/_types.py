"""Inputs, selections, results and models, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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

    Shapes, where P is T or the number of selected positions:

    - `last_hidden_state` (P, H), `pooler_output` (H,), `hidden_states` (selected layers, P, H)
    - `attentions` (selected layers, selected heads or 1, selected query positions, selected key positions)
    - `embeddings`: for each requested `Embedding` (D,), (spans, D), or (T, D) without pooling; a `Quantized`
      for int8
    - `logits` (labels,), or (P, labels) if the head scores each token. With `top_k`, k in place of the
      number of labels, and `logit_ids`, int32, of the same shape: indices of `Model.labels`, or token ids
      for a masked-language head
    - `sparse_ids`, int32, and `sparse_weights`: (entries,) each
    - `contacts` (T', T'), without the special tokens at the start and the end

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
    logits: Array | None
    logit_ids: Array | None
    sparse_ids: Array | None
    sparse_weights: Array | None
    contacts: Array | None
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
        for name in ("logits", "logit_ids", "sparse_ids", "sparse_weights", "contacts"):
            named[name] = getattr(self, name)
        if self.tokens is not None:
            for field in fields(self.tokens):
                named[f"tokens.{field.name}"] = getattr(self.tokens, field.name)
        return {name: array for name, array in named.items() if isinstance(array, np.ndarray)}

    def plot_attention(
        self,
        layer: int | None = None,
        head: int | None = None,
        *,
        mean: bool = False,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        query_positions: Sequence[int] | None = None,
        key_positions: Sequence[int] | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Plots attention maps with matplotlib, and returns the axes. The result must hold `tokens`.

        `layer` and `head` choose among the maps that the result holds; `mean` takes the mean over its heads. One
        map is plotted with its tokens; of several, a grid of small maps is plotted: a row for each layer, a
        column for each head.

        `layers`, `heads`, `query_positions` and `key_positions` are what was selected of the model, in the order
        of the result. Without `layers` and `heads`, `layer` and `head` count what the result holds, and labels
        have these numbers in brackets. Positions are needed if the maps have not all rows or columns. `ax` are
        the axes to draw on; by default, a new figure is made with pyplot.

        Raises:
            ImportError: matplotlib is not installed; the extra `plot` has it.
            ValueError: the result has no maps or no tokens, not this layer or head, or another number of them.
        """
        from layertap._pictures import attention_maps, plots

        maps = attention_maps.AttentionMaps.of(
            self, layers=layers, heads=heads, query_positions=query_positions, key_positions=key_positions
        ).chosen(layer, head)
        return plots.plot_attention(maps.mean_over_heads() if mean else maps, ax)

    def plot_layers(
        self,
        measure: Literal["previous", "first", "norm"] = "previous",
        *,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Plots with matplotlib how each token's vector moves through the layers, and returns the axes.

        The result must hold `tokens` and `hidden_states`. The plot has a row for each token. `measure` is
        "previous" for the cosine to the vector of the layer before, "first" for the cosine to that of the first
        layer, or "norm" for the length (L2) of the vector. Layers are those that the result holds.

        `layers` and `positions` are what was selected of the model, in the order of the result; without `layers`,
        labels count what the result holds, in brackets. Positions are needed if it has not all rows. `ax` are the
        axes to draw on; by default, a new figure is made with pyplot.

        Raises:
            ImportError: matplotlib is not installed; the extra `plot` has it.
            ValueError: the result has no hidden states, no tokens, or only one layer where two are compared.
        """
        from layertap._pictures import plots

        return plots.plot_layers(self, measure, layers=layers, token_positions=positions, ax=ax)

    def __repr__(self) -> str:
        held = "".join(f", {name}={array.dtype}{array.shape}" for name, array in self.arrays().items())
        return f"Result(token_count={self.token_count}, truncated_tokens={self.truncated_tokens}{held})"


@dataclass(frozen=True, slots=True)
class Ranked:
    """A text with its score for a query, and its index among the texts."""

    index: int
    score: float
    text: str


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

    `head` is "sequence_classification", "token_classification", "masked_language", or empty for a model
    without one. `labels` are the head's, in the order of the logits; empty for a masked-language head, whose
    logits are in the order of the vocabulary. `embedding_size` is the D of the configured embedding (0:
    unknown). `has_sparse` and `has_contacts` say whether these outputs can be requested.
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
    head: str = ""
    labels: tuple[str, ...] = ()
    embedding_size: int = 0
    has_sparse: bool = False
    has_contacts: bool = False

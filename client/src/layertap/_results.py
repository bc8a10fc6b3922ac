"""What servers answer: results, tokens and models, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from layertap._selection import Selection, selection_of
from layertap._types import Array, IntArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

# For type checkers, an output may be used without a check whether it is None: callers know what they asked
# for. `X | None` would ask for a check at each use.
MaybeNone: TypeAlias = Any
# Likewise, what an embedding is depends on the encoding that the caller asked for.
MaybeQuantized: TypeAlias = Any

_SHOWN_TOKENS = 12


def _described(array: Array) -> str:
    return f"{array.dtype}{array.shape}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
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

    def to_pandas(self) -> DataFrame:
        """A pandas data frame with a row for each token, and the columns `token`, `id`, `type_id`, `start`, `end`,
        `special`, `word_id` and `sequence_id`.

        Raises:
            ImportError: pandas is not installed; the extra `pandas` has it.
        """
        from layertap._frames import tokens_to_pandas

        return tokens_to_pandas(self)

    def __repr__(self) -> str:
        shown = " ".join(self.tokens[:_SHOWN_TOKENS]) + (" …" if len(self) > _SHOWN_TOKENS else "")
        return f"Tokens({len(self)}: {shown})"


@dataclass(frozen=True, slots=True)
class Timing:
    """The times that a request took in each stage, in nanoseconds, and the size of its (last) batch."""

    tokenize_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    total_ns: int = 0
    batch_inputs: int = 0
    batch_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Quantized:
    """Vectors as 8-bit integers: int8 `values` (..., D) and float32 `scale` (...), one for each vector."""

    values: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The vectors in float32, (..., D): values times scale."""
        return self.values * self.scale[..., None]

    def __repr__(self) -> str:
        return f"Quantized(values={_described(self.values)}, scale={_described(self.scale)})"


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

    `selection` has the indices of the layers, heads and positions that were selected.

    Arrays may be read-only views of the received message: copy an array to change it. float16 is returned
    as float16; bfloat16, which numpy does not have, is returned as float32 with exactly the same values.
    """

    token_count: int
    truncated_tokens: int
    tokens: Tokens | MaybeNone
    last_hidden_state: Array | MaybeNone
    pooler_output: Array | MaybeNone
    hidden_states: Array | MaybeNone
    attentions: Array | MaybeNone
    embeddings: tuple[Array | MaybeQuantized, ...]
    logits: Array | MaybeNone
    logit_ids: Array | MaybeNone
    sparse_ids: Array | MaybeNone
    sparse_weights: Array | MaybeNone
    contacts: Array | MaybeNone
    timing: Timing
    # The request, without its inputs: a message of the contract, or None.
    _asked: Any = field(default=None, compare=False)

    @property
    def selection(self) -> Selection:
        """The layers, heads and positions that the axes of the arrays stand for."""
        return selection_of(self, self._asked.outputs)

    @property
    def embedding(self) -> Array | MaybeQuantized:
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

        Layers, heads and positions have the numbers of the result's `selection`; `layers`, `heads`,
        `query_positions` and `key_positions` give other ones, in the order of the result. Where numbers are not
        known, such as those of single heads (`Attentions.pairs`), they count what the result holds, in brackets.
        `ax` are the axes to draw on; by default, a new figure is made with pyplot.

        Raises:
            ImportError: matplotlib is not installed; the extra `plot` has it.
            ValueError: the result has no maps or no tokens, not this layer or head, or another number of them.
        """
        from layertap._pictures import attention_maps, plots

        held = None if self._asked is None else self.selection.attentions
        if held is not None:
            layers = layers or held.layers or None
            heads = heads or (None if held.mean_over_heads else held.heads or None)
            query_positions = query_positions or held.query_positions
            key_positions = key_positions or held.key_positions
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

        Layers and positions have the numbers of the result's `selection`; `layers` and `positions` give other
        ones, in the order of the result. `ax` are the axes to draw on; by default, a new figure is made with
        pyplot.

        Raises:
            ImportError: matplotlib is not installed; the extra `plot` has it.
            ValueError: the result has no hidden states, no tokens, or only one layer where two are compared.
        """
        from layertap._pictures import plots

        held = None if self._asked is None else self.selection.hidden_states
        if held is not None:
            layers, positions = layers or held.layers, positions or held.positions
        return plots.plot_layers(self, measure, layers=layers, token_positions=positions, ax=ax)

    def __repr__(self) -> str:
        held = "".join(f", {name}={_described(array)}" for name, array in self.arrays().items())
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
    logits are in the order of the vocabulary. `head_activation` is what the checkpoint's files apply to the
    logits: "none", "sigmoid", "softmax" or the name of another function; empty where they do not say.
    `embedding_size` is the D of the configured embedding (0:
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
    head_activation: str = ""

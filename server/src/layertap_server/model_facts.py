"""The facts of a served model: its shape, what it can answer, and its configured embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layertap_server.enums import DType, HeadKind, Pooling, concatenated


@dataclass(frozen=True, slots=True)
class TokenizerOptions:
    """How sentence-transformers loads the model's tokenizer, as far as the model's files specify it."""

    # The folder of the checkpoint that has the tokenizer; empty: its root.
    subfolder: str = ""
    # Arguments of the tokenizer's class; `model_max_length` is the configured token limit.
    arguments: Mapping[str, Any] = field(default_factory=dict)
    # Whether texts are converted to lower case before the tokenizer gets them, in addition to what it does
    # itself.
    lower_case: bool = False
    # By the name of a prompt, the marker before it that the tokenizer must give as a single token, if it is in
    # its vocabulary (PyLate).
    prefixes: Mapping[str, str] = field(default_factory=dict)


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
    # The pooling of the configured embedding (that of sentence-transformers); several are concatenated.
    default_pooling: Pooling | tuple[Pooling, ...]
    default_normalize: bool
    # Whether whole-input pooling covers the tokens of a prompt.
    pool_prompt: bool
    prompts: Mapping[str, str]
    compute_dtype: DType
    device: str
    # True: a batch has its texts end to end, without padding. False: padded sub-batches, sorted by length.
    packed: bool
    # A description of what computes the attention.
    attention: str
    # Whether last_hidden_state differs from hidden state L: by a final norm, as in CLIP's text model.
    is_last_apart: bool = False
    # Whether the model has embeddings for all token ids and token types that the tokenizer may give to a
    # text.
    text_ids_fit: bool = True
    # Dimensions of the configured embedding after the modules behind its pooling; 0: it has none.
    projected_size: int = 0
    # Dimensions of a token's vector after the modules before the configured pooling; 0: it has none.
    projected_token_size: int = 0
    # Leading dimensions that the configured embedding keeps after normalizing (truncate_dim); 0: all.
    default_dimensions: int = 0
    # The prompt before texts whose configured embedding is asked for without the name of a prompt.
    default_prompt_name: str = ""
    # Most tokens of an input whose configured embedding is asked for; 0: `max_tokens`.
    max_embedding_tokens: int = 0
    # Why the configured embedding is not supported; empty where it is.
    embedding_unsupported: str = ""
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    # What the checkpoint's head scores; NONE: it has none, or one that cannot be served, for the reason given.
    head: HeadKind = HeadKind.NONE
    head_unsupported: str = ""
    # The number of scores of an input or token, and what they are of; a masked-language head has no names.
    num_labels: int = 0
    labels: tuple[str, ...] = ()
    # What the checkpoint's files apply to the scores: "none", "sigmoid", "softmax" or the name of another
    # function; empty where they do not say.
    head_activation: str = ""
    # Whether the model gives sparse vectors. If its files configure them, but not in a way that is served,
    # the reason.
    has_sparse: bool = False
    sparse_unsupported: str = ""
    # The most entries of a sparse vector for which no number is asked, the highest ones; 0: all.
    max_sparse_entries: int = 0
    # Whether the model has a head that predicts the contacts of a protein's residues.
    has_contacts: bool = False

    @property
    def embedding_size(self) -> int:
        """The dimensions of the configured embedding; 0 where it is not supported."""
        if self.embedding_unsupported:
            return 0
        size = self.projected_size or self.token_size * len(concatenated(self.default_pooling))
        return min(self.default_dimensions or size, size)

    @property
    def token_size(self) -> int:
        """The dimensions of a token's vector that the configured embedding pools."""
        return self.projected_token_size or self.hidden_size

    @property
    def last_index(self) -> int:
        """The index of last_hidden_state among the hidden states: L, or L + 1 where it differs from hidden
        state L."""
        return self.num_layers + self.is_last_apart

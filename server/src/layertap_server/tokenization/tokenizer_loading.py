"""Loads a model's own tokenizer, as sentence-transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layertap_server.model_facts import TokenizerOptions


class TokenizerLoadError(Exception):
    """The model's tokenizer cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A model's own tokenizer, and what encoding has to know about it: exactly one of `rust` and `python` is
    given."""

    # A `tokenizers.Tokenizer`, which needs no transformers.
    rust: Any
    # A tokenizer of transformers that is written in Python.
    python: Any
    # The most tokens of one text that sentence-transformers passes to the model.
    max_tokens: int
    # Whether the model is given token types: transformers does so only where the tokenizer lists them.
    gives_types: bool
    special_ids: frozenset[int]

    def vocabulary(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        own: dict[str, int] = (self.python or self.rust).get_vocab()
        return own

    def token(self, token_id: int) -> str:
        if self.python is not None:
            return str(self.python.convert_ids_to_tokens(token_id))
        return str(self.rust.id_to_token(token_id))

    def to_dict(self) -> dict[str, Any] | None:
        """As plain data for `tokenizer_from`; None for a tokenizer that has parts in Python."""
        if self.rust is None:
            return None
        try:
            rust = self.rust.to_str()
        except Exception:  # the library raises a bare Exception for parts that are written in Python
            return None
        return {
            "rust": rust,
            "max_tokens": self.max_tokens,
            "gives_types": self.gives_types,
            "special_ids": sorted(self.special_ids),
        }


def tokenizer_from(data: dict[str, Any]) -> LoadedTokenizer:
    """The tokenizer that `LoadedTokenizer.to_dict` has described. Does not import transformers."""
    from tokenizers import Tokenizer

    return LoadedTokenizer(
        Tokenizer.from_str(data["rust"]),
        None,
        int(data["max_tokens"]),
        bool(data["gives_types"]),
        frozenset(data["special_ids"]),
    )


def load_tokenizer(
    source: str,
    trust_remote_code: bool = False,
    options: TokenizerOptions = TokenizerOptions(),  # noqa: B008  # frozen
) -> LoadedTokenizer:
    """The model's own tokenizer, loaded as sentence-transformers does. Imports transformers.

    Raises `TokenizerLoadError`, also when the tokenizer knows no letter and no digit.
    """
    from transformers import AutoTokenizer  # seconds of imports that `--help` does not need

    arguments = {**options.arguments, "trust_remote_code": trust_remote_code}
    if options.subfolder:
        arguments["subfolder"] = options.subfolder
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TokenizerLoadError(f"cannot load the tokenizer of '{source}': {error}") from error
    sample = tokenizer.encode("a b c d e 1 2 3 的 M A L K", add_special_tokens=False, verbose=False)
    if tokenizer.unk_token_id is not None and set(sample) <= {tokenizer.unk_token_id}:
        raise TokenizerLoadError(
            f"the tokenizer of '{source}' has no tokens for letters and digits: its vocabulary was not found. "
            "Add a tokenizer.json to the model (save_pretrained of the right tokenizer class writes one)"
        )
    if options.lower_case:
        lower_case(tokenizer)
    register_prefixes(tokenizer, options.prefixes)
    return LoadedTokenizer(
        tokenizer.backend_tokenizer if tokenizer.is_fast else None,
        None if tokenizer.is_fast else tokenizer,
        tokenizer.model_max_length,
        "token_type_ids" in tokenizer.model_input_names,
        frozenset(tokenizer.all_special_ids),
    )


def register_prefixes(tokenizer: Any, prefixes: Mapping[str, str]) -> None:
    """Has the tokenizer give each prefix, or its first word, as a single token if it is in the vocabulary; source:
    sentence-transformers' `MultiVectorEncoder._register_prefix_tokens`."""
    from transformers import AddedToken

    known = {*tokenizer.get_vocab(), *(getattr(tokenizer, "added_tokens_encoder", None) or {})}
    found = []
    for prefix in prefixes.values():
        markers = (prefix, *prefix.split(None, 1)[:1]) if prefix.strip() else ()
        marker = next((marker for marker in markers if marker in known), None)
        if marker is not None and tokenizer.tokenize(marker) != [marker]:
            found.append(AddedToken(marker, normalized=False, special=True))
    if found:
        tokenizer.add_special_tokens({"additional_special_tokens": found})


def lower_case(tokenizer: Any) -> None:
    """Has the tokenizer convert texts to lower case before its own normalizer; source: sentence-transformers'
    Transformer module."""
    from tokenizers import normalizers

    if not tokenizer.is_fast:
        tokenizer.do_lower_case = True
        return
    backend = tokenizer.backend_tokenizer
    own: Any = backend.normalizer
    steps: list[Any] = [] if own is None else [own]
    if isinstance(own, normalizers.Sequence):
        steps = [own[index] for index in range(len(own))]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])

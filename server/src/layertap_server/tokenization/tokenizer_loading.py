"""Loads a model's own tokenizer, as sentence-transformers does."""

from __future__ import annotations

from typing import Any

from layertap_server.model_facts import TokenizerOptions


class TokenizerLoadError(Exception):
    """The model's tokenizer cannot be used; the message says why and what to do."""


def load_tokenizer(
    source: str,
    trust_remote_code: bool,
    options: TokenizerOptions = TokenizerOptions(),  # noqa: B008  # frozen
) -> Any:
    """The model's own tokenizer, loaded as sentence-transformers does.

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
    return tokenizer


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

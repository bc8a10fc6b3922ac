"""The configuration of a multi-vector (ColBERT) checkpoint, as sentence-transformers' `MultiVectorEncoder` and
PyLate save it: a vector for each token, by the modules behind the model.

What these libraries do with queries and documents apart from the prompts is not part of an embedding here, and
is left to the caller. `EmbeddingConfig.left_to_caller` says what.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from layertap_server.engine.loading.sentence_transformers import (
    MULTI_VECTOR,
    PYLATE,
    TOKENS,
    EmbeddingConfig,
    ModuleConfig,
    UnsupportedError,
    Values,
    file_in,
    follow,
    kind_of,
    path_of,
    read_settings,
    without_final_norms,
)

MASK = "MultiVectorMask"
# PyLate's settings that any of its checkpoints has at least one of.
PYLATE_SETTINGS = {
    "query_length",
    "document_length",
    "query_expansion",
    "do_query_expansion",
    "attend_to_expansion_tokens",
    "attend_to_mask_tokens",
    "query_prefix",
    "document_prefix",
    "skiplist_words",
}
# The number of tokens of a query, where expanding queries is configured without one.
USUAL_QUERY_TOKENS = 32


def is_multi_vector(settings: Mapping[str, Any]) -> bool:
    """Whether this config_sentence_transformers.json is that of a multi-vector model."""
    return settings.get("model_type") in (MULTI_VECTOR, PYLATE)


def prefixes_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """By the name of the prompt, the marker that PyLate inserts as a token before queries or documents."""
    names = {"query": "query_prefix", "document": "document_prefix"}
    return {prompt: str(settings[name] or "") for prompt, name in names.items() if name in settings}


def prompts_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """The prompts, each with its prefix. Raises `UnsupportedError`."""
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict):
        raise UnsupportedError("its prompts are not a JSON object")
    found = {str(name): str(prompt or "") for name, prompt in prompts.items()}
    for name, prefix in prefixes_of(settings).items():
        found[name] = prefix + found.get(name, "").removeprefix(prefix)
    return found


def with_documents(
    found: EmbeddingConfig, settings: Mapping[str, Any], transformer: Mapping[str, Any]
) -> EmbeddingConfig:
    """Adds how documents are tokenized: the token limit and the prefixes. Raises `UnsupportedError`."""
    options = replace(found.tokenizer, prefixes=prefixes_of(settings))
    limit = setting(settings, transformer, "document_length")
    if limit is not None:
        if not isinstance(limit, int) or limit < 1:
            raise UnsupportedError(f"its document_length is not a positive number: {limit!r}")
        options = replace(options, arguments={**options.arguments, "model_max_length": limit})
    return replace(found, tokenizer=options)


def setting(settings: Mapping[str, Any], transformer: Mapping[str, Any], name: str) -> Any:
    """A setting of the Transformer module, which older files have beside the prompts."""
    own = transformer.get(name)
    return settings.get(name) if own is None else own


def with_token_modules(
    source: str,
    modules: list[dict[str, Any]],
    found: EmbeddingConfig,
    settings: Mapping[str, Any],
    transformer: Mapping[str, Any],
) -> EmbeddingConfig:
    """Follows the modules behind the model, all of which are applied to each token's vector."""
    values: Values = {TOKENS: (True, ())}
    skipped: list[str] = []
    for module in modules:
        kind, path = kind_of(module, also=(MASK,)), path_of(module)
        config = read_settings(source, file_in(path, "config.json"))
        if kind == MASK:
            if config.get("keep_only_token_ids"):
                raise UnsupportedError(f"its {MASK} module keeps only the vectors of some tokens: {path}")
            skipped = list(config.get("skiplist_words") or ())
        elif kind in ("Transformer", "Pooling"):
            raise UnsupportedError(f"it has a {kind} module behind the model: {path}")
        elif kind != "Dropout":
            if kind == "Dense":
                config = {**config, "module_input_name": config.get("module_input_name") or TOKENS}
            follow(ModuleConfig(kind, path, config), values)
    _, vector_modules = values[TOKENS]
    vector_modules, normalize = without_final_norms(vector_modules)
    if settings.get("model_type") == PYLATE:  # it normalizes and skips words without modules for that
        normalize = True
        words = settings.get("skiplist_words")
        skipped = list(string.punctuation) if words is None else list(words)
    return found.with_token_vectors(vector_modules, normalize, left_to_caller(skipped, settings, transformer))


def left_to_caller(
    skipped: list[str], settings: Mapping[str, Any], transformer: Mapping[str, Any]
) -> tuple[str, ...]:
    """In words, what the libraries do with queries and documents that this server does not."""
    steps = []
    if skipped:
        steps.append(f"to drop the vectors of a document's {len(skipped)} skipped words")
    if expansion := expansion_of(settings, transformer):
        unseen = " (to which the others would not attend; here they do)" if not expansion["attend"] else ""
        steps.append(f"to fill up queries to {expansion['length']} tokens with mask tokens{unseen}")
    elif limit := setting(settings, transformer, "query_length"):
        steps.append(f"to limit queries to {limit} tokens (max_tokens)")
    return tuple(steps)


def expansion_of(settings: Mapping[str, Any], transformer: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `length` to which queries are filled up, and whether all tokens `attend` to the mask tokens; None if
    queries are not filled up."""
    for place in (transformer, settings):
        if "query_expansion" in place:
            named = place["query_expansion"]
            return {"attend": False, "length": USUAL_QUERY_TOKENS, **named} if named else None
    if settings.get("do_query_expansion") is False or not PYLATE_SETTINGS & settings.keys():
        return None
    attend = settings.get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))
    return {"attend": bool(attend), "length": settings.get("query_length") or USUAL_QUERY_TOKENS}

"""How a checkpoint's sparse vectors are computed, read from its files as sentence-transformers reads them.

Source: sentence-transformers' `SparseEncoder`, `SpladePooling` and `MLMTransformer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layertap_server.engine.loading.sentence_transformers import (
    EmbeddingConfig,
    UnsupportedError,
    check_adapter,
    check_transformer,
    file_in,
    modules_of,
    path_of,
    read_json,
    read_settings,
    with_transformer,
)
from layertap_server.engine.sparse_vectors import SparsePooling

# The pooling strategies of SpladePooling: whether they add the tokens' weights.
STRATEGIES = {"max": False, "sum": True}
# Its activation functions: how often log(1 + x) is applied after them.
ACTIVATIONS = {"relu": 1, "log1p_relu": 2}
TASK = "fill-mask"


@dataclass(frozen=True, slots=True)
class SparseConfig:
    """The configured sparse vectors of a model; the default is that of a model without any."""

    pooling: SparsePooling | None = None
    # The number of entries that a vector keeps, the highest ones; 0: all.
    max_entries: int = 0
    # Why they are not supported, if the files configure some.
    unsupported: str = ""


def read_sparse_config(source: str, embedding: EmbeddingConfig) -> SparseConfig:
    """Reads the configuration of `source`, a hub name or a folder. Does not raise `UnsupportedError`: its
    message is in the result's `unsupported`."""
    try:
        settings = read_settings(source, "config_sentence_transformers.json")
        content = read_json(source, "modules.json")
        if content is None:
            return SparseConfig()
        modules = modules_of(content)
        kinds = [sparse_kind(module) for module in modules]
        if settings.get("model_type") != "SparseEncoder" and "SpladePooling" not in kinds:
            return SparseConfig()
        return supported(source, embedding, settings, modules, kinds)
    except UnsupportedError as error:
        return SparseConfig(unsupported=str(error))


def sparse_kind(module: Mapping[str, Any]) -> str:
    """The class name of a module of sentence-transformers; the whole name of another one."""
    name: str = module["type"]
    return name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name


def supported(
    source: str,
    embedding: EmbeddingConfig,
    settings: Mapping[str, Any],
    modules: list[dict[str, Any]],
    kinds: list[str],
) -> SparseConfig:
    """The configuration of a masked-language model with a SpladePooling. Raises `UnsupportedError`."""
    for number, known in enumerate((("Transformer", "MLMTransformer"), ("SpladePooling",))):
        if number >= len(kinds) or kinds[number] not in known:
            given = f"is a {kinds[number]}" if number < len(kinds) else "is missing"
            raise UnsupportedError(f"its module {number} {given}, where a {known[0]} is supported")
    if len(kinds) > 2:
        raise UnsupportedError(f"it has a {kinds[2]} module after its SpladePooling")
    _, transformer = with_transformer(source, embedding)
    default_task = TASK if kinds[0] == "MLMTransformer" else "feature-extraction"
    check_transformer(transformer, TASK, default_task, "logits")
    check_adapter(source, embedding.subfolder)
    config = read_settings(source, file_in(path_of(modules[1]), "config.json"))
    strategy, activation = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
    if strategy not in STRATEGIES:
        raise UnsupportedError(f"the strategy of its SpladePooling is unknown: {strategy!r}")
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"the activation of its SpladePooling is unknown: {activation!r}")
    limit = settings.get("max_active_dims")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise UnsupportedError(f"its max_active_dims is not a positive number: {limit!r}")
    return SparseConfig(SparsePooling(STRATEGIES[strategy], ACTIVATIONS[activation]), limit or 0)

"""What a model's own configuration says of embeddings: pooling, normalizing, prompts."""

from __future__ import annotations

import json
import logging
from typing import Any

from transformers.utils import cached_file

from layertap_server.plan import Pooling

logger = logging.getLogger(__name__)

# sentence-transformers' names in 1_Pooling/config.json, older flags and newer mode alike.
POOLING_MODES = {
    "mean": Pooling.MEAN,
    "mean_tokens": Pooling.MEAN,
    "cls": Pooling.CLS,
    "cls_token": Pooling.CLS,
    "max": Pooling.MAX,
    "max_tokens": Pooling.MAX,
    "lasttoken": Pooling.LAST_TOKEN,
}


def read_json(source: str, filename: str) -> dict[str, Any]:
    """A configuration file beside the model; empty where there is none."""
    path = cached_file(
        source,
        filename,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    return content if isinstance(content, dict) else {"modules": content}


def pooling_defaults(source: str) -> tuple[Pooling, bool, bool]:
    """(pooling, normalize, whether a prompt's tokens are pooled) as sentence-transformers would have it.

    Mean, not normalized, prompt included, for a model without its configuration.
    """
    modules = read_json(source, "modules.json").get("modules", [])
    types = {str(module.get("type", "")).rsplit(".", 1)[-1]: module.get("path", "") for module in modules}
    if unknown := types.keys() - {"Transformer", "Pooling", "Normalize"}:
        logger.warning("%s: embeddings leave out its %s module", source, ", ".join(sorted(unknown)))
    config = read_json(source, f"{types['Pooling']}/config.json") if types.get("Pooling") else {}
    named = config.get("pooling_mode")
    flags = [
        key.removeprefix("pooling_mode_")
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on
    ]
    modes = [named] if isinstance(named, str) else flags
    if len(modes) > 1 or (modes and modes[0] not in POOLING_MODES):
        logger.warning("%s: pooling %s is not supported as a default; mean is used", source, "+".join(modes))
        modes = []
    pooling = POOLING_MODES[modes[0]] if modes else Pooling.MEAN
    return pooling, "Normalize" in types, bool(config.get("include_prompt", True))

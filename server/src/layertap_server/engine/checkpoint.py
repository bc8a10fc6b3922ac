"""From a hub name or a local folder to the library's own model, in float32, with every weight in place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
from transformers.utils import logging as transformers_logging

from layertap_server.engine.memory import free_bytes

logger = logging.getLogger(__name__)


class ModelLoadError(Exception):
    """The model cannot be served; the message says why and what to do."""


def read_config(source: str, trust_remote_code: bool) -> Any:
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelLoadError(f"the folder '{source}' holds no model: it has no config.json")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise ModelLoadError(f"cannot load the model '{source}': {error}") from error
        said = str(error).strip().splitlines()[0]
        raise ModelLoadError(
            f"there is no folder '{source}', and the model hub did not give it: {said}"
        ) from error


def auto_class_of(source: str, config: Any) -> Any:
    # T5 and its kin: their encoder alone. For the others both give the same class.
    has_encoder = type(config) in AutoModelForTextEncoding._model_mapping
    if config.is_encoder_decoder and not has_encoder:
        raise ModelLoadError(f"transformers has no encoder of its own for '{config.model_type}' ('{source}')")
    return AutoModelForTextEncoding if has_encoder else AutoModel


def check_room(
    source: str,
    config: Any,
    device: torch.device,
    trust_remote_code: bool,
    free: Callable[[torch.device], float] = free_bytes,
) -> None:
    """Refuses a model that cannot fit, before its weights are read or downloaded.

    Weights pass through memory in float32, whatever the model computes in.
    """
    try:
        with torch.device("meta"):
            model = auto_class_of(source, config).from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        logger.debug("the size of '%s' is not known before it is loaded: %s", source, error)
        return
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    for where in {device, torch.device("cpu")}:
        left = free(where)
        if needed > left:
            raise ModelLoadError(
                f"the model '{source}' takes {needed / 2**20:,.0f} MiB to load, and {left / 2**20:,.0f} MiB of "
                f"memory are free on {where}: {(needed - left) / 2**20:,.0f} MiB too few; free some, or serve "
                "a smaller model or fewer of them"
            )


def read_weights(source: str, config: Any, attention: str, trust_remote_code: bool) -> tuple[Any, set[str]]:
    """The model in float32 with that attention, and the names of the weights that its checkpoint lacks."""
    auto_class = auto_class_of(source, config)
    verbosity = transformers_logging.get_verbosity()
    # Its report on missing weights, and its progress bar: ours follow.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, report = auto_class.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"cannot load the model '{source}': {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = set(report["missing_keys"])
    unknown = sorted(key for key in missing if not key.startswith(("pooler", "contact_head")))
    if unknown:
        raise ModelLoadError(
            f"the checkpoint '{source}' lacks {len(unknown)} weights of the model, such as '{unknown[0]}'; "
            "serving it would answer with random numbers"
        )
    return model, missing

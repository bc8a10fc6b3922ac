"""Loads the library's own model from a hub name or a local folder, in
float32, and checks that no weight is missing."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from layertap_server.engine.loading.sentence_transformers import find_file
from layertap_server.engine.memory import free_bytes

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
PARAMETER_NAMES = ("weight", "bias", "gamma", "beta")
MAX_LINE_CHARS = 300
# Errors whose class name adds nothing to their message.
PLAIN_ERRORS = (OSError, ValueError, RuntimeError)


class ModelLoadError(Exception):
    """The model cannot be served; the message says why and what to do."""


def one_line(error: BaseException) -> str:
    """The message of a library's error in one line; some of these messages have dozens of lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A first line that ends with a colon introduces the next one.
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    if len(said) > MAX_LINE_CHARS:
        said = said[: MAX_LINE_CHARS - 3] + "..."
    return said if type(error) in PLAIN_ERRORS and said else f"{type(error).__name__}: {said}".rstrip(": ")


def read_config(
    source: str, trust_remote_code: bool, subfolder: str = "", arguments: Mapping[str, Any] | None = None
) -> Any:
    """The model's configuration, from the given subfolder of the checkpoint. Settings that would change how
    the model is loaded or what it returns are reset.

    Raises `ModelLoadError` if the configuration or the files already show that the model cannot be served.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / subfolder / "config.json").is_file():
        if (folder / subfolder / ADAPTER_CONFIG).is_file():
            raise adapter_error(source)
        raise ModelLoadError(f"the folder '{folder / subfolder}' has no model: there is no config.json in it")
    try:
        config = AutoConfig.from_pretrained(
            source, **{**(arguments or {}), "subfolder": subfolder, "trust_remote_code": trust_remote_code}
        )
    except Exception as error:  # a configuration may name any code of the library, or be invalid JSON
        if folder.is_dir():
            raise cannot_load(source, error) from error
        raise ModelLoadError(
            f"there is no folder '{source}', and loading it from the model hub failed: {one_line(error)}"
        ) from error
    check_servable(source, config, subfolder)
    for one in with_sub_configs(config):
        one.return_dict = True
        one.output_hidden_states = False
        # The checkpoint may name the attention implementation that it
        # was saved with; `read_weights` sets ours.
        one._attn_implementation = None
        one.output_attentions = False
    return config


def check_servable(source: str, config: Any, subfolder: str) -> None:
    """Refuses checkpoints that would load, but not as the model that
    they describe: decoders, quantized weights, adapters."""
    if getattr(config, "is_decoder", False):
        raise decoder_error(source)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = getattr(quantization, "quant_method", None)
        if isinstance(quantization, dict):
            method = quantization.get("quant_method")
        raise ModelLoadError(
            f"the weights of '{source}' are quantized (method '{method or 'unknown'}'), which is not "
            "supported; serve the original checkpoint, with --dtype bfloat16 if it is too large"
        )
    if find_file(source, f"{subfolder}/{ADAPTER_CONFIG}".lstrip("/")) is not None:
        raise adapter_error(source)
    auto_class_of(source, config)


def with_sub_configs(config: Any) -> Iterator[Any]:
    """The configuration and, recursively, the configurations of the models in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from with_sub_configs(value)


def decoder_error(source: str) -> ModelLoadError:
    return ModelLoadError(
        f"'{source}' is a decoder: its tokens attend only to earlier tokens; Layertap serves encoders"
    )


def adapter_error(source: str) -> ModelLoadError:
    return ModelLoadError(
        f"'{source}' has an adapter ({ADAPTER_CONFIG}), which is not supported; merge it into the base model "
        "(peft's merge_and_unload), save the result, and serve that"
    )


def cannot_load(source: str, error: BaseException) -> ModelLoadError:
    logger.debug("cannot load the model '%s'", source, exc_info=error)
    return ModelLoadError(f"cannot load the model '{source}': {one_line(error)}")


def auto_class_of(source: str, config: Any) -> Any:
    # For T5 and similar models, AutoModelForTextEncoding is the encoder only. For other models that both auto
    # classes know, they give the same class.
    has_encoder = type(config) in AutoModelForTextEncoding._model_mapping
    if config.is_encoder_decoder and not has_encoder:
        raise ModelLoadError(f"transformers has no encoder for '{config.model_type}' ('{source}')")
    return AutoModelForTextEncoding if has_encoder else AutoModel


def check_room(
    source: str,
    config: Any,
    device: torch.device,
    trust_remote_code: bool,
    free: Callable[[torch.device], float] = free_bytes,
) -> None:
    """Refuses a model that does not fit into memory, before its weights are read or downloaded.

    The weights are loaded in float32, whatever type the model computes in.
    """
    try:
        with torch.device("meta"):
            model = auto_class_of(source, config).from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
    except Exception as error:  # reading the weights will report what is wrong
        logger.debug("cannot determine the size of '%s' before loading it: %s", source, error)
        return
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    for where in {device, torch.device("cpu")}:
        left = free(where)
        if needed > left:
            raise ModelLoadError(
                f"the model '{source}' needs {needed / 2**20:,.0f} MiB to load, and {left / 2**20:,.0f} MiB of "
                f"memory are free on {where}, {(needed - left) / 2**20:,.0f} MiB too few; free some, or serve "
                "a smaller model or fewer models"
            )


def read_weights(
    source: str, config: Any, attention: str, trust_remote_code: bool, subfolder: str = ""
) -> tuple[Any, set[str]]:
    """The model in float32 with that attention implementation, and the names of the weights that its
    checkpoint lacks. Only weights of a pooler or of ESM's contact head may be missing."""
    auto_class = auto_class_of(source, config)
    try:
        model, report = from_pretrained(auto_class, source, config, attention, trust_remote_code, subfolder)
    except Exception as error:  # from the library, its file readers, or the model's own code
        raise cannot_load(source, error) from error
    check_surplus(source, model, set(report["unexpected_keys"]))
    missing = set(report["missing_keys"])
    unknown = sorted(key for key in missing if not key.startswith(("pooler", "contact_head")))
    if unknown:
        raise ModelLoadError(
            f"the checkpoint '{source}' lacks {len(unknown)} weights of the model, such as '{unknown[0]}'; "
            "its results would be random"
        )
    return model, missing


def from_pretrained(
    auto_class: Any, source: str, config: Any, attention: str, trust_remote_code: bool, subfolder: str
) -> tuple[Any, Mapping[str, Any]]:
    """The library's model of one of its auto classes in float32, and its report on the weights."""
    verbosity = transformers_logging.get_verbosity()
    # Silences the library's report on missing weights and its progress bar: callers read the report.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, report = auto_class.from_pretrained(
            source,
            subfolder=subfolder,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    return model, report


def check_surplus(source: str, model: Any, unexpected: set[str]) -> None:
    """Refuses a checkpoint with weights inside the layers for which the model has
    no parameter: more layers than the configuration says, or adapters. Unused
    weights elsewhere, such as heads and buffers of older versions, are ignored."""
    prefix = f"{model.base_model_prefix}."
    patterns = {without_numbers(name) for name, _ in model.named_parameters()}
    # Name prefixes up to the layer's number: `encoder.layer.#.`
    layers = {pattern[: pattern.index("#") + 2] for pattern in patterns if "#" in pattern}
    surplus = sorted(
        key
        for key in unexpected
        if key.rpartition(".")[2] in PARAMETER_NAMES
        and any(without_numbers(name).startswith(tuple(layers)) for name in (key, key.removeprefix(prefix)))
    )
    if surplus:
        raise ModelLoadError(
            f"the checkpoint '{source}' has {len(surplus)} weights that the model of its configuration does not have, such "
            f"as '{surplus[0]}'; without them its results would be wrong"
        )


def without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def check_finite(source: str, model: Any) -> None:
    """Refuses weights that are not finite, except rows of an embedding table: these affect only the texts
    that use them, as in transformers. A warning is logged for them."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, weight in model.named_parameters():
        if bool(torch.isfinite(weight.sum())) or bool(torch.isfinite(weight).all()):
            continue
        if id(weight) not in tables:
            raise ModelLoadError(
                f"the weight '{name}' of the model '{source}' has values that are not finite (NaN or infinity); "
                "every result would be NaN"
            )
        rows = torch.isfinite(weight).all(-1).logical_not().nonzero().flatten()
        logger.warning(
            "%s: %d rows of '%s' are not finite, the first is %d; texts that use them have NaN results, as in transformers",
            source,
            len(rows),
            name,
            int(rows[0]),
        )

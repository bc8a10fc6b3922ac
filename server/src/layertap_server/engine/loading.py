"""From a hub name or a local folder to a model that is ready to run, and the facts about it.

Nothing is taken on trust: the number of layers and heads comes from a pass, weights that the
checkpoint lacks are refused, and packed results are compared with the model's own eager attention
before the first request.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
from transformers.utils import logging as transformers_logging

from layertap_server.engine import attention
from layertap_server.engine.defaults import pooling_defaults, read_json
from layertap_server.engine.families import FAMILIES, Family
from layertap_server.engine.fused import FusedBertLayer, replace_modules
from layertap_server.engine.linear import prepare_linears
from layertap_server.engine.model import LoadedModel
from layertap_server.engine.probing import (
    UnfitModelError,
    layer_modules,
    own_hidden_states,
    packed_agrees,
    probe,
    token_limit,
)
from layertap_server.engine.taps import TORCH_DTYPES, LayerHooks
from layertap_server.plan import DType, ModelFacts

logger = logging.getLogger(__name__)

# transformers keeps the attention implementations in a process-wide table, and silences by globals.
_loading = threading.Lock()

PADDED = "padded by length groups, the model's own eager attention"


class ModelLoadError(Exception):
    """The model cannot be served; the message says why and what to do."""


def load_model(
    name: str, source: str, *, device: str, dtype: str, trust_remote_code: bool, max_input_tokens: int
) -> LoadedModel:
    """Loads `source` (a hub name or a local folder) to be served as `name`."""
    with _loading:
        attention.register()
        torch_device = choose_device(device)
        torch_dtype = choose_dtype(dtype, torch_device)
        config = read_config(source, trust_remote_code)
        if getattr(config, "is_decoder", False):
            raise ModelLoadError(f"'{source}' is configured as a decoder; Layertap serves encoders")
        family = FAMILIES.get(config.model_type)
        model, missing = read_weights(source, config, family is not None, trust_remote_code)
        model.eval().requires_grad_(False).to(torch_device)
        pooler = detach_pooler(model, family, missing)
        try:
            loaded = prepare(name, source, model, family, pooler, torch_device, max_input_tokens)
        except UnfitModelError as error:
            raise ModelLoadError(f"cannot serve the model '{source}': {error}") from error
        return narrow(loaded, torch_dtype)


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


def read_weights(source: str, config: Any, packed: bool, trust_remote_code: bool) -> tuple[Any, set[str]]:
    """The model in float32, and the names of the weights that its checkpoint lacks."""
    # T5 and its kin: their encoder alone. For the others both give the same class.
    has_encoder = type(config) in AutoModelForTextEncoding._model_mapping
    if config.is_encoder_decoder and not has_encoder:
        raise ModelLoadError(f"transformers has no encoder of its own for '{config.model_type}' ('{source}')")
    auto_class = AutoModelForTextEncoding if has_encoder else AutoModel
    verbosity = transformers_logging.get_verbosity()
    # Its report on missing weights, and its progress bar: ours follow.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, report = auto_class.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention.NAME if packed else "eager",
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


def detach_pooler(
    model: Any, family: Family | None, missing: set[str]
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Takes the pooler out of the model's forward: it runs only on the texts that want it.

    None where there is none, or where the checkpoint has no weights for it: a random pooler's
    output is no output of the model.
    """
    pooler = getattr(model, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return None
    call = (family or Family()).pooler(model, pooler)
    model.pooler = None
    return None if any(key.startswith("pooler") for key in missing) else call


def prepare(
    name: str,
    source: str,
    model: Any,
    family: Family | None,
    pooler: Callable[[torch.Tensor], torch.Tensor] | None,
    device: torch.device,
    max_input_tokens: int,
) -> LoadedModel:
    """Probes the model, in float32, for its facts, and checks the packed pass against its own."""
    config = model.config
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    num_layers, num_heads, hidden_size = probe(model, device)
    default_pooling, default_normalize, pool_prompt = pooling_defaults(source)
    facts = ModelFacts(
        name=name,
        architecture=config.model_type,
        revision=getattr(config, "_commit_hash", None) or "",
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_attention_heads=num_heads or config.num_attention_heads,
        vocab_size=model.get_input_embeddings().num_embeddings,
        type_vocab_size=(getattr(config, "type_vocab_size", 0) or 0) if takes_types else 0,
        max_tokens=min(token_limit(config, family), max_input_tokens or token_limit(config, family)),
        has_pooler=pooler is not None,
        has_attentions=num_heads > 0,
        default_pooling=default_pooling,
        default_normalize=default_normalize,
        pool_prompt=pool_prompt,
        prompts=read_json(source, "config_sentence_transformers.json").get("prompts") or {},
        compute_dtype=DType.FLOAT32,
        device=str(device),
        packed=family is not None,
        attention=PADDED if family is None else attention.describe(torch.float32, device),
    )
    layers = layer_modules(model) if family is not None else []
    loaded = LoadedModel(
        model,
        tuple(layers),
        LayerHooks(),
        pooler,
        family or Family(),
        facts,
        device,
        config.pad_token_id or 0,
    )
    return loaded if family is None else make_packed(loaded)


def make_packed(loaded: LoadedModel) -> LoadedModel:
    """Readies the packed pass, as far as it gives what the model itself gives; else it runs padded."""
    model, facts = loaded.model, loaded.facts
    probes = own_hidden_states(model, loaded.device, facts.max_tokens)
    loaded.hooks.attach(loaded.layers)
    if not packed_agrees(loaded, probes):
        logger.warning("%s: packed results differ from the model's own; it runs padded", facts.name)
        model.set_attn_implementation("eager")
        return replace(loaded, layers=(), facts=replace(facts, packed=False, attention=PADDED))
    if not loaded.family.has_bert_layers:
        return loaded
    fused = {layer: FusedBertLayer(layer) for layer in loaded.layers}
    replace_modules(model, fused)
    loaded.hooks.attach(fused.values())
    if packed_agrees(loaded, probes):
        return replace(loaded, layers=tuple(fused.values()))
    logger.warning("%s: fused layers differ from the model's own; they are not used", facts.name)
    replace_modules(model, {new: old for old, new in fused.items()})
    return loaded


def narrow(loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    """Makes the linear layers ready, in `dtype`. The padded pass gets float32 back from each, since
    the library's eager attention wants all of its tensors of one type."""
    facts = loaded.facts
    num_prepacked, num_linears = prepare_linears(loaded.model, dtype, narrow_inside=loaded.layers)
    logger.info("%s: %d of %d linear layers run faster prepacked", facts.name, num_prepacked, num_linears)
    compute_dtype = next(ours for ours, torchs in TORCH_DTYPES.items() if torchs is dtype)
    described = attention.describe(dtype, loaded.device) if facts.packed else PADDED
    return replace(loaded, facts=replace(facts, compute_dtype=compute_dtype, attention=described))


def choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelLoadError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda:0" if device == "cuda" else device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return TORCH_DTYPES[DType[dtype.upper()]]

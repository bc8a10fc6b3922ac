"""From a checkpoint to a model that is ready to run, and the facts about it.

Nothing is taken on trust: the number of layers and heads comes from a pass, weights that the
checkpoint lacks are refused, and packed results are compared with the model's own eager attention
before the first request.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from layertap_server.engine import attention
from layertap_server.engine.checkpoint import ModelLoadError, check_room, read_config, read_weights
from layertap_server.engine.defaults import pooling_defaults, read_json
from layertap_server.engine.families import FAMILIES, Family, depends_on_longest
from layertap_server.engine.fused import FusedBertLayer, bert_forward, replace_modules
from layertap_server.engine.hooks import LayerHooks
from layertap_server.engine.linear import prepare_linears
from layertap_server.engine.memory import MemoryCost, keep_freed_memory
from layertap_server.engine.model import LoadedModel
from layertap_server.engine.native_embeddings import native_embeddings
from layertap_server.engine.native_layer import native_encoder
from layertap_server.engine.packed import run_packed
from layertap_server.engine.padded import run_padded
from layertap_server.engine.probing import (
    AGREEMENT,
    Probes,
    UnfitModelError,
    agrees,
    layer_modules,
    measure_memory,
    own_hidden_states,
    probe,
    same_in_any_company,
    token_limit,
    watch,
)
from layertap_server.engine.taps import TORCH_DTYPES
from layertap_server.plan import DType, ModelFacts

logger = logging.getLogger(__name__)

# transformers keeps the attention implementations in a process-wide table, and silences by globals.
_loading = threading.Lock()

PADDED = "padded by length groups, the model's own eager attention"
# What torch knows of the processor: instructions for products in bfloat16.
BFLOAT16_PROCESSORS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
ALONE = "each text by itself, the model's own eager attention"


def load_model(
    name: str,
    source: str,
    *,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    max_input_tokens: int,
    batch_invariant: bool = False,
) -> LoadedModel:
    """Loads `source` (a hub name or a local folder) to be served as `name`."""
    with _loading:
        attention.register()
        keep_freed_memory()
        torch_device = choose_device(device)
        torch_dtype, reason = choose_dtype(dtype, torch_device)
        logger.info(
            "%s: computes in %s on %s%s", name, str(torch_dtype).removeprefix("torch."), torch_device, reason
        )
        config = read_config(source, trust_remote_code)
        if getattr(config, "is_decoder", False):
            raise ModelLoadError(f"'{source}' is configured as a decoder; Layertap serves encoders")
        check_room(source, config, torch_device, trust_remote_code)
        runs_alone = depends_on_longest(config)
        family = None if runs_alone else FAMILIES.get(config.model_type)
        model, missing = read_weights(
            source, config, attention.NAME if family is not None else "eager", trust_remote_code
        )
        model.eval().requires_grad_(False).to(torch_device)
        pooler = detach_pooler(model, family, missing)
        try:
            loaded = prepare(name, source, model, family, pooler, torch_device, max_input_tokens)
        except UnfitModelError as error:
            raise ModelLoadError(f"cannot serve the model '{source}': {error}") from error
        agreed = make_padded(loaded, runs_alone) if family is None else make_packed(loaded, torch_dtype)
        ready = narrow(agreed, torch_dtype)
        if batch_invariant:
            ready = make_invariant(ready)
        return replace(ready, memory=measure_memory(ready, run_packed if ready.facts.packed else run_padded))


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
    return LoadedModel(
        model,
        tuple(layer_modules(model)) if family is not None else (),
        LayerHooks(),
        None,
        False,
        pooler,
        family or Family(),
        facts,
        device,
        config.pad_token_id or 0,
        MemoryCost(0, 0, 0),  # measured when the model is ready
    )


def make_padded(loaded: LoadedModel, runs_alone: bool = False) -> LoadedModel:
    """Readies the padded pass: hooked at the layers where they are found, and give what the model gives."""
    model, facts = loaded.model, loaded.facts
    model.set_attn_implementation("eager")
    watched = watch(model, loaded.device, facts.num_layers, has_maps=facts.has_attentions)
    hooks = LayerHooks()
    loaded = replace(
        loaded,
        layers=(),
        hooks=hooks,
        watched=watched,
        runs_alone=runs_alone,
        facts=replace(facts, packed=False, attention=ALONE if runs_alone else PADDED),
    )
    if watched is None:
        logger.info("%s: its layers were not found; all of them run for every batch", facts.name)
        return loaded
    hooks.attach(watched.receivers)
    hooks.attach_maps(watched.map_givers, watched.map_number)
    probes = own_hidden_states(model, loaded.device, facts.max_tokens)
    if not agrees(loaded, run_padded, probes):
        logger.info(
            "%s: its layers give other results one by one; all of them run for every batch", facts.name
        )
        return replace(loaded, watched=None)
    return loaded


def make_packed(loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    """Readies the packed pass, as far as it gives what the model itself gives; else it runs padded."""
    model, facts = loaded.model, loaded.facts
    probes = own_hidden_states(model, loaded.device, facts.max_tokens)
    loaded.hooks.attach(loaded.layers)
    if not agrees(loaded, run_packed, probes):
        logger.warning("%s: packed results differ from the model's own; it runs padded", facts.name)
        return make_padded(loaded)
    if not loaded.family.has_bert_layers:
        return loaded
    fused = {layer: FusedBertLayer(layer) for layer in loaded.layers}
    loaded, is_fused = with_stand_ins(loaded, "fused", fused, probes)
    if is_fused:
        encoder, natives = model.encoder, device_modules(loaded, dtype)
        loaded, _ = with_stand_ins(loaded, "native", natives, probes, AGREEMENT[dtype])
        if model.encoder is not encoder:
            loaded = shortened(replace(loaded, layers=()), probes, AGREEMENT[dtype])
    return loaded


def shortened(loaded: LoadedModel, probes: Probes, tolerance: float) -> LoadedModel:
    """The model without its own forward, if that does nothing but call its parts."""
    candidate = replace(loaded, forward=bert_forward)
    try:
        return candidate if agrees(candidate, run_packed, probes, tolerance) else loaded
    except Exception as error:  # whatever another forward may need
        logger.info("%s: its own forward is kept: %s", loaded.facts.name, error)
        return loaded


def device_modules(loaded: LoadedModel, dtype: torch.dtype) -> dict[nn.Module, nn.Module]:
    """What stands in for the modules of a model of fused layers on its device: the processor's, or CUDA's."""
    model = loaded.model
    if loaded.device.type == "cpu":
        return native_encoder(model.encoder, dtype) | native_embeddings(model.embeddings)
    from layertap_server.engine.cuda_layer import cuda_modules  # only here, since it brings Triton along

    return cuda_modules(model, dtype)


def with_stand_ins(
    loaded: LoadedModel,
    what: str,
    stand_ins: Mapping[nn.Module, nn.Module],
    probes: Probes,
    tolerance: float = AGREEMENT[torch.float32],
) -> tuple[LoadedModel, bool]:
    """The model with each module's stand-in, and whether they give what the model itself gives; else as it was."""
    if not stand_ins:
        return loaded, False
    replace_modules(loaded.model, stand_ins)
    candidate = replace(loaded, layers=tuple(stand_ins.get(layer, layer) for layer in loaded.layers))
    candidate.hooks.attach(layer for layer in candidate.layers if layer not in loaded.layers)
    try:
        does_agree, failure = agrees(candidate, run_packed, probes, tolerance), "they differ from its own"
    except Exception as error:  # whatever this device, its driver or its compiler cannot do
        does_agree, failure = False, str(error).strip()
    if does_agree:
        logger.info("%s: runs with %s layers", loaded.facts.name, what)
        return candidate, True
    logger.warning("%s: runs without %s layers: %s", loaded.facts.name, what, failure)
    replace_modules(loaded.model, {new: old for old, new in stand_ins.items()})
    return loaded, False


def narrow(loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    """Makes the linear layers ready, in `dtype`. The padded pass gets float32 back from each, since
    the library's eager attention wants all of its tensors of one type."""
    facts = loaded.facts
    if ways := prepare_linears(loaded.model, dtype, narrow_inside=loaded.layers):
        counted = ", ".join(f"{count} {way.value}" for way, count in ways.items())
        logger.info("%s: linear layers outside of native ones: %s", facts.name, counted)
    compute_dtype = next(ours for ours, torchs in TORCH_DTYPES.items() if torchs is dtype)
    described = attention.describe(dtype, loaded.device) if facts.packed else facts.attention
    return replace(loaded, facts=replace(facts, compute_dtype=compute_dtype, attention=described))


def make_invariant(loaded: LoadedModel) -> LoadedModel:
    """Lets texts share passes only where each gives the same bits in all of them."""
    facts = loaded.facts
    may_share = facts.packed and loaded.device.type == "cpu" and not loaded.runs_alone
    if may_share and same_in_any_company(loaded, run_packed):
        logger.info("%s: a text gives the same bits in every batch that was tried", facts.name)
        return loaded
    logger.info("%s: a text's bits would depend on its batch; each has a pass of its own", facts.name)
    return replace(loaded, runs_alone=True)


def choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelLoadError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
    if device.startswith("cuda") and find_spec("triton") is None:
        raise ModelLoadError(f"--device {device} needs Triton: pip install triton, or use --device cpu")
    return torch.device("cuda:0" if device == "cuda" else device)


def choose_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type to compute in, and the reason where it was not asked for by name."""
    if dtype != "auto":
        return TORCH_DTYPES[DType[dtype.upper()]], ""
    if device.type != "cpu":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, " (--dtype auto: 16 bits on CUDA, and this device has bfloat16)"
        return torch.float16, " (--dtype auto: 16 bits on CUDA, and this device has no bfloat16)"
    reason = " (--dtype auto: on a CPU results are those of transformers in float32"
    if any(getattr(torch.cpu, name, bool)() for name in BFLOAT16_PROCESSORS):
        reason += "; this one computes in bfloat16 as well: --dtype bfloat16 is faster, and less exact"
    return torch.float32, reason + ")"

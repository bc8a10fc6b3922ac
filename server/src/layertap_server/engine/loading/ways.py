"""The ways to run a model, from the fastest to the plainest; loading tries them in turn, and takes the first that holds.

A model that was made ready is changed for good: the next way begins with the model as it is in the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layertap_server.engine import attention
from layertap_server.engine.cpu.embeddings import native_embeddings
from layertap_server.engine.cpu.layer import native_encoder
from layertap_server.engine.fused import FusedBertLayer, bert_forward, replace_modules
from layertap_server.engine.hooks import LayerHooks
from layertap_server.engine.loading.checkpoint import one_line
from layertap_server.engine.loading.families import Family, sparse_blocks
from layertap_server.engine.loading.probing import layer_modules, watch
from layertap_server.engine.model import LoadedModel, Watched
from layertap_server.engine.precision import prepare_linears
from layertap_server.engine.taps import TORCH_DTYPES

logger = logging.getLogger(__name__)

PADDED = "padded by length groups, the model's own eager attention"
ALONE = "each text by itself, the model's own eager attention"
# Ways that do not fit every family: their differing is no fault.
SHORT_FORWARD = "packed, with native layers and no more"
WATCHED_PADDED, WHOLE_PADDED = "padded, no deeper than needed", "padded, all layers"
MAY_DIFFER = (SHORT_FORWARD, WATCHED_PADDED, WHOLE_PADDED)


def ways(
    plain: LoadedModel, family: Family | None, models: Iterator[Any], dtype: torch.dtype
) -> Iterator[tuple[str, LoadedModel]]:
    """Ready models, each with its way to run in words, the fastest first. Each is tried before the next is made.

    `family` is that of a model that may run packed; each of `models` is the model as it is in the checkpoint.
    """
    if family is not None and not plain.facts.is_last_apart:
        if family.has_bert_layers:
            yield from bert_ways(plain, models, dtype)
        yield "packed", narrow(packed(plain, next(models)), dtype)
    yield from padded_ways(narrow(replace(plain, model=next(models)), dtype))


def bert_ways(
    plain: LoadedModel, models: Iterator[Any], dtype: torch.dtype
) -> Iterator[tuple[str, LoadedModel]]:
    loaded = fused(plain, next(models))
    encoder, natives = loaded.model.encoder, device_modules(loaded, dtype)
    if natives:
        replace_modules(loaded.model, natives)
        has_native_encoder = loaded.model.encoder is not encoder
        if has_native_encoder:
            loaded = replace(loaded, layers=())
        del encoder, natives  # the weights that native ones were packed from
        native = narrow(loaded, dtype)
        if has_native_encoder:
            yield SHORT_FORWARD, replace(native, forward=bert_forward)
        yield "packed, with native layers", native
        del native
        loaded = fused(plain, next(models))
    yield "packed, with fused layers", narrow(loaded, dtype)


def packed(plain: LoadedModel, model: Any) -> LoadedModel:
    """The library's own model code over texts laid end to end."""
    model.set_attn_implementation(attention.NAME)
    layers = tuple(layer_modules(model))
    loaded = replace(
        plain,
        model=model,
        layers=layers,
        hooks=LayerHooks(),
        pooler=detach_pooler(model, plain.family) if plain.facts.has_pooler else None,
        facts=replace(plain.facts, packed=True),
    )
    loaded.hooks.attach(layers)
    return loaded


def detach_pooler(model: Any, family: Family) -> Callable[[torch.Tensor], torch.Tensor]:
    """Takes the pooler out of the model's forward: it runs only on the texts that want it."""
    call = family.pooler(model, model.pooler)
    model.pooler = None
    return call


def fused(plain: LoadedModel, model: Any) -> LoadedModel:
    """Packed, with BERT's layers in fewer and larger steps."""
    loaded = packed(plain, model)
    stand_ins: dict[nn.Module, nn.Module] = {layer: FusedBertLayer(layer) for layer in loaded.layers}
    replace_modules(model, stand_ins)
    loaded = replace(loaded, layers=tuple(stand_ins.values()))
    loaded.hooks.attach(loaded.layers)
    return loaded


def device_modules(loaded: LoadedModel, dtype: torch.dtype) -> Mapping[nn.Module, nn.Module]:
    """What stands in for the modules of a model of fused layers on its device: the processor's, or CUDA's."""
    model = loaded.model
    try:
        if loaded.device.type == "cpu":
            return native_encoder(model.encoder, dtype) | native_embeddings(model.embeddings)
        from layertap_server.engine.cuda.layer import cuda_modules  # only here, since it brings Triton along

        return cuda_modules(model, dtype)
    except Exception as error:  # whatever this device, its driver or its compiler cannot do
        logger.warning("%s: runs without native layers: %s", loaded.facts.name, one_line(error))
        return {}


def padded_ways(loaded: LoadedModel) -> Iterator[tuple[str, LoadedModel]]:
    """The model's own code over padded batches, hooked at the layers where they are found; then over each text by
    itself, for models whose layers mix neighbouring rows, padding included."""
    model = loaded.model
    model.set_attn_implementation("eager")
    watched = watched_or_none(model, loaded.device)
    if watched is not None and watched.after_last is None and loaded.facts.is_last_apart:
        watched = None
    hooks = LayerHooks()
    if watched is None:
        logger.info("%s: its layers were not found; all of them run for every batch", loaded.facts.name)
    else:
        hooks.attach(watched.receivers)
        hooks.attach_maps(watched.map_givers, watched.map_number)
        if watched.after_last is not None and loaded.facts.is_last_apart:
            hooks.attach_last(watched.after_last)
    loaded = replace(loaded, hooks=hooks, begin_anew=sparse_blocks(model))
    for alone in (True,) if loaded.runs_alone else (False, True):
        facts = replace(loaded.facts, attention=ALONE if alone else PADDED)
        loaded = replace(loaded, runs_alone=alone, facts=facts)
        if watched is not None:
            yield (
                "alone, no deeper than needed" if alone else WATCHED_PADDED,
                replace(loaded, watched=watched),
            )
        yield "alone, all layers" if alone else WHOLE_PADDED, loaded


def watched_or_none(model: Any, device: torch.device) -> Watched | None:
    try:
        watched: Watched | None = watch(model, device)
        return watched
    except Exception as error:  # the references will tell what is wrong with it
        logger.debug("watching a pass failed", exc_info=error)
        return None


def narrow(loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    """Makes the linear layers ready, in `dtype`, the pooler's apart: it stays float32. The padded pass gets float32
    back from each, since the library's eager attention wants all of its tensors of one type."""
    facts, model = loaded.facts, loaded.model
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module):
        model.pooler = None
    if ways := prepare_linears(model, dtype, narrow_inside=loaded.layers):
        counted = ", ".join(f"{count} {way.value}" for way, count in ways.items())
        logger.info("%s: linear layers outside of native ones: %s", facts.name, counted)
    if isinstance(pooler, nn.Module):
        model.pooler = pooler
    compute_dtype = next(ours for ours, torchs in TORCH_DTYPES.items() if torchs is dtype)
    described = attention.describe(dtype, loaded.device) if facts.packed else facts.attention
    return replace(loaded, facts=replace(facts, compute_dtype=compute_dtype, attention=described))

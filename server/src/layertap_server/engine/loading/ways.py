"""The ways to run a model, from the fastest to the plainest.

Loading tries them in this order and takes the first whose results agree with
the reference results. Preparing a model changes it irreversibly: a way that
needs another preparation starts again from the model as in the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
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
from layertap_server.engine.loading.probing import layer_modules, uncalled_linears, watch
from layertap_server.engine.model import LoadedModel, Watched
from layertap_server.engine.precision import prepare_linears
from layertap_server.engine.taps import TORCH_DTYPES

logger = logging.getLogger(__name__)

PADDED = "padded by length groups, the model's own eager attention"
ALONE = "each text by itself, the model's own eager attention"
# Ways that are not right for every family: a difference is expected, and is logged as information only.
SHORT_FORWARD = "packed, with native layers and no more"
WATCHED_PADDED, WHOLE_PADDED = "padded, no deeper than needed", "padded, all layers"
MAY_DIFFER = (SHORT_FORWARD, WATCHED_PADDED, WHOLE_PADDED)


def ways(
    plain: LoadedModel, family: Family | None, models: Iterator[Any], dtype: torch.dtype
) -> Iterator[tuple[str, LoadedModel]]:
    """Yields descriptions of ways to run with the models prepared for them, the fastest first. A model is
    prepared only when the caller asks for it, after it has tried the one before.

    `family` is None for a model that must run padded. Each item of
    `models` is the model as in the checkpoint.
    """
    if family is not None and not plain.facts.is_last_apart:
        if family.has_bert_layers:
            yield from bert_ways(plain, models, dtype)
        yield "packed", narrow(packed(plain, next(models)), dtype)
    model = next(models)
    uncalled = uncalled_linears(model, plain.device, plain.facts.max_tokens)
    yield from padded_ways(narrow(replace(plain, model=model), dtype, kept=uncalled))


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
        del encoder, natives  # frees the weights that were copied into the native modules
        native = narrow(loaded, dtype)
        if has_native_encoder:
            yield SHORT_FORWARD, replace(native, forward=bert_forward)
        yield "packed, with native layers", native
        del native
        loaded = fused(plain, next(models))
    yield "packed, with fused layers", narrow(loaded, dtype)


def packed(plain: LoadedModel, model: Any) -> LoadedModel:
    """Prepares the library's own model code to run on packed texts, concatenated without padding."""
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
    """Removes the pooler from the model's forward, and returns a
    function that runs it on the texts that want it."""
    call = family.pooler(model, model.pooler)
    model.pooler = None
    return call


def fused(plain: LoadedModel, model: Any) -> LoadedModel:
    """Prepares a packed model whose BERT layers are replaced by
    `FusedBertLayer`: fewer and larger operations."""
    loaded = packed(plain, model)
    stand_ins: dict[nn.Module, nn.Module] = {layer: FusedBertLayer(layer) for layer in loaded.layers}
    replace_modules(model, stand_ins)
    loaded = replace(loaded, layers=tuple(stand_ins.values()))
    loaded.hooks.attach(loaded.layers)
    return loaded


def device_modules(loaded: LoadedModel, dtype: torch.dtype) -> Mapping[nn.Module, nn.Module]:
    """The modules of a model of fused layers, with their replacements
    for the CPU or for CUDA; empty if there are none."""
    model = loaded.model
    try:
        if loaded.device.type == "cpu":
            return native_encoder(model.encoder, dtype) | native_embeddings(model.embeddings)
        # Imported only here, since it imports Triton.
        from layertap_server.engine.cuda.layer import cuda_modules

        return cuda_modules(model, dtype)
    except Exception as error:  # the device, its driver or its compiler may raise anything
        logger.warning("%s: runs without native layers: %s", loaded.facts.name, one_line(error))
        return {}


def padded_ways(loaded: LoadedModel) -> Iterator[tuple[str, LoadedModel]]:
    """The model's own code over padded batches, then over batches of one, for
    models whose layers mix neighbouring rows, including those of padding. Each
    comes with hooks at the layers, if these are found, and then without."""
    model = loaded.model
    model.set_attn_implementation("eager")
    watched = watched_or_none(model, loaded.device)
    if watched is not None and watched.after_last is None and loaded.facts.is_last_apart:
        watched = None
    hooks = LayerHooks()
    if watched is None:
        logger.info("%s: its layers were not recognized; every batch runs all layers", loaded.facts.name)
    else:
        hooks.attach(watched.receivers)
        hooks.attach_maps(watched.map_givers, watched.map_number)
        if watched.after_last is not None and loaded.facts.is_last_apart:
            hooks.attach_last(watched.after_last)
    loaded = replace(loaded, hooks=hooks, begin_anew=sparse_blocks(model))
    for alone in (True,) if loaded.one_text_per_pass else (False, True):
        facts = replace(loaded.facts, attention=ALONE if alone else PADDED)
        loaded = replace(loaded, one_text_per_pass=alone, facts=facts)
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
    except Exception as error:  # computing the reference results will report what is wrong
        logger.debug("recording the layers of a forward pass failed", exc_info=error)
        return None


def narrow(loaded: LoadedModel, dtype: torch.dtype, kept: Collection[nn.Module] = ()) -> LoadedModel:
    """Prepares the linear layers to compute in `dtype`, except those in `kept`, and the pooler's,
    which stay float32. In a padded model each of them returns float32, since
    the library's eager attention needs all its tensors in one type."""
    facts, model = loaded.facts, loaded.model
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module):
        model.pooler = None
    if ways := prepare_linears(model, dtype, narrow_inside=loaded.layers, kept=kept):
        counted = ", ".join(f"{count} {way.value}" for way, count in ways.items())
        logger.info("%s: linear layers outside of native ones: %s", facts.name, counted)
    if isinstance(pooler, nn.Module):
        model.pooler = pooler
    compute_dtype = next(ours for ours, torchs in TORCH_DTYPES.items() if torchs is dtype)
    described = attention.describe(dtype, loaded.device) if facts.packed else facts.attention
    return replace(loaded, facts=replace(facts, compute_dtype=compute_dtype, attention=described))

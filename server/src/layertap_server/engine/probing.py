"""What a model is, found by running it: its layers and heads, and whether it may run packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from layertap_server.engine.families import Family
from layertap_server.engine.model import LoadedModel
from layertap_server.engine.packed import run_packed
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import Taps
from layertap_server.plan import DType, Int64Array, OutputPlan, Work

# Largest relative Frobenius error, in float32, between the packed pass and the model's own.
PACKED_TOLERANCE = 1e-4


Probes = list[tuple[Int64Array, torch.Tensor]]


class UnfitModelError(Exception):
    """The model does not give what an encoder gives."""


def probe_ids(num_tokens: int, vocab_size: int, offset: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Ordinary ids, away from the special tokens at the vocabulary's start where it is large enough."""
    return (np.arange(num_tokens, dtype=np.int64) * 37 + offset) % max(vocab_size - 5, 1) + min(
        4, vocab_size - 1
    )


@torch.inference_mode()
def probe(model: Any, device: torch.device) -> tuple[int, int, int]:
    """(layers, heads, hidden size), counted on the model's own outputs; 0 heads: it gives no maps."""
    ids = torch.from_numpy(probe_ids(6, model.get_input_embeddings().num_embeddings, 1))[None].to(device)
    with eager_attention(model):
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            output_hidden_states=True,
            output_attentions=True,
        )
    hidden_states = output.hidden_states
    if not hidden_states or hidden_states[0].shape != hidden_states[-1].shape:
        raise UnfitModelError(f"'{model.config.model_type}' does not give one hidden state a layer and token")
    num_layers = len(hidden_states) - 1
    attentions: Sequence[Any] = output.attentions or ()
    uniform = len(attentions) == num_layers and all(
        weights is not None and weights.ndim == 4 and weights.shape[-2:] == (6, 6) for weights in attentions
    )
    return num_layers, int(attentions[0].shape[1]) if uniform else 0, int(hidden_states[-1].shape[-1])


@torch.inference_mode()
def own_hidden_states(model: Any, device: torch.device, max_tokens: int) -> Probes:
    """A few texts, and all hidden states (L+1, T, H) that the model's eager attention gives each alone."""
    vocab_size = model.get_input_embeddings().num_embeddings
    probes = []
    with eager_attention(model):
        for length in (3, 7, 5):
            ids = probe_ids(min(length, max_tokens), vocab_size, length)
            output = model(input_ids=torch.from_numpy(ids)[None].to(device), output_hidden_states=True)
            probes.append((ids, torch.cat(output.hidden_states)))
    return probes


@torch.inference_mode()
def packed_agrees(loaded: LoadedModel, probes: Probes) -> bool:
    """Whether the texts packed together give what the model itself gave each alone."""
    plan = OutputPlan(DType.FLOAT32, hidden_states=tuple(range(loaded.facts.num_layers + 1)))
    works = [Work(ids, None, plan, plan.specs(len(ids), loaded.facts.hidden_size)) for ids, _ in probes]
    packing = Packing.of(works)
    taps = Taps(packing, loaded.facts.num_layers, loaded.device)
    run_packed(loaded, packing, taps)
    for (packed,), position in zip(taps.buffers, packing.order, strict=True):
        alone = probes[position][1]
        if packed is None or not (packed - alone).norm() <= PACKED_TOLERANCE * alone.norm():
            return False
    return True


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """The library's own attention for a while; the config is read at every pass."""
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = implementation


def layer_modules(model: Any) -> list[nn.Module]:
    """The modules whose outputs are the hidden states, as transformers itself records them."""
    recorded = model._can_record_outputs["hidden_states"]
    layer_class = getattr(recorded, "target_class", recorded)
    return [module for module in model.modules() if isinstance(module, layer_class)]


def token_limit(config: Any, family: Family | None) -> int:
    """Tokens of the longest text that the model has positions for."""
    num_positions = (
        getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 512
    )
    if family is not None:
        token_id = 0 if config.pad_token_id else 1  # any but padding
        no_outputs = OutputPlan(DType.FLOAT32)
        one_token = Packing.of([Work(np.array([token_id]), None, no_outputs, ())])
        num_positions -= int(family.positions(one_token, config)[0])
    elif config.model_type == "mpnet":
        num_positions -= 2  # counted from behind its padding_idx, which is 1 whatever its config says
    return int(num_positions)

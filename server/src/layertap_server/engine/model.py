"""A model that is loaded, with all that a pass over it needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from layertap_server.engine.hooks import LayerHooks
from layertap_server.engine.loading.families import Family, ModelInputs
from layertap_server.engine.memory import MemoryCost
from layertap_server.engine.packing import Packing
from layertap_server.engine.projection import Projection
from layertap_server.engine.taps import DepthReachedError, Taps
from layertap_server.engine.transfer import staging
from layertap_server.plan import ModelFacts


@dataclass(frozen=True, slots=True)
class Watched:
    """Where hidden states and attention maps pass by in a model that runs padded."""

    # Modules that receive hidden states 0 to L-1, as their first argument.
    receivers: tuple[nn.Module, ...]
    # The module that receives hidden state L, where the model has one behind its layers: a final norm.
    after_last: nn.Module | None
    # Modules whose outputs hold the maps, and at which place in the tuple. None: it gives no maps.
    map_givers: tuple[nn.Module, ...]
    map_number: int
    # Whether they do so only with `output_attentions`.
    gives_maps_if_told: bool


def on(device: torch.device) -> AbstractContextManager[None]:
    """Where kernels of our own are launched on it: torch's operations find the device of their tensors themselves."""
    guard: AbstractContextManager[None] = (
        torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    )
    return guard


def own_forward(model: Any, **arguments: Any) -> torch.Tensor:
    """The last hidden state, by the model's own forward."""
    hidden: torch.Tensor = model(**arguments).last_hidden_state
    return hidden


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Any
    # The layers of a model that runs packed, in order.
    layers: tuple[nn.Module, ...]
    hooks: LayerHooks
    # Of a model that runs padded; None where its layers were not found, and all of it runs.
    watched: Watched | None
    # Whether each text has a pass of its own, since its results would depend on its company.
    runs_alone: bool
    # (n, 1, H) first rows to (n, H), of a model that runs packed and has a pooler. Padded, it is the model's forward
    # that runs it.
    pooler: Callable[[torch.Tensor], torch.Tensor] | None
    family: Family
    facts: ModelFacts
    device: torch.device
    pad_token_id: int
    memory: MemoryCost
    # From the model and its arguments to the last hidden state.
    forward: Callable[..., torch.Tensor] = own_forward
    # Called before each pass, where a model keeps something of the one before.
    begin_anew: Callable[[], None] | None = None
    # Of the configured embedding; None where it is pooled and nothing else.
    projection: Projection | None = None

    def run_layers(self, taps: Taps, arguments: dict[str, Any]) -> None:
        """One pass of the model, as deep as anyone needs, whose hooks feed `taps`."""
        with on(self.device), self.hooks.feeding(taps), suppress(DepthReachedError):
            taps.write_hidden_state(taps.last_index, self.forward(self.model, **arguments))

    def rows_of(self, packing: Packing, num_rows: int = 0) -> torch.Tensor:
        """What a packed batch is made of, on the host, ready to be copied to the device.

        (5, rows) int64: of each row its token, position and type ids, and in which rows its text begins and
        ends. The rows behind the texts are padding tokens at the first position, each a text of its own;
        in all there are as many as the packing would have, or `num_rows`.
        """
        total = packing.total_tokens
        tensor, rows = staging((5, num_rows or packing.num_rows), self.device)
        ids, positions, types, starts, ends = rows
        ids[:total], ids[total:] = packing.input_ids(), self.pad_token_id
        positions[:total] = self.family.positions(packing, self.model.config)
        positions[total:] = positions[0]
        types[:total], types[total:] = packing.token_type_ids() if self.facts.type_vocab_size else 0, 0
        starts[:total] = packing.of_each_row(packing.cu_seqlens_array[:-1])
        ends[:total] = packing.of_each_row(packing.cu_seqlens_array[1:])
        starts[total:] = np.arange(total, len(starts))
        ends[total:] = starts[total:] + 1
        return tensor

    def inputs_of(self, rows: torch.Tensor) -> ModelInputs:
        """The arguments of the model's forward for such rows, (1, rows, …) each, in the same memory."""
        inputs = {"input_ids": rows[0:1], "position_ids": rows[1:2]}
        if self.facts.type_vocab_size > 0:
            inputs["token_type_ids"] = rows[2:3]
        if self.family.embeddings is not None:
            inputs = self.family.embeddings(self.model, inputs, rows[3:])
        return inputs


# Runs a batch and feeds its taps.
Pass = Callable[[LoadedModel, Packing, Taps], None]

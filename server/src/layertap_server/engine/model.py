"""A model that is loaded, with all that a pass over it needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from layertap_server.engine.families import Family, ModelInputs
from layertap_server.engine.memory import MemoryCost
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import DepthReachedError, LayerHooks, Taps
from layertap_server.engine.transfer import to_device
from layertap_server.plan import ModelFacts


@dataclass(frozen=True, slots=True)
class Watched:
    """Where hidden states and attention maps pass by in a model that runs padded."""

    # Modules that receive hidden states 0 to L-1, as their first argument.
    receivers: tuple[nn.Module, ...]
    # Modules whose outputs hold the maps, and at which place in the tuple. None: it gives no maps.
    map_givers: tuple[nn.Module, ...]
    map_number: int
    # Whether they do so only with `output_attentions`.
    gives_maps_if_told: bool


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
    # (n, 1, H) first rows to (n, H); None where the model has no pooler.
    pooler: Callable[[torch.Tensor], torch.Tensor] | None
    family: Family
    facts: ModelFacts
    device: torch.device
    pad_token_id: int
    memory: MemoryCost

    def run_layers(self, taps: Taps, arguments: dict[str, Any]) -> None:
        """One pass of the model, as deep as anyone needs, whose hooks feed `taps`."""
        with self.hooks.feeding(taps), suppress(DepthReachedError):
            output = self.model(**arguments)
            taps.write_hidden_state(taps.num_layers, output.last_hidden_state)

    def packed_inputs(self, packing: Packing) -> ModelInputs:
        """The arguments of the model's forward for a packed batch, each (1, rows).

        The rows behind the texts are padding tokens at the first position.
        """
        arrays = {
            "input_ids": packing.input_ids(),
            "position_ids": self.family.positions(packing, self.model.config),
        }
        if self.facts.type_vocab_size > 0:
            arrays["token_type_ids"] = packing.token_type_ids()
        filling = {
            "input_ids": self.pad_token_id,
            "position_ids": arrays["position_ids"][0],
            "token_type_ids": 0,
        }
        filled = np.empty((len(arrays), packing.num_rows), np.int64)
        for row, (name, array) in zip(filled, arrays.items(), strict=True):
            row[: len(array)], row[len(array) :] = array, filling[name]
        rows = to_device(filled, self.device)  # one copy for all
        inputs = {name: row[None] for name, row in zip(arrays, rows, strict=True)}
        if self.family.embeddings is not None:
            inputs = self.family.embeddings(self.model, packing, inputs)
        return inputs


# Runs a batch and feeds its taps.
Pass = Callable[[LoadedModel, Packing, Taps], None]

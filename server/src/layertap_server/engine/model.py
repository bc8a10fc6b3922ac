"""A loaded model, with everything that a pass needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from layertap_server.engine.contacts import ContactHead
from layertap_server.engine.heads import Head
from layertap_server.engine.hooks import LayerHooks
from layertap_server.engine.loading.families import Family, ModelInputs
from layertap_server.engine.memory import MemoryCost
from layertap_server.engine.packing import Packing
from layertap_server.engine.projection import Projection
from layertap_server.engine.sparse_vectors import SparsePooling
from layertap_server.engine.taps import DepthReachedError, Taps
from layertap_server.engine.transfer import staging
from layertap_server.model_facts import ModelFacts


@dataclass(frozen=True, slots=True)
class Watched:
    """The modules of a padded model at which hooks capture hidden states and attention maps."""

    # Modules that receive hidden states 0 to L-1, as their first argument.
    receivers: tuple[nn.Module, ...]
    # The module after the layers that receives hidden state L, such as a final norm; None if there is none.
    after_last: nn.Module | None
    # The modules whose output tuples hold the maps, and the index there. Empty: the model gives no maps.
    map_givers: tuple[nn.Module, ...]
    map_number: int
    # Whether they return the maps only with `output_attentions`.
    gives_maps_if_told: bool


def on(device: torch.device) -> AbstractContextManager[None]:
    """A context in which our own kernels are launched on the device. (torch's operations take the device from
    their tensors and do not need it.)"""
    guard: AbstractContextManager[None] = (
        torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    )
    return guard


def own_forward(model: Any, **arguments: Any) -> torch.Tensor:
    """The last hidden state, computed by the model's own forward."""
    hidden: torch.Tensor = model(**arguments).last_hidden_state
    return hidden


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Any
    # The layers of a model that runs packed, in order.
    layers: tuple[nn.Module, ...]
    hooks: LayerHooks
    # The hooked modules of a padded model. None for a packed model, and for a padded one whose layers were
    # not found: all of its layers then run in every pass.
    watched: Watched | None
    # Whether each text runs in a batch of one, since its results would depend on its batch mates.
    one_text_per_pass: bool
    # The pooler of a packed model, from first rows (n, 1, H) to (n, H); None if it has none. In a padded
    # model, the model's forward runs the pooler.
    pooler: Callable[[torch.Tensor], torch.Tensor] | None
    family: Family
    facts: ModelFacts
    device: torch.device
    pad_token_id: int
    memory: MemoryCost
    # Takes the model and its arguments, and returns the last hidden state.
    forward: Callable[..., torch.Tensor] = own_forward
    # Called before each pass of a model that keeps state between passes, to reset that state.
    begin_anew: Callable[[], None] | None = None
    # The modules of the configured embedding; None if it only pools.
    projection: Projection | None = None
    # The checkpoint's head; None if it has none.
    head: Head | None = None
    # How the head's scores become a sparse vector; None if the checkpoint's files do not say.
    sparse: SparsePooling | None = None
    # The head that predicts a protein's contacts; None if the model has none.
    contact_head: ContactHead | None = None

    def run_layers(self, taps: Taps, arguments: dict[str, Any]) -> None:
        """One pass of the model, up to the deepest layer that a text needs. Captures go to `taps`."""
        with on(self.device), self.hooks.feeding(taps), suppress(DepthReachedError):
            taps.write_hidden_state(taps.last_index, self.forward(self.model, **arguments))

    def rows_of(self, packing: Packing, num_rows: int = 0) -> torch.Tensor:
        """The model inputs of a packed batch, in host memory, ready to be copied to the device.

        (5, rows) int64: for each row its token id, position id and type id, and the rows [start, end) of its
        text. The rows after the texts are padding tokens at the position id of the first row, each a text of
        its own. The number of rows is `num_rows`, or that of the packing if it is 0.
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
        """The arguments of the model's forward for the rows of
        `rows_of`: (1, rows, …) each. Ids are views of `rows`."""
        inputs = {"input_ids": rows[0:1], "position_ids": rows[1:2]}
        if self.facts.type_vocab_size > 0:
            inputs["token_type_ids"] = rows[2:3]
        if self.family.embeddings is not None:
            inputs = self.family.embeddings(self.model, inputs, rows[3:])
        return inputs


# A function that runs a batch and writes the captures to its taps.
Pass = Callable[[LoadedModel, Packing, Taps], None]

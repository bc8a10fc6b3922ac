"""A model that is loaded, with all that a pass over it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from layertap_server.engine.families import Family, ModelInputs
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import LayerHooks
from layertap_server.plan import ModelFacts


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Any
    # The modules whose outputs are the hidden states, in order.
    layers: tuple[nn.Module, ...]
    hooks: LayerHooks
    # (n, 1, H) first rows to (n, H); None where the model has no pooler.
    pooler: Callable[[torch.Tensor], torch.Tensor] | None
    family: Family
    facts: ModelFacts
    device: torch.device
    pad_token_id: int

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
        num_filled = packing.num_rows - packing.total_tokens
        inputs = {
            name: torch.from_numpy(np.pad(array, (0, num_filled), constant_values=filling[name]))[None].to(
                self.device
            )
            for name, array in arrays.items()
        }
        if self.family.embeddings is not None:
            inputs = self.family.embeddings(self.model, packing, inputs)
        return inputs

"""BERT's layer in fewer and larger steps: for a single text, half of the time was the steps between.

The same weights and arithmetic as the library's layer, with query, key and value in one product and
without what serves training or decoding alone: dropout, chunking, caches, cross attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from layertap_server.engine.attention import attend
from layertap_server.engine.taps import Taps


class FusedBertLayer(nn.Module):  # type: ignore[misc]  # torch is not followed by the type checker
    """Stands in for a BertLayer, and for the layers of the same build."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        own = layer.attention.self
        self.num_heads = own.num_attention_heads
        self.head_dim = own.attention_head_size
        self.scaling = own.scaling
        self.query_key_value = concatenated([own.query, own.key, own.value])
        self.attention_output = layer.attention.output.dense
        self.attention_norm = layer.attention.output.LayerNorm
        self.intermediate = layer.intermediate.dense
        self.activation = layer.intermediate.intermediate_act_fn
        self.output = layer.output.dense
        self.output_norm = layer.output.LayerNorm

    def forward(self, hidden_states: torch.Tensor, *_: Any, taps: Taps, **__: Any) -> torch.Tensor:
        """(1, rows, H) to the same."""
        products = self.query_key_value(hidden_states[0])
        query, key, value = products.view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        attended = attend(query, key, value, taps, self.scaling)
        hidden_states = self.attention_norm(self.attention_output(attended.flatten(1)[None]) + hidden_states)
        widened = self.activation(self.intermediate(hidden_states))
        output: torch.Tensor = self.output_norm(self.output(widened) + hidden_states)
        return output


def bert_forward(model: Any, *, taps: Taps, **ids: torch.Tensor) -> torch.Tensor:
    """A model's last hidden state without its forward: what that does beside these calls serves masks, caches and
    poolers, and takes as long as a layer of a small model does for a short text."""
    hidden_states = model.embeddings(**ids)
    if hasattr(model, "embeddings_project"):  # ELECTRA's, where they are narrower
        hidden_states = model.embeddings_project(hidden_states)
    output: torch.Tensor = model.encoder(hidden_states, taps=taps).last_hidden_state
    return output


def concatenated(linears: list[nn.Linear]) -> nn.Linear:
    """Layers of one input as one layer, their outputs side by side."""
    joined = nn.Linear(
        linears[0].in_features,
        sum(linear.out_features for linear in linears),
        device="meta",
    )
    joined.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    joined.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return joined


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Puts each value where its key stands."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])

"""BERT's layer as fewer and larger operations: for a single text,
half of the time was spent between the operations.

It has the same weights and arithmetic as the library's layer, but computes query, key and value in one
product, and omits what only training or decoding need: dropout, chunking, caches, cross attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from layertap_server.engine.attention import attend
from layertap_server.engine.taps import Taps


class FusedBertLayer(nn.Module):  # type: ignore[misc]  # torch is not followed by the type checker
    """Replaces a BertLayer, or a layer of the same structure."""

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
        """(1, rows, H) to the layer's output, (1, rows, H)."""
        products = self.query_key_value(hidden_states[0])
        query, key, value = products.view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        attended = attend(query, key, value, taps, self.scaling)
        hidden_states = self.attention_norm(self.attention_output(attended.flatten(1)[None]) + hidden_states)
        widened = self.activation(self.intermediate(hidden_states))
        output: torch.Tensor = self.output_norm(self.output(widened) + hidden_states)
        return output


def bert_forward(model: Any, *, taps: Taps, **ids: torch.Tensor) -> torch.Tensor:
    """The last hidden state, computed from a model's embeddings and encoder without calling its forward.

    The rest of the forward deals with masks, caches and poolers, which are not needed here. For a short text
    it takes as long as one layer of a small model.
    """
    hidden_states = model.embeddings(**ids)
    if hasattr(model, "embeddings_project"):  # ELECTRA with embeddings narrower than its hidden states
        hidden_states = model.embeddings_project(hidden_states)
    output: torch.Tensor = model.encoder(hidden_states, taps=taps).last_hidden_state
    return output


def concatenated(linears: list[nn.Linear]) -> nn.Linear:
    """Linear layers with the same input as one layer, whose output is the concatenation of theirs."""
    joined = nn.Linear(
        linears[0].in_features,
        sum(linear.out_features for linear in linears),
        device="meta",
    )
    joined.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    joined.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return joined


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces each submodule of the model that is a key by its value."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])

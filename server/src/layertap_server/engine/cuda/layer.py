"""BERT's encoder and embeddings on CUDA in 16 bits: matrix products by torch's libraries, and fused kernels
of our own for the residual sum, the norm and the rounding between them.

Only the products are in 16 bits. The residual stream and the norms are float32, and the norm's kernel also
writes the rounded copy that the next product reads. Exact GELU is replaced by the tanh approximation that the
product's library applies to the float32 product before it is rounded. The result is closer to the exact one
than an exact GELU of the rounded product would be (docs/cuda.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from layertap_server.engine.attention import attend
from layertap_server.engine.cpu.embeddings import PARTS
from layertap_server.engine.cpu.structures import TABLES
from layertap_server.engine.cuda.steps import embed_norm, sum_norm
from layertap_server.engine.fused import FusedBertLayer
from layertap_server.engine.precision import is_exact_gelu
from layertap_server.engine.taps import Taps


class NarrowLinear:
    """x·Wᵀ + b with weights and result in 16 bits and, with `gelu`, its GELU by the tanh approximation."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, *, gelu: bool = False) -> None:
        self._weight = linear.weight.detach().to(dtype).t()
        self._bias = linear.bias.detach().to(dtype)
        self._gelu = gelu

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, in) to (rows, out)."""
        if self._gelu:
            return torch._addmm_activation(self._bias, rows, self._weight, use_gelu=True)
        return torch.addmm(self._bias, rows, self._weight)


class CudaBertLayer:
    """A `FusedBertLayer` with its products in `dtype`."""

    def __init__(self, layer: FusedBertLayer, dtype: torch.dtype) -> None:
        has_gelu = is_exact_gelu(layer.activation)
        self.query_key_value = NarrowLinear(layer.query_key_value, dtype)
        self.attention_output = NarrowLinear(layer.attention_output, dtype)
        self.intermediate = NarrowLinear(layer.intermediate, dtype, gelu=has_gelu)
        self.activation = None if has_gelu else layer.activation
        self.output = NarrowLinear(layer.output, dtype)
        self.attention_norm, self.output_norm = layer.attention_norm, layer.output_norm
        self.shape = (3, layer.num_heads, layer.head_dim)
        self.scaling = layer.scaling

    def __call__(
        self, rows: torch.Tensor, narrowed: torch.Tensor, taps: Taps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the next hidden state. Input and output are a
        hidden state (rows, H) in float32, and the same in 16 bits."""
        query, key, value = self.query_key_value(narrowed).view(-1, *self.shape).unbind(1)
        attended = attend(query, key, value, taps, self.scaling).flatten(1)
        rows, narrowed = sum_norm(self.attention_output(attended), rows, self.attention_norm)
        widened = self.intermediate(narrowed)
        if self.activation is not None:
            widened = self.activation(widened)
        return sum_norm(self.output(widened), rows, self.output_norm)


class CudaBertEncoder(nn.Module):  # type: ignore[misc]  # torch is not followed by the type checker
    """Replaces a BertEncoder, or a module of the same structure."""

    def __init__(self, layers: Sequence[FusedBertLayer], dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._layers = [CudaBertLayer(layer, dtype) for layer in layers]

    def forward(self, hidden_states: torch.Tensor, *_: Any, taps: Taps, **__: Any) -> Any:
        """(1, rows, H) float32 to the library's output object with a
        last_hidden_state of that shape and type."""
        rows = hidden_states[0]
        narrowed = rows.to(self._dtype)
        for layer in self._layers:
            taps.next_hidden_state(rows[None])
            rows, narrowed = layer(rows, narrowed, taps)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=rows[None])


class CudaBertEmbeddings(nn.Module):  # type: ignore[misc]  # torch is not followed by the type checker
    """Replaces a BertEmbeddings, or a module of the same structure; everything is float32."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.word_embeddings = embeddings.word_embeddings  # transformers looks for it under this name
        self.norm = embeddings.LayerNorm
        self._tables = tuple(getattr(embeddings, name).weight.detach().contiguous() for name in TABLES)

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """(1, rows) ids to (1, rows, H)."""
        ids = (input_ids[0], token_type_ids[0], position_ids[0])
        return embed_norm(ids, self._tables, self.norm)[None]


def cuda_modules(model: Any, dtype: torch.dtype) -> dict[nn.Module, nn.Module]:
    """The modules of a model of fused layers with their replacements
    on CUDA in 16 bits; empty for float32."""
    if dtype is torch.float32:
        return {}
    stand_ins: dict[nn.Module, nn.Module] = {model.encoder: CudaBertEncoder(list(model.encoder.layer), dtype)}
    if {name for name, _ in model.embeddings.named_children()} == PARTS:
        stand_ins[model.embeddings] = CudaBertEmbeddings(model.embeddings)
    return stand_ins

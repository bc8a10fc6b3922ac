"""Attention over packed texts: a fused kernel for all texts, and
separately computed maps for those that want them.

Registered with transformers under the name `layertap_packed`, so that the library's own model code runs on
packed rows. The `Taps` of the batch reach this code as the keyword argument `taps` of the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from layertap_server.engine.attention_maps import MAP_SCRATCH_BYTES, MapTap
from layertap_server.engine.cpu import library as native
from layertap_server.engine.cpu.library import AttentionKernel, attention_kernel
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import Taps
from layertap_server.engine.transfer import to_device

NAME = "layertap_packed"


def local_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(T, T), True where |i - j| < window; None if every token attends to every other.

    `window` is the half-window plus one: transformers passes it in flash attention's convention.
    """
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=device)
    return (positions[:, None] - positions[None, :]).abs() < window


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    taps: Taps,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in which each packed text attends only to itself.

    `query`, `key` and `value` are (1, heads, total, head_dim). Returns (1, total, heads, head_dim), and None
    for the attention weights: the requested ones are written to `taps`.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if key.shape[1] != query.shape[1]:  # grouped queries
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    if value.dtype is not query.dtype and taps.attention is None:
        # Rotary embeddings made query and key float32; value is still in 16 bits.
        value = value.to(query.dtype)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attend(query, key, value, taps, scaling, sliding_window)[None], None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    taps: Taps,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of one layer; the tensors and the result are (total, heads, head_dim). Writes the requested
    maps to `taps`, and raises `DepthReachedError` if nothing else is wanted from here on."""
    kernel = kernel_for(query.dtype, query.device)
    for map_taps in taps.begin_attention():
        (kernel.write_maps if kernel else write_maps)(query, key, map_taps, scaling, window)
    taps.end_attention()
    if taps.attention is not None:
        return taps.attention(query, key, value, scaling, window)
    return (kernel or attend_runs)(query, key, value, taps.packing, scaling, window)


def kernel_for(dtype: torch.dtype, device: torch.device) -> AttentionKernel | None:
    """The native kernel for this type and device; None if there is none."""
    return attention_kernel() if device.type == "cpu" and dtype in native.DTYPES else None


def describe(dtype: torch.dtype, device: torch.device) -> str:
    return f"packed without padding, {'native kernel' if kernel_for(dtype, device) else 'torch SDPA'}"


def attend_runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """torch's fused attention, one call for each run of texts of equal length.

    All tensors, and the result, are (total, heads, head_dim).
    """
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    output[packing.total_tokens :] = 0
    for run in packing.runs:
        rows = slice(run.start, run.end)
        shape = (run.num_texts, run.length)
        q, k, v = (tensor[rows].unflatten(0, shape).transpose(1, 2) for tensor in (query, key, value))
        mask = local_mask(run.length, window, query.device)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        if q.device.type == "cpu":
            # torch's CPU kernel drops NaN of queries and keys in short texts: this puts it back.
            attended += (q * 0).sum(-1, keepdim=True) + (k * 0).sum((-1, -2), keepdim=True)
        output[rows].unflatten(0, shape).copy_(attended.transpose(1, 2))
    return output


def write_maps(
    query: torch.Tensor, key: torch.Tensor, map_taps: Sequence[MapTap], scaling: float, window: int | None
) -> None:
    """Computes the requested maps of one layer by torch, and writes each to its tap."""
    for tap in map_taps:
        rows = slice(tap.start, tap.end)
        mask = local_mask(tap.end - tap.start, window, query.device)
        for piece in tap.pieces(max(MAP_SCRATCH_BYTES, tap.target.nbytes // 4)):
            weights = attention_map(query[rows], key[rows], mask, scaling, piece.heads, piece.query_positions)
            piece.write(weights)


def attention_map(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    heads: Sequence[int],
    query_positions: Sequence[int] | None,
) -> torch.Tensor:
    """softmax(QKᵀ·scaling) of one text: (requested heads, requested query positions, T), float32.

    `query` and `key` are (T, heads, head_dim). `query_positions` None means all positions.
    """
    if query_positions is not None:
        rows = to_device(np.array(query_positions), query.device)
        query = query[rows]
        mask = mask[rows] if mask is not None else None
    if tuple(heads) != tuple(range(query.shape[1])):
        columns = to_device(np.array(heads), query.device)
        query, key = query[:, columns], key[:, columns]
    scores = query.float().transpose(0, 1) @ key.float().permute(1, 2, 0) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1)


def no_mask(*_: Any, **__: Any) -> None:
    """The mask function for transformers. Packed texts need no mask: each attends only to itself."""


def register() -> None:
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, no_mask)

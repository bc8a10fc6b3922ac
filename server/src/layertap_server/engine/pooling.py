"""Turns ranges of rows into vectors on the device: pools, truncates, normalizes and encodes them.

All arithmetic is float32. What a batch wants of it is in pooled_outputs.py.
Sources: pooling follows sentence-transformers' Pooling module; normalizing follows its Normalize module (L2,
epsilon 1e-12); the number of dimensions follows Matryoshka representation learning (truncate, then
normalize).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from layertap_server.engine.cpu.pooling import pool_natively
from layertap_server.engine.taps import TORCH_DTYPES
from layertap_server.engine.transfer import to_device
from layertap_server.enums import Encoding, Pooling, concatenated
from layertap_server.output_plans import EmbeddingPlan
from layertap_server.plan import Int64Array

# Limit of the temporary rows and vectors of one step, not counting the model's own hidden states. A single
# range of rows may exceed it.
SCRATCH_BYTES = 2**21
INT8_MAX = 127
NORM_EPSILON = 1e-12
# The reductions of each pooling over a range of rows. CLS and LAST_TOKEN are the mean of a single row.
REDUCTIONS = {
    Pooling.MEAN: ("mean",),
    Pooling.MAX: ("max",),
    Pooling.MEAN_MAX: ("mean", "max"),
    Pooling.CLS: ("mean",),
    Pooling.LAST_TOKEN: ("mean",),
}
# Rows that `weighted_mean` multiplies in one step. Each step copies them, and the memory estimate of a pass
# (memory.py) does not count larger copies.
WEIGHTED_ROWS = 512
Segment = tuple[int, int]
# (n, D) in the encoding's type, and (n,): for int8 the scales, for
# binary whether the vector contained NaN; else None.
Vectors = tuple[torch.Tensor, torch.Tensor | None]


class Pool(Protocol):
    """A function that pools, truncates and normalizes in one step."""

    def __call__(
        self,
        hidden: torch.Tensor,
        segments: list[Segment],
        reductions: tuple[str, ...],
        *,
        dims: int,
        epsilon: float | None,
    ) -> torch.Tensor | None:
        """Reduces each range of the (total, D) rows: (segments, dims).

        With several reductions ("mean", "max") their results are concatenated;
        the first `dims` are kept. With an epsilon they are then L2-normalized.
        Returns None where the function does not support these inputs.
        """


def row_index(rows: list[int], device: torch.device) -> torch.Tensor:
    return to_device(np.array(rows), device)


def pool_segments(
    hidden: torch.Tensor, segments: list[Segment], plan: EmbeddingPlan, pool: Pool = pool_natively
) -> torch.Tensor:
    """Pools each half-open, non-empty range of the (total, D) rows to one vector, truncated and normalized as
    the plan says: (segments, plan.dimensions)."""
    return pool_dims(hidden, segments, plan, pool, plan.dimensions, NORM_EPSILON if plan.normalize else None)


def pool_dims(
    hidden: torch.Tensor,
    segments: list[Segment],
    plan: EmbeddingPlan,
    pool: Pool,
    dims: int,
    epsilon: float | None = None,
    numbers: Int64Array | None = None,
) -> torch.Tensor:
    """Pools each range by the plan's pooling and keeps the first `dims`; with an epsilon, normalizes them.

    `numbers`, which a weighted mean needs, is the position of each row in its text, counted from 1.
    """
    if not isinstance(plan.pooling, Pooling) or plan.pooling not in REDUCTIONS:
        parts = [pool_whole(hidden, segments, one, pool, numbers) for one in concatenated(plan.pooling)]
        vectors = torch.cat(parts, dim=-1)[:, :dims]
        return vectors if epsilon is None else F.normalize(vectors, dim=-1, eps=epsilon)
    segments, reductions = reduced(plan.pooling, segments), REDUCTIONS[plan.pooling]
    pooled = pool(hidden, segments, reductions, dims=dims, epsilon=epsilon)
    if pooled is None:
        pooled = pool_in_steps(hidden, segments, reductions)[:, :dims]
        if epsilon is not None:
            pooled = F.normalize(pooled, dim=-1, eps=epsilon)
    return pooled


def reduced(pooling: Pooling, segments: list[Segment]) -> list[Segment]:
    """The ranges to reduce: for a pooling that takes one token, the range of that token."""
    if pooling is Pooling.CLS:
        return [(start, start + 1) for start, _ in segments]
    if pooling is Pooling.LAST_TOKEN:
        return [(end - 1, end) for _, end in segments]
    return segments


def pool_whole(
    hidden: torch.Tensor,
    segments: list[Segment],
    pooling: Pooling,
    pool: Pool,
    numbers: Int64Array | None,
) -> torch.Tensor:
    """Pools each range of the (total, D) rows by a single pooling, neither truncated nor normalized:
    (segments, D)."""
    if pooling is Pooling.WEIGHTED_MEAN:
        assert numbers is not None
        return weighted_mean(hidden, segments, pool, numbers)
    reductions = REDUCTIONS[Pooling.MEAN if pooling is Pooling.MEAN_SQRT_LEN else pooling]
    segments = reduced(pooling, segments)
    vectors = pool(hidden, segments, reductions, dims=hidden.shape[1], epsilon=None)
    vectors = pool_in_steps(hidden, segments, reductions) if vectors is None else vectors
    if pooling is Pooling.MEAN_SQRT_LEN:
        lengths = row_index([end - start for start, end in segments], hidden.device)
        vectors = vectors * lengths.sqrt()[:, None]
    return vectors


def weighted_mean(
    hidden: torch.Tensor, segments: list[Segment], pool: Pool, numbers: Int64Array
) -> torch.Tensor:
    """The mean of each range, in which a row has the weight `numbers[row]`: (segments, D)."""
    vectors = []
    for start, end in segments:
        total = float(numbers[start:end].sum())
        vector = torch.zeros(1, hidden.shape[1], device=hidden.device)
        for begin in range(start, end, WEIGHTED_ROWS):
            last = min(begin + WEIGHTED_ROWS, end)
            rows = hidden[begin:last] * to_device(numbers[begin:last], hidden.device)[:, None]
            size = last - begin
            vector += pool_whole(rows, [(0, size)], Pooling.MEAN, pool, None) * (size / total)
        vectors.append(vector)
    return torch.cat(vectors)


def pool_in_steps(hidden: torch.Tensor, segments: list[Segment], reductions: tuple[str, ...]) -> torch.Tensor:
    """The "mean" or the "max" of each range, or both concatenated, by torch: (segments, D or 2·D)."""
    lengths = [end - start for start, end in segments]
    if max(lengths) == 1:
        rows = hidden[row_index([start for start, _ in segments], hidden.device)]
        return rows.repeat(1, len(reductions))
    if hidden.device.type == "cpu":
        return torch.stack([_reduced(hidden[start:end], reductions) for start, end in segments])
    pooled = [_pool_neighbours(hidden, group, reductions) for group in _few_rows(segments, hidden.shape[1])]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled)


def _reduced(rows: torch.Tensor, reductions: tuple[str, ...]) -> torch.Tensor:
    """The same for the rows of one range: (D or 2·D,)."""
    vectors = [rows.mean(0) if reduction == "mean" else rows.amax(0) for reduction in reductions]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def _few_rows(segments: list[Segment], width: int) -> Iterator[list[Segment]]:
    """Groups consecutive ranges so that the rows of a group take at
    most `SCRATCH_BYTES`, or it is one range."""
    group: list[Segment] = []
    num_rows = 0
    for start, end in segments:
        if group and 4 * width * (num_rows + end - start) > SCRATCH_BYTES:
            yield group
            group, num_rows = [], 0
        group.append((start, end))
        num_rows += end - start
    yield group


def _pool_neighbours(
    hidden: torch.Tensor, segments: list[Segment], reductions: tuple[str, ...]
) -> torch.Tensor:
    contiguous = all(left[1] == right[0] for left, right in pairwise(segments))
    if contiguous:
        rows = hidden[segments[0][0] : segments[-1][1]]
    else:
        rows = torch.cat([hidden[start:end] for start, end in segments])
    index = row_index([end - start for start, end in segments], hidden.device)
    # unsafe: the lengths are known to be valid, and checking them would wait for the device.
    pooled = [torch.segment_reduce(rows, reduction, lengths=index, unsafe=True) for reduction in reductions]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)


def finished(vectors: torch.Tensor, plan: EmbeddingPlan) -> torch.Tensor:
    """Truncates and normalizes as the plan says; with `cuts_normalized`, normalizes before it truncates."""
    if not plan.cuts_normalized:
        vectors = vectors[:, : plan.dimensions]
    if plan.normalize:
        vectors = F.normalize(vectors, dim=-1, eps=NORM_EPSILON)
    return vectors[:, : plan.dimensions]


def encode_vectors(vectors: torch.Tensor, encoding: Encoding) -> Vectors:
    """Converts (n, D) float32 vectors to the element type of the reply: int8 has one scale for each vector,
    binary packs the sign bits into bytes.

    int8 has neither NaN nor infinity: all elements of a vector that contains either become 0, and its scale
    is not finite, so that 0 times the scale is NaN.
    """
    if encoding is Encoding.INT8:
        scales = vectors.abs().amax(dim=-1) / INT8_MAX
        quantized = (vectors / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
        quantized = quantized.nan_to_num(0.0).clamp(-INT8_MAX, INT8_MAX)
        return quantized.to(torch.int8), scales
    if encoding is Encoding.BINARY:
        bits = F.pad((vectors > 0).to(torch.uint8), (0, -vectors.shape[-1] % 8)).unflatten(-1, (-1, 8))
        places = torch.arange(7, -1, -1, dtype=torch.uint8, device=vectors.device)
        return (bits << places).sum(-1, dtype=torch.uint8), vectors.isnan().any(dim=-1)
    return vectors.to(TORCH_DTYPES[encoding.dtype]), None

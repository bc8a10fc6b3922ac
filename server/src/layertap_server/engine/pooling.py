"""Hidden states to vectors, on the device: pooled, cut, normalized and encoded.

Texts of a batch that want the same kind of vector are pooled together. All arithmetic is float32.
Sources: pooling as in sentence-transformers' Pooling module, and the modules before and behind it
as in projection.py; normalizing as in its Normalize module (L2, epsilon 1e-12); dimensions as in Matryoshka
representation learning (truncate, then normalize).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from layertap_server.engine.native_pooling import pool_natively
from layertap_server.engine.projection import Projection
from layertap_server.engine.taps import TORCH_DTYPES, Part, Taps
from layertap_server.engine.transfer import blocks_of, to_device
from layertap_server.plan import (
    DType,
    EmbeddingPlan,
    Encoding,
    LayerMerge,
    OutputField,
    Pooling,
    concatenated,
)

INT8_MAX = 127
NORM_EPSILON = 1e-12
# Of a pooling over ranges of rows; the first and the last token are the mean of a single row.
REDUCTIONS = {
    Pooling.MEAN: ("mean",),
    Pooling.MAX: ("max",),
    Pooling.MEAN_MAX: ("mean", "max"),
    Pooling.CLS: ("mean",),
    Pooling.LAST_TOKEN: ("mean",),
}
# Rows that are weighted at once: copies of more would be memory that nobody has counted.
WEIGHTED_ROWS = 512
Segment = tuple[int, int]
Vectors = tuple[torch.Tensor, torch.Tensor | None]  # (n, D) in the encoding's type, (n,) scales
PoolerOutputs = tuple[torch.Tensor, dict[int, int]]  # (n, H), and which of them is which text's
NO_OUTPUTS: PoolerOutputs = (torch.empty(0), {})


class Pool(Protocol):
    """Pools in one step."""

    def __call__(
        self,
        hidden: torch.Tensor,
        segments: list[Segment],
        reductions: tuple[str, ...],
        *,
        dims: int,
        epsilon: float | None,
    ) -> torch.Tensor | None:
        """The first `dims` of the "mean" or the "max" of each range of (total, D) rows, or of one beside the other,
        normalized with an epsilon: (segments, dims). None where it cannot."""


def row_index(rows: list[int], device: torch.device) -> torch.Tensor:
    return to_device(np.array(rows), device)


def merge_layers(hidden_states: list[torch.Tensor], merge: LayerMerge) -> torch.Tensor:
    """Several (total, H) hidden states to one (total, H or layers·H), float32."""
    if len(hidden_states) == 1:
        return hidden_states[0].float()
    if merge is LayerMerge.CONCAT:
        return torch.cat([hidden.float() for hidden in hidden_states], dim=-1)
    stacked = torch.stack([hidden.float() for hidden in hidden_states])
    return stacked.mean(0) if merge is LayerMerge.MEAN else stacked.sum(0)


def pool_segments(
    hidden: torch.Tensor,
    segments: list[Segment],
    plan: EmbeddingPlan,
    pool: Pool = pool_natively,
    projection: Projection | None = None,
    text_starts: list[int] | None = None,
) -> torch.Tensor:
    """(total, D) rows to one vector for each half-open, non-empty range of rows, projected, cut and normalized as
    the plan says: (segments, plan.dimensions). `text_starts` are the first rows of the segments' texts."""
    if isinstance(plan.pooling, Pooling) and plan.pooling in REDUCTIONS and not plan.is_projected:
        segments, reductions = reduced(plan.pooling, segments), REDUCTIONS[plan.pooling]
        if not plan.cuts_normalized:
            epsilon = NORM_EPSILON if plan.normalize else None
            vectors = pool(hidden, segments, reductions, dims=plan.dimensions, epsilon=epsilon)
            if vectors is not None:
                return vectors
        return finished(pool_in_steps(hidden, segments, reductions), plan)
    starts = text_starts or [start for start, _ in segments]
    parts = [pool_whole(hidden, segments, one, pool, starts) for one in concatenated(plan.pooling)]
    pooled = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return finished(projection.of_vectors(pooled) if projection and plan.is_projected else pooled, plan)


def reduced(pooling: Pooling, segments: list[Segment]) -> list[Segment]:
    """The ranges that are left to reduce: of a pooling that takes one token, that token."""
    if pooling is Pooling.CLS:
        return [(start, start + 1) for start, _ in segments]
    if pooling is Pooling.LAST_TOKEN:
        return [(end - 1, end) for _, end in segments]
    return segments


def pool_whole(
    hidden: torch.Tensor, segments: list[Segment], pooling: Pooling, pool: Pool, text_starts: list[int]
) -> torch.Tensor:
    """(total, D) rows to one vector for each range by a single pooling, neither cut nor normalized:
    (segments, D)."""
    if pooling is Pooling.WEIGHTED_MEAN:
        return weighted_mean(hidden, segments, pool, text_starts)
    reductions = REDUCTIONS[Pooling.MEAN if pooling is Pooling.MEAN_SQRT_LEN else pooling]
    segments = reduced(pooling, segments)
    vectors = pool(hidden, segments, reductions, dims=hidden.shape[1], epsilon=None)
    vectors = pool_in_steps(hidden, segments, reductions) if vectors is None else vectors
    if pooling is Pooling.MEAN_SQRT_LEN:
        lengths = row_index([end - start for start, end in segments], hidden.device)
        vectors = vectors * lengths.sqrt()[:, None]
    return vectors


def weighted_mean(
    hidden: torch.Tensor, segments: list[Segment], pool: Pool, text_starts: list[int]
) -> torch.Tensor:
    """The mean of each range, where a row's weight is its position in its text, from 1: (segments, D)."""
    vectors = []
    for (start, end), text_start in zip(segments, text_starts, strict=True):
        first, last = start - text_start + 1, end - text_start
        total = (first + last) * (end - start) / 2  # of the weights
        vector = torch.zeros(1, hidden.shape[1], device=hidden.device)
        for begin in range(start, end, WEIGHTED_ROWS):
            size = min(WEIGHTED_ROWS, end - begin)
            weights = torch.arange(size, device=hidden.device) + (begin - text_start + 1)
            rows = hidden[begin : begin + size] * weights[:, None]
            vector += pool_whole(rows, [(0, size)], Pooling.MEAN, pool, []) * (size / total)
        vectors.append(vector)
    return torch.cat(vectors)


def pool_in_steps(hidden: torch.Tensor, segments: list[Segment], reductions: tuple[str, ...]) -> torch.Tensor:
    """The "mean" or the "max" of each range, or one beside the other, by torch: (segments, D or 2·D)."""
    lengths = [end - start for start, end in segments]
    if max(lengths) == 1:
        rows = hidden[row_index([start for start, _ in segments], hidden.device)]
        return rows.repeat(1, len(reductions))
    contiguous = all(left[1] == right[0] for left, right in pairwise(segments))
    if contiguous:
        rows = hidden[segments[0][0] : segments[-1][1]]
    else:
        rows = torch.cat([hidden[start:end] for start, end in segments])
    index = row_index(lengths, hidden.device)
    # unsafe: the lengths are right, and checking them would wait for the device.
    pooled = [torch.segment_reduce(rows, reduction, lengths=index, unsafe=True) for reduction in reductions]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)


def finished(vectors: torch.Tensor, plan: EmbeddingPlan) -> torch.Tensor:
    """Cut and normalized, or the other way round."""
    if not plan.cuts_normalized:
        vectors = vectors[:, : plan.dimensions]
    if plan.normalize:
        vectors = F.normalize(vectors, dim=-1, eps=NORM_EPSILON)
    return vectors[:, : plan.dimensions]


def encode_vectors(vectors: torch.Tensor, encoding: Encoding) -> Vectors:
    """(n, D) float32 to the wire's element type; int8 with one scale a vector, sign bits in bytes."""
    if encoding is Encoding.INT8:
        scales = vectors.abs().amax(dim=-1) / INT8_MAX
        quantized = (vectors / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
        return quantized.clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales
    if encoding is Encoding.BINARY:
        bits = F.pad((vectors > 0).to(torch.uint8), (0, -vectors.shape[-1] % 8)).unflatten(-1, (-1, 8))
        places = torch.arange(7, -1, -1, dtype=torch.uint8, device=vectors.device)
        return (bits << places).sum(-1, dtype=torch.uint8), None
    return vectors.to(TORCH_DTYPES[encoding.dtype]), None


# A text, the number of its tensor, the plan of that, and the row where the text begins.
Member = tuple[int, int, EmbeddingPlan, int]


def fill_pooled(
    taps: Taps,
    pooler: Callable[[torch.Tensor], torch.Tensor] | None,
    pool: Pool = pool_natively,
    projection: Projection | None = None,
) -> dict[tuple[int, int], Part]:
    """Fills the pooler outputs and embeddings of `taps.parts`.

    Returns the scales of int8 vectors, by (text, number of the tensor among the text's).
    """
    scales: dict[tuple[int, int], Part] = {}
    pooled = _pooler_outputs(taps, pooler)
    _fill_pooler_outputs(taps, pooled)
    groups: dict[tuple[object, ...], list[Member]] = defaultdict(list)
    for text, (work, start, _) in enumerate(taps.packing.rows()):
        plans = work.plan.embeddings
        for number, plan in enumerate(plans, len(work.specs) - len(plans)):
            groups[plan.kind].append((text, number, plan, start))
    for members in groups.values():
        # As many as travel together: so a reply that is slow to be sent holds back no more of others' memory.
        for block in blocks_of(members, lambda member: taps.packing.works[member[0]].specs[member[1]].nbytes):
            encoded, group_scales = _pooled(taps, block, pooled, pool, projection)
            first = 0
            for text, number, plan, _ in block:
                last = first + len(plan.segments)
                taps.parts[text][number] = Part(encoded, first, last)
                if group_scales is not None:
                    scales[text, number] = Part(group_scales, first, last)
                first = last
    return scales


def _pooled(
    taps: Taps, members: list[Member], pooled: PoolerOutputs, pool: Pool, projection: Projection | None
) -> Vectors:
    """The vectors of texts that want the same kind, those of a text beside each other."""
    plan = members[0][2]
    if plan.pooling is Pooling.POOLER:
        outputs, numbers = pooled
        rows = row_index([numbers[text] for text, *_ in members], taps.device)
        vectors = finished(outputs[rows].float(), plan)
    else:
        hidden = merge_layers([taps.kept[layer] for layer in plan.layers], plan.layer_merge)
        segments = [
            (start + first, start + last) for _, _, of, start in members for first, last in of.segments
        ]
        text_starts = [start for _, _, of, start in members for _ in of.segments]
        if projection is not None and plan.is_projected and projection.token_modules:
            hidden = _project_tokens(taps, hidden, members, projection)
        vectors = pool_segments(hidden, segments, plan, pool, projection, text_starts)
    return encode_vectors(vectors, plan.encoding)


def _project_tokens(
    taps: Taps, hidden: torch.Tensor, members: list[Member], projection: Projection
) -> torch.Tensor:
    """(total, H) hidden states to (total, token_size), in the rows of these texts; the others are left undefined."""
    works = taps.packing.works
    ranges = [(start, start + works[text].num_tokens) for text, _, _, start in members]
    if not projection.by_row:
        ranges = joined(ranges)
    projected = hidden.new_empty(len(hidden), projection.token_size)
    for start, end in ranges:
        projected[start:end] = projection.of_tokens(hidden[start:end])
    return projected


def joined(ranges: list[Segment]) -> list[Segment]:
    """The same rows in as few ranges as they make; one text may want several kinds of vector."""
    merged: list[Segment] = []
    for start, end in sorted(set(ranges)):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _fill_pooler_outputs(taps: Taps, pooled: PoolerOutputs) -> None:
    outputs, numbers = pooled
    narrowed: dict[DType, torch.Tensor] = {}
    for text, work in enumerate(taps.packing.works):
        if work.plan.pooler_output:
            number, spec = next(
                (n, spec) for n, spec in enumerate(work.specs) if spec.field is OutputField.POOLER_OUTPUT
            )
            if spec.dtype not in narrowed:
                narrowed[spec.dtype] = outputs.to(TORCH_DTYPES[spec.dtype])
            row = numbers[text]
            taps.parts[text][number] = Part(narrowed[spec.dtype], row, row + 1)


def _pooler_outputs(taps: Taps, pooler: Callable[[torch.Tensor], torch.Tensor] | None) -> PoolerOutputs:
    """The model's own pooler on the first row of each text that wants it."""
    texts = [
        (text, start) for text, (work, start, _) in enumerate(taps.packing.rows()) if work.plan.needs_pooler
    ]
    if not texts:
        return NO_OUTPUTS
    numbers = {text: number for number, (text, _) in enumerate(texts)}
    if taps.pooler_outputs is not None:
        return taps.pooler_outputs[row_index([text for text, _ in texts], taps.device)], numbers
    if pooler is None:
        return NO_OUTPUTS
    first_rows = taps.kept[taps.last_index][row_index([start for _, start in texts], taps.device)]
    return pooler(first_rows[:, None]), numbers

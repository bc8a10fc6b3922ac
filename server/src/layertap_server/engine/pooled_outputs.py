"""Fills the pooler outputs and the embeddings of a batch, from the hidden states that its `Taps` kept.

Texts of a batch that want the same kind of vector are pooled together. The layers of an embedding are merged
here; ranges of rows are pooled in pooling.py, and the modules before and after that are in projection.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch

from layertap_server.engine.cpu.pooling import pool_natively
from layertap_server.engine.pooling import (
    REDUCTIONS,
    SCRATCH_BYTES,
    Pool,
    Segment,
    TextStarts,
    Vectors,
    encode_vectors,
    finished,
    pool_dims,
    pool_segments,
    row_index,
)
from layertap_server.engine.projection import Projection
from layertap_server.engine.taps import TORCH_DTYPES, Part, Taps
from layertap_server.engine.transfer import blocks_of
from layertap_server.plan import DType, EmbeddingPlan, LayerMerge, OutputField, Pooling, concatenated

PoolerOutputs = tuple[torch.Tensor, dict[int, int]]  # (n, H), and text → its row there
NO_OUTPUTS: PoolerOutputs = (torch.empty(0), {})
# (text, index of the tensor in its `Work.specs`, plan of that tensor, row where the text begins).
Member = tuple[int, int, EmbeddingPlan, int]


def fill_pooled(
    taps: Taps,
    pooler: Callable[[torch.Tensor], torch.Tensor] | None,
    pool: Pool = pool_natively,
    projection: Projection | None = None,
) -> dict[tuple[int, int], Part]:
    """Fills the pooler outputs and embeddings of `taps.parts`.

    Returns the second value of `encode_vectors` for int8 and binary
    vectors, by (text, index of the tensor in its `Work.specs`).
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
        # Divided into the blocks that are copied to the host together, so that a reply that is sent slowly
        # keeps no more than one such block of other replies' memory alive.
        for block in blocks_of(members, lambda member: len(member[2].segments) * member[2].dimensions * 4):
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
    """The encoded vectors of texts that want the same kind of vector, in the order of `members`."""
    plan = members[0][2]
    if plan.pooling is Pooling.POOLER:
        outputs, numbers = pooled
        rows = row_index([numbers[text] for text, *_ in members], taps.device)
        return encode_vectors(finished(outputs[rows].float(), plan), plan.encoding)
    asked = [(start + first, start + last) for _, _, of, start in members for first, last in of.segments]
    starts = {
        (start + first, start + last): start for _, _, of, start in members for first, last in of.segments
    }
    segments = list(starts)  # a range that is asked for several times is pooled once
    rows = None
    if projection is not None and plan.is_projected and projection.token_modules:
        rows = _project_tokens(taps, _merged_rows(taps, plan), members, projection)

    def vectors_of(some: list[Segment]) -> torch.Tensor:
        return _vectors(taps, some, plan, pool, starts, projection if plan.is_projected else None, rows)

    width = rows.shape[1] if rows is not None else len(plan.layers) * taps.hidden_size
    encoded, scales = _encoded(segments, plan, width * len(concatenated(plan.pooling)), vectors_of)
    if len(segments) == len(asked):
        return encoded, scales
    place_of = {segment: number for number, segment in enumerate(segments)}
    index = row_index([place_of[segment] for segment in asked], taps.device)
    return encoded[index], None if scales is None else scales[index]


def _encoded(
    segments: list[Segment],
    plan: EmbeddingPlan,
    width: int,
    vectors_of: Callable[[list[Segment]], torch.Tensor],
) -> Vectors:
    """Pools and encodes ranges of rows, in steps whose float32
    vectors fit in `SCRATCH_BYTES`, or are one vector."""
    num_ranges = max(SCRATCH_BYTES // (4 * max(plan.dimensions, width)), 1)
    if len(segments) <= num_ranges:
        return encode_vectors(vectors_of(segments), plan.encoding)
    encoded, scales = None, None
    for first in range(0, len(segments), num_ranges):
        part = segments[first : first + num_ranges]
        some, their_scales = encode_vectors(vectors_of(part), plan.encoding)
        if encoded is None:
            encoded = some.new_empty(len(segments), some.shape[1])
            scales = None if their_scales is None else their_scales.new_empty(len(segments))
        encoded[first : first + len(part)] = some
        if scales is not None:
            scales[first : first + len(part)] = their_scales
    assert encoded is not None
    return encoded, scales


def _vectors(
    taps: Taps,
    segments: list[Segment],
    plan: EmbeddingPlan,
    pool: Pool,
    starts: TextStarts,
    projection: Projection | None,
    projected_rows: torch.Tensor | None,
) -> torch.Tensor:
    """The vector of each range of rows, projected, truncated and normalized: (segments, plan.dimensions)."""
    is_one = len(plan.layers) == 1 and plan.layer_counts is None and plan.layer_places is None
    if is_one and projection is None and not plan.cuts_normalized and plan.pooling in REDUCTIONS:
        return pool_segments(taps.float_rows(plan.layers[0]), segments, plan, pool)
    if projected_rows is not None:
        dims = projected_rows.shape[1] * len(concatenated(plan.pooling))
        pooled = pool_dims(projected_rows, segments, plan, pool, dims, starts=starts)
    else:
        pooled = _pool_layers(taps, segments, plan, pool, starts)
    return finished(pooled if projection is None else projection.of_vectors(pooled), plan)


def _merged_rows(taps: Taps, plan: EmbeddingPlan) -> torch.Tensor:
    """The hidden state that the plan pools over, or the mean or sum of several hidden states: (total, H)."""
    if len(plan.layers) == 1 and plan.layer_counts is None:
        return taps.float_rows(plan.layers[0])
    rows = torch.zeros_like(taps.float_rows(plan.layers[0]))
    for layer, weight in zip(plan.layers, plan.layer_weights, strict=True):
        rows.add_(taps.float_rows(layer), alpha=weight)
    return rows


def _pool_layers(
    taps: Taps, segments: list[Segment], plan: EmbeddingPlan, pool: Pool, starts: TextStarts
) -> torch.Tensor:
    """The vector of each range of rows over all layers of the plan, neither truncated nor normalized."""
    size = taps.hidden_size
    dims = size * len(concatenated(plan.pooling))
    if plan.merges_rows:
        return _pool_merged(taps, segments, plan, pool, dims, starts)
    if plan.layer_merge is not LayerMerge.CONCAT:
        merged = torch.zeros(len(segments), dims, device=taps.device)
        for layer, weight in zip(plan.layers, plan.layer_weights, strict=True):
            merged.add_(
                pool_dims(taps.float_rows(layer), segments, plan, pool, dims, starts=starts), alpha=weight
            )
        return merged
    # With several poolings, the vectors of all layers for the first
    # pooling come before those for the next one.
    by_layer = [
        pool_dims(taps.float_rows(layer), segments, plan, pool, dims, starts=starts) for layer in plan.layers
    ]
    places = range(len(plan.layers)) if plan.layer_places is None else plan.layer_places
    if len(by_layer) == len(places):
        joined = torch.cat(
            [vector[:, at : at + size] for at in range(0, dims, size) for vector in by_layer], -1
        )
    else:
        table = torch.stack(by_layer, 1)  # (segments, layers, dims)
        index = row_index(list(places), taps.device)
        joined = torch.cat([table[:, index, at : at + size].flatten(1) for at in range(0, dims, size)], -1)
    return joined


def _pool_merged(
    taps: Taps, segments: list[Segment], plan: EmbeddingPlan, pool: Pool, dims: int, starts: TextStarts
) -> torch.Tensor:
    """Merges the layers row by row, and then pools: (segments, dims).

    Adjacent and overlapping ranges are merged in one step, of up to `SCRATCH_BYTES` of rows, or of one text.
    """
    pooled = torch.empty(len(segments), dims, device=taps.device)
    for numbers in _neighbours(segments, SCRATCH_BYTES // (4 * taps.hidden_size)):
        begin = min(segments[number][0] for number in numbers)
        end = max(segments[number][1] for number in numbers)
        rows = torch.zeros(end - begin, taps.hidden_size, device=taps.device)
        for layer, weight in zip(plan.layers, plan.layer_weights, strict=True):
            rows.add_(taps.float_rows(layer)[begin:end], alpha=weight)
        ranges = [(first - begin, last - begin) for first, last in (segments[number] for number in numbers)]
        begun = {
            here: starts[there] - begin
            for here, there in zip(ranges, map(segments.__getitem__, numbers), strict=True)
        }
        pooled[row_index(numbers, taps.device)] = pool_dims(rows, ranges, plan, pool, dims, starts=begun)
    return pooled


def _neighbours(segments: list[Segment], max_rows: int) -> Iterator[list[int]]:
    """Groups the indices of ranges so that the rows of a group have no gaps. An adjacent range joins a group
    while the group spans at most `max_rows`; a range that overlaps it always joins."""
    group: list[int] = []
    begin = end = 0
    for number in sorted(range(len(segments)), key=segments.__getitem__):
        first, last = segments[number]
        if group and (first > end or (first == end and last - begin > max_rows)):
            yield group
            group = []
        if not group:
            begin, end = first, last
        group.append(number)
        end = max(end, last)
    yield group


def _project_tokens(
    taps: Taps, hidden: torch.Tensor, members: list[Member], projection: Projection
) -> torch.Tensor:
    """Projects the rows of these texts: (total, H) hidden states to (total, token_size). Rows of other texts
    are left uninitialized."""
    works = taps.packing.works
    ranges = [(start, start + works[text].num_tokens) for text, _, _, start in members]
    if not projection.by_row:
        ranges = joined(ranges)
    projected = hidden.new_empty(len(hidden), projection.token_size)
    for start, end in ranges:
        projected[start:end] = projection.of_tokens(hidden[start:end])
    return projected


def joined(ranges: list[Segment]) -> list[Segment]:
    """The same rows as the fewest ranges: adjacent ranges are joined, and duplicates are dropped. A text that
    wants several vectors occurs several times in `ranges`."""
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
    """The outputs of the model's own pooler for the texts that want
    them; the pooler reads a text's first row."""
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

"""Fills the pooler outputs and the embeddings of a batch, from the hidden states that its `Taps` kept.

Texts of a batch that want the same kind of vector are pooled together. The layers of an embedding are merged
here; ranges of rows are pooled in pooling.py, and the modules before and after that are in projection.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import numpy as np
import torch

from layertap_server.engine.cpu.pooling import pool_natively
from layertap_server.engine.pooling import (
    REDUCTIONS,
    SCRATCH_BYTES,
    Pool,
    Segment,
    Vectors,
    encode_vectors,
    finished,
    pool_dims,
    pool_segments,
    row_index,
)
from layertap_server.engine.projection import Projection
from layertap_server.engine.taps import TORCH_DTYPES, Part, Taps
from layertap_server.engine.transfer import blocks_of, to_device
from layertap_server.enums import DType, Encoding, LayerMerge, OutputField, Pooling, concatenated
from layertap_server.output_plans import EmbeddingPlan
from layertap_server.plan import Int64Array

PoolerOutputs = tuple[torch.Tensor, dict[int, int]]  # (n, H), and text → its row there
NO_OUTPUTS: PoolerOutputs = (torch.empty(0), {})
# (text, index of the tensor in its `Work.specs`, plan of that tensor, row where the text begins).
Member = tuple[int, int, EmbeddingPlan, int]


class HiddenRows:
    """The rows that vectors are computed from: those of the batch, or of one text without some of its tokens."""

    def __init__(self, taps: Taps, rows: Int64Array | None = None) -> None:
        self._taps = taps
        self._rows = rows
        self._index = None if rows is None else to_device(rows, taps.device)
        self.device = taps.device
        self.size = taps.hidden_size

    def of(self, layer: int) -> torch.Tensor:
        """(rows, H) of a kept hidden state, float32."""
        rows = self._taps.float_rows(layer)
        return rows if self._index is None else rows[self._index]

    @cached_property
    def numbers(self) -> Int64Array:
        """(rows,) the position of each row in its text, counted from 1."""
        packing = self._taps.packing
        starts = packing.of_each_row(packing.cu_seqlens_array[:-1])
        numbers = np.arange(1, packing.total_tokens + 1) - starts
        return numbers if self._rows is None else numbers[self._rows]

    def numbers_for(self, plan: EmbeddingPlan) -> Int64Array | None:
        """The `numbers`, if the plan's pooling needs them."""
        return self.numbers if Pooling.WEIGHTED_MEAN in concatenated(plan.pooling) else None


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
        for number, plan in enumerate(work.plan.embeddings, work.plan.embeddings_at):
            # Texts without some of their tokens are pooled one by one.
            groups[plan.kind if plan.kept is None else (plan.kind, text, plan.kept)].append(
                (text, number, plan, start)
            )
    for members in groups.values():
        # Divided into the blocks that are copied to the host together, so that a reply that is sent slowly
        # keeps no more than one such block of other replies' memory alive.
        for block in blocks_of(members, lambda member: member[2].num_vectors * member[2].dimensions * 4):
            encoded, group_scales = _pooled(taps, block, pooled, pool, projection)
            first = 0
            for text, number, plan, _ in block:
                last = first + plan.num_vectors
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
    if plan.kept is None:
        hidden, begins = HiddenRows(taps), [start for *_, start in members]
    else:
        hidden, begins = HiddenRows(taps, np.array(plan.kept) + members[0][3]), [0] * len(members)
    asked = [
        (begin + first, begin + last)
        for begin, (_, _, of, _) in zip(begins, members, strict=True)
        for first, last in of.segments
    ]
    if plan.pooling is Pooling.NONE:
        return _token_vectors(hidden, asked, plan, projection)
    segments = list(dict.fromkeys(asked))  # a range that is asked for several times is pooled once
    rows = None
    if projection is not None and plan.projects_tokens:
        texts = [
            (begin, begin + (taps.packing.works[text].num_tokens if of.kept is None else len(of.kept)))
            for begin, (text, _, of, _) in zip(begins, members, strict=True)
        ]
        rows = _project_tokens(_merged_rows(hidden, plan), texts, projection)

    def vectors_of(some: list[Segment]) -> torch.Tensor:
        return _vectors(hidden, some, plan, pool, projection if plan.is_projected else None, rows)

    width = rows.shape[1] if rows is not None else len(plan.layers) * hidden.size
    num_ranges = max(SCRATCH_BYTES // (4 * max(plan.dimensions, width * len(concatenated(plan.pooling)))), 1)
    steps = (
        vectors_of(segments[first : first + num_ranges]) for first in range(0, len(segments), num_ranges)
    )
    encoded, scales = _encoded(steps, len(segments), plan.encoding)
    if len(segments) == len(asked):
        return encoded, scales
    place_of = {segment: number for number, segment in enumerate(segments)}
    index = row_index([place_of[segment] for segment in asked], taps.device)
    return encoded[index], None if scales is None else scales[index]


def _encoded(steps: Iterable[torch.Tensor], num_vectors: int, encoding: Encoding) -> Vectors:
    """Encodes `num_vectors` vectors, which are computed in steps, so that only those of one step are in
    memory in float32."""
    encoded, scales, first = None, None, 0
    for vectors in steps:
        some, their_scales = encode_vectors(vectors, encoding)
        if len(some) == num_vectors:
            return some, their_scales
        if encoded is None:
            encoded = some.new_empty(num_vectors, some.shape[1])
            scales = None if their_scales is None else their_scales.new_empty(num_vectors)
        encoded[first : first + len(some)] = some
        if scales is not None:
            scales[first : first + len(some)] = their_scales
        first += len(some)
    assert encoded is not None
    return encoded, scales


def _token_vectors(
    hidden: HiddenRows, ranges: list[Segment], plan: EmbeddingPlan, projection: Projection | None
) -> Vectors:
    """The encoded vector of each token in the ranges, in their order."""

    def vectors_of(pieces: list[Segment]) -> torch.Tensor:
        by_layer = [_rows_in(hidden.of(layer), pieces) for layer in plan.layers]
        if plan.layer_merge is LayerMerge.CONCAT:
            places = range(len(by_layer)) if plan.layer_places is None else plan.layer_places
            vectors = torch.cat([by_layer[place] for place in places], -1)
        else:
            vectors = torch.zeros_like(by_layer[0])
            for rows, weight in zip(by_layer, plan.layer_weights, strict=True):
                vectors.add_(rows, alpha=weight)
        if projection is not None and plan.projects_tokens:
            vectors = projection.of_tokens(vectors)
        if projection is not None and plan.is_projected:
            vectors = projection.of_vectors(vectors)
        return finished(vectors, plan)

    num_layers = len(plan.layers if plan.layer_places is None else plan.layer_places)
    max_rows = max(SCRATCH_BYTES // (4 * max(plan.dimensions, num_layers * hidden.size)), 1)
    num_vectors = sum(last - first for first, last in ranges)
    return _encoded(map(vectors_of, _pieces(ranges, max_rows)), num_vectors, plan.encoding)


def _rows_in(rows: torch.Tensor, ranges: list[Segment]) -> torch.Tensor:
    parts = [rows[first:last] for first, last in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pieces(ranges: list[Segment], max_rows: int) -> Iterator[list[Segment]]:
    """The ranges in groups of at most `max_rows` rows; a longer range is divided, and adjacent ones are
    joined."""
    group: list[Segment] = []
    room = max_rows
    for first, last in ranges:
        while first < last:
            end = min(last, first + room)
            if group and group[-1][1] == first:
                group[-1] = (group[-1][0], end)
            else:
                group.append((first, end))
            room -= end - first
            first = end
            if not room:
                yield group
                group, room = [], max_rows
    if group:
        yield group


def _vectors(
    hidden: HiddenRows,
    segments: list[Segment],
    plan: EmbeddingPlan,
    pool: Pool,
    projection: Projection | None,
    projected_rows: torch.Tensor | None,
) -> torch.Tensor:
    """The vector of each range of rows, projected, truncated and normalized: (segments, plan.dimensions)."""
    is_one = len(plan.layers) == 1 and plan.layer_counts is None and plan.layer_places is None
    is_plain = projection is None and projected_rows is None and not plan.cuts_normalized
    if is_one and is_plain and plan.pooling in REDUCTIONS:
        return pool_segments(hidden.of(plan.layers[0]), segments, plan, pool)
    if projected_rows is not None:
        dims = projected_rows.shape[1] * len(concatenated(plan.pooling))
        pooled = pool_dims(projected_rows, segments, plan, pool, dims, numbers=hidden.numbers_for(plan))
    else:
        pooled = _pool_layers(hidden, segments, plan, pool)
    return finished(pooled if projection is None else projection.of_vectors(pooled), plan)


def _merged_rows(hidden: HiddenRows, plan: EmbeddingPlan) -> torch.Tensor:
    """The hidden state that the plan pools over, or the mean or sum of several hidden states: (rows, H)."""
    if len(plan.layers) == 1 and plan.layer_counts is None:
        return hidden.of(plan.layers[0])
    rows = torch.zeros_like(hidden.of(plan.layers[0]))
    for layer, weight in zip(plan.layers, plan.layer_weights, strict=True):
        rows.add_(hidden.of(layer), alpha=weight)
    return rows


def _pool_layers(
    hidden: HiddenRows, segments: list[Segment], plan: EmbeddingPlan, pool: Pool
) -> torch.Tensor:
    """The vector of each range of rows over all layers of the plan, neither truncated nor normalized."""
    size, numbers = hidden.size, hidden.numbers_for(plan)
    dims = size * len(concatenated(plan.pooling))
    if plan.merges_rows:
        return _pool_merged(hidden, segments, plan, pool, dims)
    if plan.layer_merge is not LayerMerge.CONCAT:
        merged = torch.zeros(len(segments), dims, device=hidden.device)
        for layer, weight in zip(plan.layers, plan.layer_weights, strict=True):
            merged.add_(
                pool_dims(hidden.of(layer), segments, plan, pool, dims, numbers=numbers), alpha=weight
            )
        return merged
    # With several poolings, the vectors of all layers for the first
    # pooling come before those for the next one.
    by_layer = [
        pool_dims(hidden.of(layer), segments, plan, pool, dims, numbers=numbers) for layer in plan.layers
    ]
    places = range(len(plan.layers)) if plan.layer_places is None else plan.layer_places
    if len(by_layer) == len(places):
        joined = torch.cat(
            [vector[:, at : at + size] for at in range(0, dims, size) for vector in by_layer], -1
        )
    else:
        table = torch.stack(by_layer, 1)  # (segments, layers, dims)
        index = row_index(list(places), hidden.device)
        joined = torch.cat([table[:, index, at : at + size].flatten(1) for at in range(0, dims, size)], -1)
    return joined


def _pool_merged(
    hidden: HiddenRows, segments: list[Segment], plan: EmbeddingPlan, pool: Pool, dims: int
) -> torch.Tensor:
    """Merges the layers row by row, and then pools: (segments, dims).

    Adjacent and overlapping ranges are merged in one step, of up to `SCRATCH_BYTES` of rows, or of one text.
    """
    numbers = hidden.numbers_for(plan)
    pooled = torch.empty(len(segments), dims, device=hidden.device)
    for group in _neighbours(segments, SCRATCH_BYTES // (4 * hidden.size)):
        begin = min(segments[number][0] for number in group)
        end = max(segments[number][1] for number in group)
        rows = torch.zeros(end - begin, hidden.size, device=hidden.device)
        for layer, weight in zip(plan.layers, plan.layer_weights, strict=True):
            rows.add_(hidden.of(layer)[begin:end], alpha=weight)
        ranges = [(first - begin, last - begin) for first, last in (segments[number] for number in group)]
        pooled[row_index(group, hidden.device)] = pool_dims(
            rows, ranges, plan, pool, dims, numbers=None if numbers is None else numbers[begin:end]
        )
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


def _project_tokens(hidden: torch.Tensor, texts: list[Segment], projection: Projection) -> torch.Tensor:
    """Projects the rows of these texts: (rows, H) hidden states to (rows, token_size). Rows of other texts
    are left uninitialized."""
    if not projection.by_row:
        texts = joined(texts)
    projected = hidden.new_empty(len(hidden), projection.token_size)
    for start, end in texts:
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

"""Sparse vectors over the vocabulary (SPLADE), from the scores of a masked-language head.

Source: sentence-transformers' `SpladePooling`. The scores of a batch, (tokens, V), are never in memory at
once: they are computed in steps, and each step is reduced to one vector for each text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layertap_server.engine.heads import Head, highest, rows_at
from layertap_server.engine.taps import TORCH_DTYPES, Part, Taps
from layertap_server.engine.transfer import Array
from layertap_server.enums import DType, OutputField
from layertap_server.output_plans import SparsePlan

# (number of the text among those of a group, rows of the batch)
Piece = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class SparsePooling:
    """How the scores of a text's tokens become its vector."""

    # Whether the tokens' weights are added; else the highest one counts.
    sums: bool = False
    # How often log(1 + x) is applied to the positive part of a score.
    num_logs: int = 1


def fill_sparse(taps: Taps, head: Head | None, pooling: SparsePooling | None) -> None:
    """Fills the sparse vectors in `taps.parts`: of the weights, either the highest ones with their ids, or all
    of them without ids. `compact` turns either into the entries of the reply, on the host."""
    if head is None or pooling is None:
        return
    groups: dict[tuple[SparsePlan, DType, int], list[int]] = defaultdict(list)
    for text, work in enumerate(taps.packing.works):
        if work.plan.sparse is not None:
            groups[work.plan.sparse, work.plan.wire_dtype, text if head.by_input else -1].append(text)
    for (plan, dtype, _), texts in groups.items():
        pooled = pooled_scores(taps, head, pooling, texts)
        ids: torch.Tensor | None = None
        if plan.max_entries < head.num_labels or plan.by_weight:
            ids = highest(pooled, plan.max_entries)
            pooled, ids = pooled.gather(1, ids), ids.to(torch.int32)
        weights = pooled.to(TORCH_DTYPES[dtype])
        for row, text in enumerate(texts):
            for number, spec in enumerate(taps.packing.works[text].specs):
                if spec.field is OutputField.SPARSE_WEIGHTS:
                    taps.parts[text][number] = Part(weights, row, row + 1)
                elif spec.field is OutputField.SPARSE_IDS and ids is not None:
                    taps.parts[text][number] = Part(ids, row, row + 1)


def pooled_scores(taps: Taps, head: Head, pooling: SparsePooling, texts: Sequence[int]) -> torch.Tensor:
    """(texts, V) float32: the weight of each word of the vocabulary in each text."""
    hidden = taps.float_rows(taps.last_index)
    start = 0.0 if pooling.sums else -torch.inf
    pooled = torch.full((len(texts), head.num_labels), start, device=taps.device)
    cu_seqlens = taps.packing.cu_seqlens
    ranges = [(cu_seqlens[text], cu_seqlens[text + 1]) for text in texts]
    for pieces in steps_of(ranges, head.num_step_rows(hidden.shape[1])):
        rows = np.concatenate([np.arange(first, last) for _, first, last in pieces])
        scores = head.of_rows(rows_at(hidden, rows))
        if pooling.sums:
            to_weights(scores, pooling)
        begin = 0
        for number, first, last in pieces:
            some = scores[begin : begin + last - first]
            begin += last - first
            if pooling.sums:
                pooled[number] += some.sum(0)
            else:
                torch.maximum(pooled[number], some.amax(0), out=pooled[number])
    # The weights grow with the scores, so the highest score gives the highest weight.
    return pooled if pooling.sums else to_weights(pooled, pooling)


def steps_of(ranges: Sequence[tuple[int, int]], max_rows: int) -> Iterator[list[Piece]]:
    """The rows of the ranges in groups of at most `max_rows`, each with the number of its range."""
    pieces: list[Piece] = []
    left = max_rows
    for number, (first, last) in enumerate(ranges):
        while first < last:
            end = min(first + left, last)
            pieces.append((number, first, end))
            left -= end - first
            first = end
            if not left:
                yield pieces
                pieces, left = [], max_rows
    if pieces:
        yield pieces


def to_weights(scores: torch.Tensor, pooling: SparsePooling) -> torch.Tensor:
    """log(1 + max(score, 0)), in place."""
    scores.relu_()
    for _ in range(pooling.num_logs):
        scores.log1p_()
    return scores


def compact(ids: Array | None, weights: Array, plan: SparsePlan) -> tuple[Array, Array]:
    """The ids and weights of the entries above zero of one vector, in memory of their own; NaN counts as such.

    The arrays have one row. Without ids, the weights are those of the whole vocabulary. bfloat16 weights are
    given by their bits.
    """
    row = weights[0]
    is_entry = (row & 0x7FFF) != 0 if row.dtype == np.uint16 else row != 0
    if ids is None:
        entries = np.flatnonzero(is_entry)
        return entries.astype(np.int32), row[entries]
    found, row = ids[0][is_entry], row[is_entry]
    if not plan.by_weight:
        order = np.argsort(found)
        found, row = found[order], row[order]
    return found, row

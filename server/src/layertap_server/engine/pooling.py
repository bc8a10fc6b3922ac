"""Hidden states to vectors, on the device: pooled, cut, normalized and encoded.

Texts of a batch that want the same kind of vector are pooled together. All arithmetic is float32.
Sources: mean, max, CLS and last-token pooling as in sentence-transformers' Pooling module;
normalizing as in its Normalize module (L2, epsilon 1e-12); dimensions as in Matryoshka
representation learning (truncate, then normalize).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from layertap_server.engine.taps import TORCH_DTYPES, Taps
from layertap_server.engine.transfer import to_device
from layertap_server.plan import EmbeddingPlan, Encoding, LayerMerge, OutputField, Pooling

INT8_MAX = 127
Vectors = tuple[torch.Tensor, torch.Tensor | None]  # (n, D) in the encoding's type, (n,) scales


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


def pool_segments(hidden: torch.Tensor, segments: list[tuple[int, int]], pooling: Pooling) -> torch.Tensor:
    """(total, D) rows to one vector for each half-open, non-empty range of rows: (segments, D)."""
    if pooling is Pooling.CLS:
        return hidden[row_index([start for start, _ in segments], hidden.device)]
    if pooling is Pooling.LAST_TOKEN:
        return hidden[row_index([end - 1 for _, end in segments], hidden.device)]
    lengths = row_index([end - start for start, end in segments], hidden.device)
    contiguous = all(left[1] == right[0] for left, right in pairwise(segments))
    if contiguous:
        rows = hidden[segments[0][0] : segments[-1][1]]
    else:
        rows = torch.cat([hidden[start:end] for start, end in segments])
    reductions = {Pooling.MEAN: ("mean",), Pooling.MAX: ("max",), Pooling.MEAN_MAX: ("mean", "max")}[pooling]
    # unsafe: the lengths are right, and checking them would wait for the device.
    pooled = [torch.segment_reduce(rows, reduction, lengths=lengths, unsafe=True) for reduction in reductions]
    return torch.cat(pooled, dim=-1)


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


def fill_pooled(
    taps: Taps, pooler: Callable[[torch.Tensor], torch.Tensor] | None
) -> dict[tuple[int, int], torch.Tensor]:
    """Fills the pooler outputs and embeddings of `taps.buffers`.

    Returns the scales of int8 vectors, by (text, number of the tensor among the text's).
    """
    scales: dict[tuple[int, int], torch.Tensor] = {}
    pooler_outputs = _pooler_outputs(taps, pooler)
    groups: dict[tuple[object, ...], list[tuple[int, int, EmbeddingPlan, list[tuple[int, int]]]]] = (
        defaultdict(list)
    )
    for text, (work, start, _) in enumerate(taps.packing.rows()):
        first_embedding = len(work.specs) - len(work.plan.embeddings)
        for number, spec in enumerate(work.specs):
            if spec.field is OutputField.POOLER_OUTPUT:
                taps.buffers[text][number] = pooler_outputs[text].to(TORCH_DTYPES[spec.dtype])
        for position, plan in enumerate(work.plan.embeddings):
            rows = [(start + first, start + last) for first, last in plan.segments]
            key = (
                plan.pooling,
                plan.layers,
                plan.layer_merge,
                plan.normalize,
                plan.dimensions,
                plan.encoding,
            )
            groups[key].append((text, first_embedding + position, plan, rows))

    for members in groups.values():
        plan = members[0][2]
        if plan.pooling is Pooling.POOLER:
            vectors = torch.stack([pooler_outputs[text] for text, *_ in members]).float()
        else:
            hidden = merge_layers([taps.kept[layer] for layer in plan.layers], plan.layer_merge)
            vectors = pool_segments(
                hidden, [segment for *_, rows in members for segment in rows], plan.pooling
            )
        vectors = vectors[:, : plan.dimensions]
        if plan.normalize:
            vectors = F.normalize(vectors, dim=-1)
        encoded, group_scales = encode_vectors(vectors, plan.encoding)
        first = 0
        for text, number, member, rows in members:
            last = first + len(rows)
            taps.buffers[text][number] = encoded[first:last] if member.has_spans else encoded[first]
            if group_scales is not None:
                scales[text, number] = group_scales[first:last]
            first = last
    return scales


def _pooler_outputs(
    taps: Taps, pooler: Callable[[torch.Tensor], torch.Tensor] | None
) -> dict[int, torch.Tensor]:
    """The model's own pooler on the first row of each text that wants it, (H) by text."""
    texts = [
        (text, start)
        for text, (work, start, _) in enumerate(taps.packing.rows())
        if work.plan.pooler_output or any(e.pooling is Pooling.POOLER for e in work.plan.embeddings)
    ]
    if not texts or pooler is None:
        return {}
    first_rows = taps.kept[taps.num_layers][row_index([start for _, start in texts], taps.device)]
    return dict(zip((text for text, _ in texts), pooler(first_rows[:, None]), strict=True))

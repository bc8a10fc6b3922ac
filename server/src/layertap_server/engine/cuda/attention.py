"""Attention over packed texts on CUDA: one kernel for texts of any lengths, whose work follows from the rows.

Kernels for texts of various lengths take each text for itself, in tiles of some 128 rows: of natural texts,
which have some 30 tokens, three quarters of the work is on rows that are not there. Here a program takes the
next rows of the batch, whichever texts they are of, and goes through the keys of those texts; each row has
its own bounds. So the number of programs depends on nothing but the number of rows, and a recorded pass
(cuda_graphs.py) serves any texts that fit into it.

Method: softmax in one pass over the keys, as in FlashAttention (Dao et al., 2022). In Triton, which torch
brings along for CUDA on Linux; a kernel is compiled at its first call, at load, and kept on disk.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl

from layertap_server.engine.model import LoadedModel
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import Taps

# Queries of one program, and keys that it looks at in one step.
ROWS, KEYS = 64, 64


@triton.jit
def weighted_sums(  # type: ignore[no-untyped-def]
    queries,
    key,
    value,
    first,
    last,
    scaling,
    key_row,
    value_row,
    dims,
    is_dim,
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    PADDED_DIM: tl.constexpr,  # noqa: N803
    GUARDED: tl.constexpr,  # noqa: N803
):
    """Of each row, the sum of the values of its own keys [first, last), weighted, and that of the weights.

    A weight of 0 times NaN is NaN: unless it is guarded, values of one text that are not finite reach the rows
    of others in the same program. Guarded, a row that sees such a value becomes NaN, and no other.
    """
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    end = tl.max(last)
    for begin in range(tl.min(first), end, KEYS):
        others = begin + tl.arange(0, KEYS)
        mask = (others < end)[:, None] & is_dim[None, :]
        key_place = others.to(tl.int64)[:, None] * key_row + dims[None, :]
        scores = tl.dot(queries, tl.trans(tl.load(key + key_place, mask, 0.0))) * scaling
        value_place = others.to(tl.int64)[:, None] * value_row + dims[None, :]
        values = tl.load(value + value_place, mask, 0.0)
        if GUARDED:
            nothing = values.to(tl.float32) * 0.0  # NaN where a value is not finite
            scores += tl.sum(nothing, 1)[None, :]
            values = tl.where(nothing == 0.0, values, 0.0)
        is_seen = (others[None, :] >= first[:, None]) & (others[None, :] < last[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # Of rows that have seen no key yet, any finite one: their scores are all -inf.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(weights, 1)
        result = result * fade[:, None] + tl.dot(weights.to(values.dtype), values)
        peak = new_peak
    return result, total


@triton.jit(do_not_specialize=["num_rows", "window"])
def attention_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    starts,
    ends,
    output,
    scaling,
    window,
    num_rows,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    HEADS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    PADDED_DIM: tl.constexpr,  # noqa: N803
    HAS_WINDOW: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
):
    # The heads of the same rows run beside each other: together they read whole rows.
    head = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    first = tl.load(starts + rows, is_row, num_rows).to(tl.int32)
    last = tl.load(ends + rows, is_row, 0).to(tl.int32)
    if HAS_WINDOW:
        first = tl.maximum(first, rows - window + 1)
        last = tl.minimum(last, rows + window)
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM

    query_place = rows.to(tl.int64)[:, None] * query_row + head * query_head + dims[None, :]
    queries = tl.load(query + query_place, is_row[:, None] & is_dim[None, :], 0.0)
    key += head * key_head
    value += head * value_head
    result, total = weighted_sums(
        queries,
        key,
        value,
        first,
        last,
        scaling,
        key_row,
        value_row,
        dims,
        is_dim,
        ROWS,
        KEYS,
        PADDED_DIM,
        False,
    )
    if tl.sum((result != result).to(tl.int32)) > 0:
        result, total = weighted_sums(
            queries,
            key,
            value,
            first,
            last,
            scaling,
            key_row,
            value_row,
            dims,
            is_dim,
            ROWS,
            KEYS,
            PADDED_DIM,
            True,
        )

    output_place = (rows.to(tl.int64)[:, None] * HEADS + head) * HEAD_DIM + dims[None, :]
    result = result / tl.where(is_row, total, 1.0)[:, None]
    tl.store(output + output_place, result.to(output.dtype.element_ty), is_row[:, None] & is_dim[None, :])


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    *,
    bounds: torch.Tensor,
) -> torch.Tensor:
    """Attention of each packed text to itself, (rows, heads, head_dim) each, and the result too, contiguous.

    In the type of `value`, float16 or bfloat16, also where rotary embeddings have left query and key in
    float32. `bounds` is (2, rows): where the text of each row begins and ends. With a window, a row sees those
    less than so far away.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    num_rows, num_heads, head_dim = query.shape
    output = torch.empty(num_rows, num_heads, head_dim, dtype=value.dtype, device=value.device)
    attention_kernel[num_heads, triton.cdiv(num_rows, ROWS)](
        *(query, key, value, *bounds, output),
        scaling * math.log2(math.e),  # the kernel's exponential is of 2
        window or 0,
        num_rows,
        *(one.stride(axis) for one in (query, key, value) for axis in (0, 1)),
        num_heads,
        head_dim,
        max(triton.next_power_of_2(head_dim), 16),
        window is not None,
        ROWS,
        KEYS,
    )
    return output


def run_rows(loaded: LoadedModel, packing: Packing, taps: Taps) -> None:
    """The packed pass with this attention."""
    over_rows(loaded, loaded.rows_of(packing).to(loaded.device, non_blocking=True), taps)


def over_rows(loaded: LoadedModel, rows: torch.Tensor, taps: Taps) -> None:
    """The same, over rows that are on the device, as `LoadedModel.rows_of` has them."""
    taps.attention = partial(attend_rows, bounds=rows[3:])
    loaded.run_layers(taps, {**loaded.inputs_of(rows), "taps": taps})

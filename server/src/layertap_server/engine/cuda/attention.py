"""Attention over packed texts on CUDA: one kernel for texts of any lengths, divided by rows and not by texts.

Usual kernels for texts of different lengths divide each text into tiles of some 128 rows. Natural texts have
some 30 tokens, so three quarters of that work is spent on rows that do not exist. Here each program of the
kernel takes the next rows of the batch, whichever texts they belong to, and goes through the keys of all
these texts; each row has its own range of keys. So the number of programs depends only on the number of rows,
and a recorded pass (graphs.py) can be used for any texts that fit into it.

Method: softmax in one pass over the keys, as in FlashAttention (Dao et al.,
2022). Written in Triton, which torch's CUDA packages for Linux include. A kernel
is compiled at its first call, when the model is loaded, and cached on disk.
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

# Query rows of one program, and key rows that it processes in one step.
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
    """For each query row, the weighted sum of the values of its keys
    [first, last), and the sum of the weights.

    The keys of other texts in the same program get weight 0. Since 0 times NaN
    is NaN, values that are not finite would still reach the rows of other texts.
    With GUARDED, such a value makes only those rows NaN that attend to it.
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
        # Rows without a key so far have only scores of -inf; any finite base avoids -inf - -inf = NaN.
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
    # The head is the fastest-varying index of the grid, so that the programs of all heads of the same rows
    # run at about the same time, and together read whole rows of memory.
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
    """Attention in which each packed text attends only to itself. The tensors and the result are (rows,
    heads, head_dim); the result is contiguous.

    Computes in the type of `value`, float16 or bfloat16, even if rotary embeddings have made query and key
    float32. `bounds` is (2, rows): where the text of each row begins and ends. With a window, a row attends
    to the rows of its text at a distance less than `window`.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    num_rows, num_heads, head_dim = query.shape
    output = torch.empty(num_rows, num_heads, head_dim, dtype=value.dtype, device=value.device)
    attention_kernel[num_heads, triton.cdiv(num_rows, ROWS)](
        *(query, key, value, *bounds, output),
        scaling * math.log2(math.e),  # the kernel uses powers of 2 instead of e
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
    """The packed pass with `attend_rows` as its attention."""
    over_rows(loaded, loaded.rows_of(packing).to(loaded.device, non_blocking=True), taps)


def over_rows(loaded: LoadedModel, rows: torch.Tensor, taps: Taps) -> None:
    """The same, for rows as `LoadedModel.rows_of` returns them that are already on the device."""
    taps.attention = partial(attend_rows, bounds=rows[3:])
    loaded.run_layers(taps, {**loaded.inputs_of(rows), "taps": taps})

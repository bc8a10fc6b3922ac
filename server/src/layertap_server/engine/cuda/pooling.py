"""Pooling on CUDA as one kernel: launching torch's operations instead took the host three times as long.

Written in Triton, which torch's CUDA packages for Linux include. A kernel is compiled at its first call, when
the model is loaded, and cached on disk.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from layertap_server.engine.model import on
from layertap_server.engine.transfer import to_device

# Elements that a program reads in one step: 32 for each thread of its 8 warps.
STEP_SIZE, NUM_WARPS = 8192, 8


@triton.jit
def larger(one, other):  # type: ignore[no-untyped-def]
    """The maximum with torch's treatment of NaN: if either operand is NaN, the result is NaN."""
    return tl.where((one != one) | (one > other), one, other)


# Not specialized on arguments that differ from batch to batch: a kernel that is compiled for multiples of 16,
# for example, would have to be compiled again for other values.
@triton.jit(do_not_specialize=["num_segments", "dims"], do_not_specialize_on_alignment=["bounds"])
def pool_kernel(  # type: ignore[no-untyped-def]
    hidden,
    bounds,
    vectors,
    num_segments,
    num_columns,
    dims,
    epsilon,
    HAS_MEAN: tl.constexpr,  # noqa: N803
    HAS_MAX: tl.constexpr,  # noqa: N803
    NORMALIZES: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(bounds + segment)
    last = tl.load(bounds + num_segments + segment)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    # Lane i accumulates rows first + i, first + i + ROWS, …; the lanes are combined after the loop. So a step
    # of the loop depends on nothing but its loads.
    totals = tl.zeros([ROWS, COLUMNS], tl.float32)
    peaks = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    for begin in range(first, last, ROWS):
        rows = begin + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < last)[:, None] & is_column[None, :]
        place = hidden + rows[:, None] * num_columns + columns[None, :]
        if HAS_MEAN:
            totals += tl.load(place, mask, 0.0)
        if HAS_MAX:
            peaks = larger(peaks, tl.load(place, mask, float("-inf")))
    mean = tl.sum(totals, 0) / (last - first).to(tl.float32)
    peak = tl.reduce(peaks, 0, larger) if HAS_MAX else mean

    # With both reductions, the maxima come after the means.
    max_column = columns + num_columns if HAS_MEAN else columns
    is_mean = is_column & (columns < dims)
    is_max = is_column & (max_column < dims)
    if NORMALIZES:
        square = tl.zeros([], tl.float32)
        if HAS_MEAN:
            square += tl.sum(tl.where(is_mean, mean * mean, 0.0), 0)
        if HAS_MAX:
            square += tl.sum(tl.where(is_max, peak * peak, 0.0), 0)
        norm = larger(tl.sqrt(square), epsilon)
        mean = mean / norm
        peak = peak / norm
    vector = vectors + segment * dims
    if HAS_MEAN:
        tl.store(vector + columns, mean, is_mean)
    if HAS_MAX:
        tl.store(vector + max_column, peak, is_max)


def pool_on_cuda(
    hidden: torch.Tensor,
    segments: list[tuple[int, int]],
    reductions: tuple[str, ...],
    *,
    dims: int,
    epsilon: float | None,
) -> torch.Tensor:
    """Pools half-open, non-empty ranges of float32 rows: (segments, dims), normalized if `epsilon` is given.

    With both reductions, "mean" and "max" in this order, the first `dims` of their concatenation.
    """
    num_columns = hidden.shape[1]
    bounds = to_device(np.array(segments, np.int64).T.copy(), hidden.device)
    vectors = torch.empty(len(segments), dims, device=hidden.device)
    columns = triton.next_power_of_2(num_columns)
    with on(hidden.device):
        pool_kernel[len(segments),](
            hidden.contiguous(),
            bounds,
            vectors,
            len(segments),
            num_columns,
            dims,
            epsilon or 0.0,
            "mean" in reductions,
            "max" in reductions,
            epsilon is not None,
            max(STEP_SIZE // columns, 1),
            columns,
            num_warps=NUM_WARPS,
        )
    return vectors

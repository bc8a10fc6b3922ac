"""Pooling on the CPU in native code. The torch operations that it
replaces each release the GIL and then wait to get it back."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import torch

from layertap_server.engine.cpu.library import held_library, library, new_rows
from layertap_server.plan import Int64Array

# A call that reads more than this releases the GIL while it runs.
HELD_BYTES = 2**20
POINTER, NUMBER, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class PoolingKernel:
    """The functions of pool.h."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._pool, self._normalize = loaded.layertap_pool, loaded.layertap_normalize
        self._pool.argtypes = (POINTER, NUMBER, POINTER, POINTER, LONG, NUMBER, NUMBER, POINTER, LONG)
        self._normalize.argtypes = (POINTER, LONG, NUMBER, ctypes.c_float)
        self._pool.restype = self._normalize.restype = None

    def pool(
        self, rows: torch.Tensor, starts: Int64Array, ends: Int64Array, reductions: tuple[str, ...], dims: int
    ) -> torch.Tensor:
        """Reduces each range of the contiguous float32 rows by "mean" or "max": (ranges, dims). With several
        reductions, the first `dims` of their concatenated results."""
        size, itemsize = rows.shape[1], rows.itemsize
        vectors = new_rows(len(starts), dims)
        for number, reduction in enumerate(reductions):
            first = number * size
            if first < dims:
                self._pool(
                    rows.data_ptr(),
                    size,
                    starts.ctypes.data,
                    ends.ctypes.data,
                    len(starts),
                    min(size, dims - first),
                    reduction == "max",
                    vectors.data_ptr() + first * itemsize,
                    dims,
                )
        return vectors

    def normalize(self, vectors: torch.Tensor, epsilon: float) -> None:
        """Divides each of the contiguous float32 vectors by its L2
        norm, or by `epsilon` if that is larger, in place."""
        self._normalize(vectors.data_ptr(), len(vectors), vectors.shape[1], epsilon)


@lru_cache(maxsize=2)
def pooling_kernel(*, is_held: bool) -> PoolingKernel | None:
    loaded = held_library() if is_held else library()
    return None if loaded is None else PoolingKernel(loaded)


def pool_natively(
    hidden: torch.Tensor,
    segments: list[tuple[int, int]],
    reductions: tuple[str, ...],
    *,
    dims: int,
    epsilon: float | None,
) -> torch.Tensor | None:
    """Pools half-open, non-empty ranges of rows: (segments, dims), normalized if `epsilon` is given.

    Returns None if it cannot: without a C compiler, or if `hidden` is
    not a contiguous float32 tensor on the CPU.
    """
    if hidden.device.type != "cpu" or hidden.dtype is not torch.float32 or not hidden.is_contiguous():
        return None
    starts, ends = np.array(segments, np.int64).T.copy()
    num_bytes = int((ends - starts).sum()) * hidden.shape[1] * hidden.itemsize
    kernel = pooling_kernel(is_held=num_bytes <= HELD_BYTES)
    if kernel is None:
        return None
    vectors = kernel.pool(hidden, starts, ends, reductions, dims)
    if epsilon is not None:
        kernel.normalize(vectors, epsilon)
    return vectors

"""A pool of memory for large results on the CPU. A block is reused once nothing refers to it any more.

Without the pool, the allocator returns blocks of tens of megabytes to the system when they are freed, and the
next pass gets new ones, page by page: that took as long as computing the results that were written into them.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

# Limit for all blocks together, free or lent. Results beyond it are allocated by torch, outside of the pool.
MAX_BYTES = 2**28
# Smaller results are allocated by torch: the allocator keeps memory of that size for reuse.
MIN_BLOCK_BYTES = 2**20
# A block is lent only for results that fill at least this share of it.
MIN_FILL = 0.5


class Block:
    """A piece of memory, which is free while nothing but this object refers to it."""

    __slots__ = ("_bytes", "_own_references")

    def __init__(self, num_bytes: int) -> None:
        self._bytes: npt.NDArray[np.uint8] = np.empty(num_bytes, np.uint8)
        self._own_references = self._num_references()

    def __len__(self) -> int:
        return len(self._bytes)

    def _num_references(self) -> int:
        return sys.getrefcount(self._bytes)

    @property
    def is_free(self) -> bool:
        """Whether nothing outside refers to the memory.

        Every tensor, array or buffer over the memory, or over a part of it, holds a reference to the array
        that owns it, directly or through other objects. A free block stays free until it is lent, since only
        `lend` creates new references from it.
        """
        return self._num_references() == self._own_references

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor: torch.Tensor = torch.from_numpy(self._bytes[: num_bytes_of(shape, dtype)])
        return tensor.view(dtype).view(*shape)


class ResultMemory:
    """A pool of at most `max_bytes` of blocks. Any thread may take memory, and any thread may drop it."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # Ordered by when they were last lent, the least recent first. Guarded by `_lock`.
        self._blocks: list[Block] = []

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self._blocks))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor on the CPU. If memory is short, raises what torch and numpy raise."""
        num_bytes = num_bytes_of(shape, dtype)
        if MIN_BLOCK_BYTES <= num_bytes <= self._max_bytes:
            with self._lock:
                block = self._take(num_bytes)
                if block is not None:
                    return block.lend(shape, dtype)
        return torch.empty(shape, dtype=dtype)

    def release(self) -> None:
        """Returns all free blocks to the system."""
        with self._lock:
            self._blocks = [block for block in self._blocks if not block.is_free]

    def _take(self, num_bytes: int) -> Block | None:
        """The smallest free block that fits, else a new one, for which free blocks are dropped as needed.
        None if the limit leaves no room. The caller holds `_lock`."""
        free = [block for block in self._blocks if block.is_free]
        fitting = [block for block in free if MIN_FILL * len(block) <= num_bytes <= len(block)]
        taken = min(fitting, key=len, default=None)
        if taken is not None:
            self._blocks.remove(taken)
        else:
            surplus = self.num_bytes + num_bytes - self._max_bytes
            if surplus > sum(map(len, free)):
                return None
            while surplus > 0:
                surplus -= len(free[0])
                self._blocks.remove(free.pop(0))
            taken = Block(num_bytes)
        self._blocks.append(taken)
        return taken


def num_bytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * int(dtype.itemsize)


RESULT_MEMORY = ResultMemory()

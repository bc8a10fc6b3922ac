"""A pool of memory for large results on the CPU. A block is reused once nothing refers to it any more.

Without the pool, the allocator returns blocks of tens of megabytes to the system when they are freed, and the
next pass gets new ones, page by page: that took as long as computing the results that were written into them.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

# Limit for all blocks together, free or lent. Results beyond it are allocated by torch, outside of the pool.
MAX_BYTES = 2**28
# Smaller results are allocated by torch: the allocator keeps memory of that size for reuse.
MIN_BLOCK_BYTES = 2**20
# A block is lent only for results that fill at least this share of it.
MIN_FILL = 0.5


Bytes = npt.NDArray[np.uint8]


class FullError(Exception):
    """The supply has no piece of memory of the size."""


class Supply(Protocol):
    """Where the pool gets its blocks from."""

    def take(self, num_bytes: int) -> Bytes | None:
        """New memory, of which no other array is a view; None if there is none."""

    def give_back(self, block: Bytes) -> None:
        """Returns memory that nothing refers to any more."""


class Heap:
    """The process's own memory."""

    def take(self, num_bytes: int) -> Bytes | None:
        return np.empty(num_bytes, np.uint8)

    def give_back(self, block: Bytes) -> None:
        """It is freed with its last reference."""


class Block:
    """A piece of memory, which is free while nothing but this object refers to it."""

    __slots__ = ("_bytes", "_own_references")

    def __init__(self, supply: Supply, num_bytes: int) -> None:
        """Raises `FullError`, or `MemoryError` where the supply is the process's memory."""
        memory = supply.take(num_bytes)
        if memory is None:
            raise FullError
        self._bytes = memory
        del memory  # the references that are counted now must be this object's alone
        self._own_references = self._num_references()

    def __len__(self) -> int:
        return len(self._bytes)

    def give_back(self, supply: Supply) -> None:
        supply.give_back(self._bytes)

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
        self._supply: Supply = Heap()
        self._lock = threading.Lock()
        # Ordered by when they were last lent, the least recent first. Guarded by `_lock`.
        self._blocks: list[Block] = []

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self._blocks))

    def use(self, supply: Supply, max_bytes: int) -> None:
        """Takes blocks from `supply` from now on. To be called before any memory is taken."""
        self._supply, self._max_bytes = supply, max_bytes

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
            for block in [block for block in self._blocks if block.is_free]:
                self._drop(block)

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
                self._drop(free.pop(0))
            try:
                taken = Block(self._supply, num_bytes)
            except FullError:  # between the blocks that are lent, no piece is so large
                return None
        self._blocks.append(taken)
        return taken

    def _drop(self, block: Block) -> None:
        self._blocks.remove(block)
        block.give_back(self._supply)


def num_bytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * int(dtype.itemsize)


RESULT_MEMORY = ResultMemory()

"""Memory of large results on the CPU, used again once nobody looks at it.

Blocks of tens of megabytes go back to the system when they are freed, and are given anew, page by page, to
the next pass: that took as long as it took to compute what was written into them.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

# Of all blocks, whether free or lent: what is asked for beyond it comes from the system and goes back to it.
MAX_BYTES = 2**28
# Smaller results are the allocator's, which keeps what it is given back.
MIN_BLOCK_BYTES = 2**20
# A block serves results of at least this share of it.
MIN_FILL = 0.5


class Block:
    """Some memory, free while nobody but itself holds it."""

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
        """Whatever looks at the memory, be it a tensor, an array or a buffer, or a part of one, holds the
        array that owns it, if only by way of others. And where none does, none can come to be."""
        return self._num_references() == self._own_references

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor: torch.Tensor = torch.from_numpy(self._bytes[: num_bytes_of(shape, dtype)])
        return tensor.view(dtype).view(*shape)


class ResultMemory:
    """At most `max_bytes` of such blocks. Taken from any thread, and let go of in any."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # The one that was lent longest ago comes first.
        self._blocks: list[Block] = []

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self._blocks))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor on the CPU. Raises as torch and numpy do where memory is short."""
        num_bytes = num_bytes_of(shape, dtype)
        if MIN_BLOCK_BYTES <= num_bytes <= self._max_bytes:
            with self._lock:
                block = self._take(num_bytes)
                if block is not None:
                    return block.lend(shape, dtype)
        return torch.empty(shape, dtype=dtype)

    def release(self) -> None:
        """Gives all that is free back to the system."""
        with self._lock:
            self._blocks = [block for block in self._blocks if not block.is_free]

    def _take(self, num_bytes: int) -> Block | None:
        """The smallest free block that will do, else a new one in the place of free ones, if there is room."""
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

"""Memory that an engine process writes results into, and that front processes map to read them.

It is an anonymous file in memory (memfd): it has no name that could be left behind, it is not limited by the
size of /dev/shm, and its memory is freed when the last process that has it is gone, however that process
ended. It is sealed, so that it cannot shrink under a reader (which would end the reader by SIGBUS), and so
that nobody but the engine can write.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from bisect import insort

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# linux/fcntl.h; Python has names for the first three only. The last one refuses new writable mappings, and
# needs Linux 5.1.
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE = 1, 2, 4, 16
ALIGNMENT = mmap.PAGESIZE
# An arena keeps each page that was ever written, so it is not larger than this, whatever the limit of results
# in memory. Results that do not fit are copied through the link.
MAX_BYTES = 2**29


def create_arena(num_bytes: int) -> int:
    """The descriptor of a new arena for `num_bytes`, or `MAX_BYTES`. Its pages take memory only once they are
    written."""
    descriptor = os.memfd_create("layertap results", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, min(num_bytes, MAX_BYTES))
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
    return descriptor


class WritableArena:
    """The engine's mapping, as a supply of memory for `ResultMemory`. Any thread may use it."""

    def __init__(self, descriptor: int) -> None:
        """Maps the arena, and seals it against any other writable mapping."""
        self._map = mmap.mmap(descriptor, 0)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self._begin = address_of(self._bytes)
        self._lock = threading.Lock()
        # Free ranges by their begin; neighbouring ones are joined. Guarded by `_lock`.
        self._free: list[tuple[int, int]] = [(0, len(self._bytes))]

    def take(self, num_bytes: int) -> Bytes | None:
        """Memory of exactly this size; None where no free range is large enough."""
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            for index, (begin, end) in enumerate(self._free):
                if end - begin >= size:
                    self._free[index : index + 1] = [(begin + size, end)] if end - begin > size else []
                    # A new array over the mapping, not a slice of an array: numpy would refer to that one,
                    # and `Block` counts references to its own.
                    return np.frombuffer(self._map, np.uint8, num_bytes, begin)
        return None

    def give_back(self, block: Bytes) -> None:
        """Returns memory that `take` gave. Its pages stay with the arena: of a file with this seal, the system
        takes none back."""
        begin = address_of(block) - self._begin
        self.free(begin, len(block))

    def free(self, begin: int, num_bytes: int) -> None:
        """As `give_back`, by the offset and the size."""
        end = begin + -(-num_bytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            insort(self._free, (begin, end))
            joined: list[tuple[int, int]] = []
            for first, last in self._free:
                if joined and joined[-1][1] == first:
                    joined[-1] = joined[-1][0], last
                else:
                    joined.append((first, last))
            self._free = joined

    def offset_of(self, array: npt.NDArray[np.generic]) -> int | None:
        """Where the contiguous array lies in the arena; None if it lies elsewhere."""
        offset = address_of(array) - self._begin
        return offset if 0 <= offset < len(self._bytes) else None

    def __len__(self) -> int:
        return len(self._bytes)

    @property
    def num_free_bytes(self) -> int:
        with self._lock:
            return sum(end - begin for begin, end in self._free)


class ReadableArena:
    """A front's mapping. It stays readable when the engine process is gone."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)

    def read(self, offset: int, num_bytes: int) -> Bytes:
        """The bytes without a copy. Raises `ValueError` if they are outside of the arena."""
        return np.frombuffer(self._map, np.uint8, num_bytes, offset)


def address_of(array: npt.NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address

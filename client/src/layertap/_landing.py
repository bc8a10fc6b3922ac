"""A result while its bytes come in, landed in memory that is used again once its caller is done with it."""

from __future__ import annotations

import sys
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from layertap._codec import decode_outcome, num_bytes
from layertap._types import Result, Timing
from layertap._wire import Buffer, tensors
from layertap.errors import LayertapError
from layertap.v1 import encoder_pb2 as pb

# Smaller ones come from memory that the process has already.
REUSED_BYTES = 1 << 20
# Of large buffers, in use or not, as far as there are more than two: one lands while one is read.
MAX_KEPT_BYTES = 128 << 20

Bytes: TypeAlias = npt.NDArray[np.uint8]


def _num_references(buffers: list[Bytes], index: int) -> int:
    return sys.getrefcount(buffers[index])


_UNSHARED = _num_references([np.empty(1, np.uint8)], 0)


class Memory:
    """Where one stream's results land.

    Memory that is new to a process is cleared by the kernel at the first touch, in steps of 2 MiB: a few
    times the cost of landing a result there, in one go. So a large buffer is used again as soon as no
    array refers to it any more, which its reference count tells.
    """

    def __init__(self) -> None:
        self._buffers: list[Bytes] = []

    def take(self, size: int) -> Bytes:
        """(size,) bytes, with anything in them."""
        if size < REUSED_BYTES:
            return np.empty(size, np.uint8)
        buffers = self._buffers
        for index in range(len(buffers)):
            if size <= buffers[index].nbytes <= 2 * size and _num_references(buffers, index) == _UNSHARED:
                buffers.append(buffers.pop(index))
                return buffers[-1][:size]
        buffers.append(np.empty(size, np.uint8))
        while len(buffers) > 2 and sum(buffer.nbytes for buffer in buffers) > MAX_KEPT_BYTES:
            del buffers[0]
        return buffers[-1][:size]


class Landing:
    """The result of one input, while its tensors' bytes come in."""

    def __init__(self, header: pb.EncodeResult, memory: Memory) -> None:
        self._header = header
        self._buffers = [memory.take(num_bytes(tensor)) for tensor in tensors(header)]
        self._filled = [0] * len(self._buffers)

    @property
    def num_bytes(self) -> int:
        """Those that have come."""
        return sum(self._filled)

    def land(self, chunk: pb.TensorChunk, data: Buffer) -> None:
        """Raises ValueError where it is not the next chunk of its tensor."""
        end = chunk.offset + len(data)
        if chunk.offset != self._filled[chunk.tensor] or end > len(self._buffers[chunk.tensor]):
            raise ValueError(f"bytes {chunk.offset} to {end} of tensor {chunk.tensor} are out of place")
        self._buffers[chunk.tensor][chunk.offset : end] = np.frombuffer(data, np.uint8)
        self._filled[chunk.tensor] = end

    def outcome(self, timing: Timing, index: int) -> Result | LayertapError:
        """The result of the caller's input number `index`, or its error. Raises ValueError where bytes
        are missing."""
        if self._filled != [len(buffer) for buffer in self._buffers]:
            raise ValueError("a tensor's bytes are missing")
        return decode_outcome(self._header, self._buffers, timing, index)

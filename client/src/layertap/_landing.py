"""Assembles a result from chunks, in memory that is reused when the caller no longer refers to it."""

from __future__ import annotations

import sys
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from layertap._replies import decode_outcome, num_bytes
from layertap._results import Result, Timing
from layertap._wire import Buffer, tensors
from layertap.errors import LayertapError
from layertap.v1 import encoder_pb2 as pb

# Smaller buffers are not reused: their memory usually belongs to the process already.
REUSED_BYTES = 1 << 20
# The total size of the large buffers that are kept, in use or not. Two are always kept: one is filled while
# the caller reads the other.
MAX_KEPT_BYTES = 128 << 20

Bytes: TypeAlias = npt.NDArray[np.uint8]


def _num_references(buffers: list[Bytes], index: int) -> int:
    return sys.getrefcount(buffers[index])


_UNSHARED = _num_references([np.empty(1, np.uint8)], 0)


class Memory:
    """The buffers for the results of one stream.

    The operating system clears new memory when it is first used, in steps of 2 MiB, which takes a few times
    as long as copying a result into it. So a large buffer is used again as soon as no array refers to it,
    by its reference count.
    """

    def __init__(self) -> None:
        self._buffers: list[Bytes] = []

    def take(self, size: int) -> Bytes:
        """(size,) bytes, uninitialized."""
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
    """The result of one input whose tensors arrive in chunks. `asked` is the request."""

    def __init__(
        self, header: pb.EncodeResult, memory: Memory, asked: pb.EncodeRequest | None = None
    ) -> None:
        self._header = header
        self._asked = asked
        self._buffers = [memory.take(num_bytes(tensor)) for tensor in tensors(header)]
        self._filled = [0] * len(self._buffers)

    @property
    def num_bytes(self) -> int:
        """The bytes received so far."""
        return sum(self._filled)

    def land(self, chunk: pb.TensorChunk, data: Buffer) -> None:
        """Copies a chunk into its tensor. Raises ValueError if it is not the tensor's next chunk."""
        end = chunk.offset + len(data)
        if chunk.offset != self._filled[chunk.tensor] or end > len(self._buffers[chunk.tensor]):
            raise ValueError(f"bytes {chunk.offset} to {end} of tensor {chunk.tensor} are out of place")
        self._buffers[chunk.tensor][chunk.offset : end] = np.frombuffer(data, np.uint8)
        self._filled[chunk.tensor] = end

    def outcome(self, timing: Timing, index: int) -> Result | LayertapError:
        """The result of the caller's input `index`, or its error. Raises ValueError if chunks are missing."""
        if self._filled != [len(buffer) for buffer in self._buffers]:
            raise ValueError("a tensor's bytes are missing")
        return decode_outcome(self._header, self._buffers, timing, index, self._asked)

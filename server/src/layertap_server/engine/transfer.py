"""Asynchronous copies between host and device: ids and indices to the device, requested results to the host.

A copy between host and CUDA device is asynchronous only if the host memory is pinned.
torch takes pinned memory from a pool of its own, and reuses a piece once nothing
refers to it and the copies from or to it are done. So the arrays returned here may be
views of pinned memory, which stays valid for as long as a reply refers to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

# Results are copied together in blocks of up to this size; a larger one is copied by itself, from the memory
# where it was computed. So a reply that is sent slowly keeps at most this much memory of other replies alive.
BLOCK_BYTES = 2**20

Array = npt.NDArray[np.generic]
T = TypeVar("T")


class DeviceLostError(BaseException):
    """The device fails at every operation, and cannot recover within this process.

    Not an `Exception`: the batch is not the cause, and running its parts again would not help.
    """


def to_device(array: npt.NDArray[np.integer], device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device: on the CPU it shares the
    array's memory, on CUDA it is an asynchronous copy."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def staging(shape: Sequence[int], device: torch.device) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """Host memory for int64 values that will be copied to the device, as a tensor and as an array over it. It
    is pinned for a CUDA device, so that the copy is asynchronous."""
    if device.type == "cuda":
        tensor = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        return tensor, tensor.numpy()
    array = np.empty(shape, np.int64)
    return torch.from_numpy(array), array


class Transfer:
    """Copies tensors of one device, of any types, to the host.

    On the CPU (`stream` is None) nothing is copied: the arrays share the tensors' memory. From a CUDA device
    the copies run on `stream`, after the work that the current stream has been given so far, and at the same
    time as its later work.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], stream: torch.cuda.Stream | None) -> None:
        self._tensors = [tensor.contiguous() for tensor in tensors]
        self._hosts: list[torch.Tensor] = []
        self._done: torch.cuda.Event | None = None
        if stream is None:
            return
        self._blocks = list(blocks_of(self._tensors, lambda tensor: tensor.nbytes))
        # Kept until the copies are done: if it were freed earlier, the next pass could overwrite the memory.
        self._packed = [packed(block) for block in self._blocks]
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for source in self._packed:
                self._hosts.append(pinned_like(source).copy_(source, non_blocking=True))
            self._done = stream.record_event()

    def wait(self) -> list[Array]:
        """Waits for the copies. Returns contiguous numpy arrays of
        the same bits (bfloat16 as uint16), in the order given.

        Raises `DeviceLostError` if the device has failed since: CUDA
        reports errors of earlier work at such a wait.
        """
        if self._done is None:
            return [as_numpy(tensor) for tensor in self._tensors]
        try:
            self._done.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(str(error)) from error
        self._packed.clear()
        return [
            array
            for block, host in zip(self._blocks, self._hosts, strict=True)
            for array in unpacked(host.numpy(), block)
        ]


def pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def blocks_of(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Groups the items in their order into blocks of at most
    `BLOCK_BYTES`; an item larger than that is a block of its own."""
    block: list[T] = []
    num_bytes = 0
    for item in items:
        size = nbytes(item)
        if block and num_bytes + size > BLOCK_BYTES:
            yield block
            block, num_bytes = [], 0
        block.append(item)
        num_bytes += size
    if block:
        yield block


def packed(block: list[torch.Tensor]) -> torch.Tensor:
    """The bytes of contiguous tensors, concatenated; for a single tensor a view of its memory."""
    flat = [tensor.view(-1).view(torch.uint8) for tensor in block]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unpacked(buffer: npt.NDArray[np.uint8], block: list[torch.Tensor]) -> Iterator[Array]:
    """Arrays for the tensors of a block, as views of the bytes that `packed` has concatenated. They may be
    unaligned, which numpy supports."""
    offset = 0
    for tensor in block:
        end = offset + tensor.nbytes
        yield buffer[offset:end].view(numpy_dtype(tensor.dtype)).reshape(tuple(tensor.shape))
        offset = end


def numpy_dtype(dtype: torch.dtype) -> np.dtype[np.generic]:
    return as_numpy(torch.empty(0, dtype=dtype)).dtype


def as_numpy(tensor: torch.Tensor) -> Array:
    array: Array
    array = (
        tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype is torch.bfloat16 else tensor.numpy()
    )
    return array

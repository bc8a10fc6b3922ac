"""Between host and device, without waiting: indices in, and out only what was asked.

A copy to a CUDA device waits for nothing only if the host's side of it is pinned. torch hands pinned
memory out of a pool of its own, and takes a piece back once nobody holds it and the copies that it
served are done: so the arrays given here may be views of such memory for as long as a reply needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

# Results up to this size travel together; a larger one alone, straight from where it was computed.
# So a reply that is slow to be sent holds back no more than this of the memory of others.
BLOCK_BYTES = 2**20

Array = npt.NDArray[np.generic]
T = TypeVar("T")


class DeviceLostError(BaseException):
    """The device fails whatever it is given, and in this process for good.

    No `Exception`: it is not the fault of a batch, and to try its parts again would not help.
    """


def to_device(array: npt.NDArray[np.integer], device: torch.device) -> torch.Tensor:
    """The array on the device; on the CPU its own memory, elsewhere a copy that is not waited for."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def staging(shape: Sequence[int], device: torch.device) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """Memory of the host for int64 that go to the device, as a tensor and as an array: copied without waiting."""
    if device.type == "cuda":
        tensor = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        return tensor, tensor.numpy()
    array = np.empty(shape, np.int64)
    return torch.from_numpy(array), array


class Transfer:
    """Tensors of one device, of any types, on their way to the host.

    On the CPU there is no way to go: the arrays are the tensors' own memory. From a CUDA device the
    copies run on `stream`, behind what the current stream has been given, while that goes on.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], stream: torch.cuda.Stream | None) -> None:
        self._tensors = [tensor.contiguous() for tensor in tensors]
        self._hosts: list[torch.Tensor] = []
        self._done: torch.cuda.Event | None = None
        if stream is None:
            return
        self._blocks = list(blocks_of(self._tensors, lambda tensor: tensor.nbytes))
        # Held until the copies are done: freed earlier, the next pass could overwrite them.
        self._packed = [packed(block) for block in self._blocks]
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for source in self._packed:
                self._hosts.append(pinned_like(source).copy_(source, non_blocking=True))
            self._done = stream.record_event()

    def wait(self) -> list[Array]:
        """Contiguous numpy arrays of the same bits (bfloat16 as uint16), in the order given.

        Raises `DeviceLostError` where the device has failed meanwhile: it reports that to whoever waits.
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
    """The items in their order, those in `BLOCK_BYTES` together, and each larger one by itself."""
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
    """The bytes of contiguous tensors, end to end; of a single one in its own memory."""
    flat = [tensor.view(-1).view(torch.uint8) for tensor in block]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unpacked(buffer: npt.NDArray[np.uint8], block: list[torch.Tensor]) -> Iterator[Array]:
    """Views of the buffer that `packed` describes. They may start at any byte: numpy reads such views."""
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

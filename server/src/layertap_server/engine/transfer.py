"""Device to host: what was asked, in one copy a batch."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch


def to_host(tensors: list[torch.Tensor]) -> list[npt.NDArray[np.generic]]:
    """Tensors of any types to contiguous numpy arrays of the same bits (bfloat16 as uint16).

    On the CPU the arrays are the tensors' own memory. From a device they are views of one pinned
    buffer, filled by one copy.
    """
    if not tensors or tensors[0].device.type == "cpu":
        return [as_numpy(tensor.contiguous()) for tensor in tensors]
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    on_device = torch.cat(flat)
    host = torch.empty(on_device.shape, dtype=torch.uint8, pin_memory=on_device.device.type == "cuda")
    host.copy_(on_device)
    arrays = []
    offset = 0
    buffer = host.numpy()
    for tensor in tensors:
        size = math.prod(tensor.shape) * tensor.element_size()
        # Each copied piece may start at any offset; numpy reads unaligned views, and the wire only bytes.
        arrays.append(buffer[offset : offset + size].view(numpy_dtype(tensor.dtype)).reshape(tensor.shape))
        offset += size
    return arrays


def numpy_dtype(dtype: torch.dtype) -> np.dtype[np.generic]:
    if dtype is torch.bfloat16:
        return np.dtype(np.uint16)
    array: npt.NDArray[np.generic] = torch.empty(0, dtype=dtype).numpy()
    return array.dtype


def as_numpy(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    array: npt.NDArray[np.generic]
    array = (
        tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype is torch.bfloat16 else tensor.numpy()
    )
    return array

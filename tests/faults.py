"""Memory that runs out on purpose: at the nth operation of a pass, which is every step of it in turn."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# As torch says it on a device and on the CPU, and as numpy and the native kernel do.
ERRORS: tuple[Exception, ...] = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
)


class OutOfMemoryAt(TorchDispatchMode):  # type: ignore[misc]  # torch is not followed by the type checker
    """Fails the operation of that number, once; watches the tensors that the others gave."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.num_operations = 0
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    @property
    def failed(self) -> bool:
        return self.num_operations > self.number

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operations += 1
        if self.num_operations == self.number + 1:
            error = ERRORS[self.number % len(ERRORS)]
            raise type(error)(*error.args)
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.tensors.append(weakref.ref(result))
        return result

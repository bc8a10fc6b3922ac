"""torch, where the caller has it: the SDK works without it, and imports it only for callers who want tensors."""

from __future__ import annotations

import importlib.util
from typing import Any


def has_torch() -> bool:
    """Whether torch is installed. Does not import it."""
    return importlib.util.find_spec("torch") is not None


def load_torch(purpose: str) -> Any:
    """The module torch.

    Raises:
        ModuleNotFoundError: torch is not installed; the message names what needs it.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(f"{purpose} needs torch: pip install torch", name="torch") from error
    return torch


def as_numpy(value: Any) -> Any:
    """A dense array for a torch tensor on any device; anything else as it is."""
    if type(value).__module__.partition(".")[0] != "torch":
        return value
    value = value.detach()
    return (value.to_dense() if value.layout is not load_torch("").strided else value).cpu().float().numpy()

"""How many threads torch computes with."""

from __future__ import annotations

import os

import torch


def use_threads(num_threads: int) -> None:
    """Sets torch's intra-op threads; 0 is one for each core that this process may use."""
    torch.set_num_threads(num_threads or num_usable_cores())


def num_usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS

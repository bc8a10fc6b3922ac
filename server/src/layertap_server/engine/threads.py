"""How many threads torch computes with."""

from __future__ import annotations

import os
import threading

import torch

_setting = threading.Lock()


def use_threads(num_threads: int) -> None:
    """Sets torch's intra-op threads; 0 is one for each core that this process may use."""
    torch.set_num_threads(num_threads or num_usable_cores())


def use_one_thread() -> None:
    """For what the calling thread computes. torch knows one number for threads that have not asked for
    theirs yet, which stays as it was, and one for each that has."""
    with _setting:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        ready = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
        ready.start()
        ready.join()


def num_usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS

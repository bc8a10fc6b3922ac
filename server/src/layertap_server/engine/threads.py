"""Sets how many threads torch computes with."""

from __future__ import annotations

import os
import threading

import torch

_setting = threading.Lock()


def use_threads(num_threads: int) -> None:
    """Sets the number of torch's intra-op threads; 0 means one for each core that this process may use."""
    torch.set_num_threads(num_threads or num_usable_cores())


def use_one_thread() -> None:
    """Makes the calling thread compute with one thread, without changing the default for other threads.

    torch keeps one number for each thread that has set or read it, and a default for the others, which
    `set_num_threads` changes too. A temporary thread sets the default back to the former number.
    """
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

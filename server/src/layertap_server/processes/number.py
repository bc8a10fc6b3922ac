"""Chooses the number of front processes."""

from __future__ import annotations

import ctypes
import os
import sys

from layertap_server.config import Config, ConfigError

# With fewer cores, one process is faster.
MIN_CORES = 6
# Cores that the engine process keeps busy, and one for the rest of the machine.
ENGINE_CORES, OTHER_CORES = 2, 1
MAX_FRONTS = 8


def chosen_fronts(config: Config) -> int:
    """The number of front processes; 0 for one process. Raises `ConfigError` where there can be none."""
    if config.fronts != "auto":
        number = int(config.fronts)
        if number and sys.platform != "linux":
            raise ConfigError(f"fronts: {number} needs Linux; leave it at 0")
        return number
    if sys.platform != "linux" or config.device == "cpu" or num_cores() < MIN_CORES:
        return 0
    if config.device == "auto" and not has_cuda_device():
        return 0
    return min(max(num_cores() - ENGINE_CORES - OTHER_CORES, 1), MAX_FRONTS)


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def has_cuda_device() -> bool:
    """Whether the driver finds a device. torch is not asked: importing it takes seconds and memory, and this
    process does not compute."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0

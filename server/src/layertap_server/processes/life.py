"""How fronts learn at once that the engine process has died.

When a process is killed, the system frees its memory before it closes its sockets, which can take seconds.
Before both, it marks the robust mutexes that each of its threads holds, and wakes who waits for them. So the
engine process holds a mutex in shared memory for as long as it lives, and a thread of each front waits for it.
Where the C library has no such mutexes, fronts notice the end of the link's socket.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable

# Of C libraries for Linux: a mutex has up to 48 bytes, an attribute object up to 16.
MAX_ATTRIBUTE_BYTES = 64
SHARED, ROBUST = 1, 1
# Where the memory says whether the mutex is held.
HELD_AT = 256
# How often a waiting thread looks whether it is still needed.
LOOK_S = 1.0


def create_life() -> int:
    """The descriptor of shared memory for one life of an engine process."""
    descriptor = os.memfd_create("layertap life", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, mmap.PAGESIZE)
    return descriptor


class Life:
    """A mapping of that memory, which must last as long as the mutex is held. The mutex lies at its begin."""

    def __init__(self, descriptor: int, library: ctypes.CDLL | None = None) -> None:
        """`library` is the C library; by default that of this process."""
        self._map = mmap.mmap(descriptor, 0)
        self._c = ctypes.CDLL(None) if library is None else library
        self._mutex = ctypes.byref(ctypes.c_char.from_buffer(self._map))

    def hold(self) -> bool:
        """Takes the mutex until the calling thread ends, which must be the main thread of the process. Returns
        whether the C library can do it."""
        c, attribute = self._c, ctypes.create_string_buffer(MAX_ATTRIBUTE_BYTES)
        try:
            is_held = not (
                c.pthread_mutexattr_init(attribute)
                or c.pthread_mutexattr_setpshared(attribute, SHARED)
                or c.pthread_mutexattr_setrobust(attribute, ROBUST)
                or c.pthread_mutex_init(self._mutex, attribute)
                or c.pthread_mutex_lock(self._mutex)
            )
        except AttributeError:
            is_held = False
        self._map[HELD_AT] = is_held
        return is_held

    def watch(self, on_death: Callable[[], object], is_needed: Callable[[], bool]) -> None:
        """Calls `on_death`, on a thread of its own, when the process that holds the mutex has died; not if it
        never held it. It may stop watching once `is_needed` is false."""
        if not self._map[HELD_AT]:
            return

        def wait() -> None:
            while is_needed():
                if self._has_died(LOOK_S):
                    on_death()
                    return

        threading.Thread(target=wait, name="life of the engine", daemon=True).start()

    def _has_died(self, timeout_s: float) -> bool:
        """Waits for it for at most this time, without Python's lock. A process that is stopped has not died."""
        until = (ctypes.c_long * 2)(*divmod(time.time_ns() + int(timeout_s * 1e9), 10**9))  # struct timespec
        got: int = self._c.pthread_mutex_timedlock(self._mutex, until)
        if got not in (0, errno.EOWNERDEAD):
            return got == errno.ENOTRECOVERABLE
        # The other waiting threads are woken one after another, each by the one before.
        self._c.pthread_mutex_consistent(self._mutex)
        self._c.pthread_mutex_unlock(self._mutex)
        return True

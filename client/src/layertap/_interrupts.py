"""SIGINT and SIGTERM end a command between two texts, and never within gRPC.

A signal's handler runs in the main thread, wherever that is. An exception that it raises while gRPC acquires
or releases a lock leaves the lock as it is, and closing the channel then waits for it without end. So a command
runs on another thread, which learns of the signal between two texts, or because its connections are closed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Protocol, TypeVar

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# How often the main thread looks for a signal.
_LOOK_S = 0.05
# Signals that follow so soon count as one: a process group and its leader are often both signalled.
_REPEAT_S = 1.0
# How long a command may take to notice a signal; it may read from a pipe to which nobody writes. Once it has, it
# may take any time, to complete a file.
_END_S = 10.0

T = TypeVar("T")


class Closable(Protocol):
    """What ends the calls of a command when it is closed."""

    def close(self) -> None: ...


class Interrupted(KeyboardInterrupt):
    """The command received a signal to end."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class Interrupts:
    """Runs one command, and ends it after the first signal. A later one, after `_REPEAT_S`, ends the process at
    once."""

    def __init__(self) -> None:
        self._signal_number = 0
        self._signalled_s = 0.0
        self._is_noticed = False
        self._clients: list[Closable] = []

    def run(self, command: Callable[[], T]) -> T:
        """What the command returns or raises. Python handles signals only in the main thread; called in
        another one, the command is not ended by signals."""
        if threading.current_thread() is not threading.main_thread():
            return command()
        returned: list[T] = []
        raised: list[BaseException] = []

        def work() -> None:
            try:
                returned.append(command())
            except BaseException as error:
                raised.append(error)

        previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            self._run(threading.Thread(target=work, name="command", daemon=True))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if raised:
            raise raised[0]
        return returned[0]

    def _run(self, thread: threading.Thread) -> None:
        thread.start()
        while thread.is_alive() and not self._signal_number:
            thread.join(_LOOK_S)
        for client in self._clients if thread.is_alive() else ():
            client.close()
        thread.join(_END_S)
        if self._is_noticed:
            thread.join()
        if thread.is_alive():
            self._end_at_once()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._signal_number:
            self._signal_number, self._signalled_s = number, time.monotonic()
        elif time.monotonic() > self._signalled_s + _REPEAT_S:
            self._end_at_once()

    def _end_at_once(self) -> None:
        os.write(sys.stderr.fileno(), b"Error: interrupted\n")
        os._exit(128 + self._signal_number)

    def close_on_signal(self, client: Closable) -> None:
        """The client's calls end after a signal."""
        self._clients.append(client)

    def check(self) -> None:
        """Raises `Interrupted` after a signal."""
        if self._signal_number:
            self._is_noticed = True
            raise Interrupted(self._signal_number)

    def among(self, results: Iterable[T]) -> Iterator[T]:
        """The results, up to a signal.

        Raises:
            Interrupted: after a signal, in place of what the closed client raises.
        """
        each = iter(results)
        while True:
            try:
                one = next(each)
            except StopIteration:
                return
            except Exception:
                self.check()
                raise
            self.check()
            yield one

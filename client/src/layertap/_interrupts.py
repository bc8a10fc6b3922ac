"""SIGINT and SIGTERM while a file is written: the command ends between two texts, never within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The command received a signal to end."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class Interrupts:
    """A context in which the first signal raises `Interrupted`; later ones do not disturb the cleanup.

    Python runs signal handlers only in the main thread; in another thread, this does nothing.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._pending = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_held:
            self._pending = self._pending or number
        else:
            self._is_held = True
            raise Interrupted(number)

    def hold(self) -> None:
        """From now on, signals raise nothing."""
        self._is_held = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal during the body raises `Interrupted` at its end."""
        self._is_held = True
        yield
        if self._pending:
            raise Interrupted(self._pending)
        self._is_held = False

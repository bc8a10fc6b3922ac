"""Passes callbacks from gRPC's thread to the event loop, in order, with one wake-up for all pending."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class LoopBridge:
    """Callbacks that are posted on gRPC's thread and run on the event loop, in the order of their posting."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._posted: deque[Callable[[], None]] = deque()
        # Whether a wake-up is scheduled that has not run yet. Set on gRPC's thread, cleared on the loop.
        self._is_woken = False
        # Callbacks that are held back to be posted together, and the time to post them, in monotonic seconds.
        # Used on gRPC's thread only.
        self._held: list[Callable[[], None]] = []
        self._held_until_s = math.inf

    def post(self, callback: Callable[[], None]) -> None:
        """Has the event loop run the callback soon. On gRPC's thread."""
        self._posted.append(callback)
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._run_posted)

    def post_batched(self, callback: Callable[[], None], wait_s: float) -> None:
        """As `post`, but holds the callback back for `wait_s` seconds at most, to post several at once.

        On gRPC's thread, which has to call `flush_due` at the time that `due_s` says. The reason: an event
        loop that is woken for a single callback finds little of its code in the processor's caches.
        """
        if not wait_s:
            self.post(callback)
            return
        self._held.append(callback)
        self._held_until_s = min(self._held_until_s, time.monotonic() + wait_s)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def due_s(self) -> float | None:
        """When `flush_due` has to be called, in seconds since the epoch, as gRPC takes deadlines; None when
        nothing is held back."""
        return time.time() + self._held_until_s - time.monotonic() if self._held else None

    def flush_due(self) -> None:
        """Posts all held callbacks if the time of the earliest has come. On gRPC's thread."""
        if self._held and time.monotonic() >= self._held_until_s:
            held, self._held, self._held_until_s = self._held, [], math.inf
            for callback in held:
                self.post(callback)

    def _run_posted(self) -> None:
        """Runs the callbacks posted so far. On the event loop."""
        self._is_woken = False
        for _ in range(len(self._posted)):
            attempt(self._posted.popleft())


def attempt(step: Callable[..., None], *arguments: Any) -> None:
    """Runs the step and logs its exception, so that a failure in one call does not affect others."""
    try:
        step(*arguments)
    except Exception:
        logger.exception("a step of a call failed")

"""What the event loop is to hear of: told on gRPC's thread, in order, with one wake-up for all that is new."""

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


class News:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._news: deque[Callable[[], None]] = deque()
        self._is_told = False
        # What waits for company, and until when.
        self._held: list[Callable[[], None]] = []
        self._held_until_s = math.inf

    def tell(self, news: Callable[[], None]) -> None:
        """Has the loop do it, soon."""
        self._news.append(news)
        if not self._is_told:
            self._is_told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._hear)

    def tell_in_company(self, news: Callable[[], None], wait_s: float) -> None:
        """As above, together with what else comes within so many seconds; on gRPC's thread, which lets it go then.

        Told of one thing by itself, the loop wakes, and finds little of its code in the processor's caches.
        """
        if not wait_s:
            self.tell(news)
            return
        self._held.append(news)
        self._held_until_s = min(self._held_until_s, time.monotonic() + wait_s)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def due_s(self) -> float | None:
        """When the first of what waits must go, by the clock on the wall, as gRPC wants it; None when nothing waits."""
        return time.time() + self._held_until_s - time.monotonic() if self._held else None

    def let_go(self) -> None:
        """Of all that waits, once its time has come."""
        if self._held and time.monotonic() >= self._held_until_s:
            held, self._held, self._held_until_s = self._held, [], math.inf
            for news in held:
                self.tell(news)

    def _hear(self) -> None:
        """On the loop."""
        self._is_told = False
        for _ in range(len(self._news)):
            attempt(self._news.popleft())


def attempt(step: Callable[..., None], *arguments: Any) -> None:
    """One call's failure is no other's."""
    try:
        step(*arguments)
    except Exception:
        logger.exception("a step of a call failed")

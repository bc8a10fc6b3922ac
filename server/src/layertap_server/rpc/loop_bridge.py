"""Passes callbacks from gRPC's thread to the event loop, in order, with one wake-up for all pending."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from layertap_server.runs_on import on_event_loop, on_grpc_thread

logger = logging.getLogger(__name__)


class LoopBridge:
    """Callbacks that are posted on gRPC's thread and run on the event loop, in the order of their posting."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._posted: deque[Callable[[], None]] = deque()
        # Whether a wake-up is scheduled that has not run yet. Set on gRPC's thread, cleared on the loop.
        self._is_woken = False
        # Whether gRPC takes no more operations; it would end the process. Changes on the event loop, after all
        # that gRPC's thread has posted.
        self.is_closed = False

    @on_grpc_thread
    def post(self, callback: Callable[[], None]) -> None:
        """Has the event loop run the callback soon."""
        self._posted.append(callback)
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._run_posted)

    @on_event_loop
    def _run_posted(self) -> None:
        """Runs the callbacks posted so far."""
        self._is_woken = False
        for _ in range(len(self._posted)):
            attempt(self._posted.popleft())


def attempt(step: Callable[..., None], *arguments: Any) -> None:
    """Runs the step and logs its exception, so that a failure in one call does not affect others."""
    try:
        step(*arguments)
    except Exception:
        logger.exception("a callback of a call failed")

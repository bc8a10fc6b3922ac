"""Long work on the event loop, in turns: one request of a thousand inputs holds nobody else up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

T = TypeVar("T")

TURN_NS = 1_000_000


async def in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """The items; after each millisecond of work on them, everyone else on the loop has a turn."""
    begun_ns = time.monotonic_ns()
    for item in items:
        yield item
        if time.monotonic_ns() - begun_ns > TURN_NS:
            await asyncio.sleep(0)
            begun_ns = time.monotonic_ns()

"""Long work on the event loop, in turns: one request of a thousand inputs holds nobody else up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")

TURN_NS = 1_000_000
# Of what takes some ten microseconds each, so few are done at once.
FEW = 16


async def in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """The items; after each millisecond of work on them, everyone else on the loop has a turn."""
    begun_ns = time.monotonic_ns()
    for item in items:
        yield item
        if time.monotonic_ns() - begun_ns > TURN_NS:
            await asyncio.sleep(0)
            begun_ns = time.monotonic_ns()


async def map_in_turns(function: Callable[[int, S], T], items: Sequence[S]) -> list[T]:
    """What the function makes of each item and its number; where they are few, without a turn in between."""
    if len(items) <= FEW:
        return [function(i, item) for i, item in enumerate(items)]
    return [function(i, item) async for i, item in in_turns(enumerate(items))]

"""Long work on the event loop that yields to other tasks: a request of a thousand inputs delays no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")

# The longest work on items before yielding to the event loop.
SLICE_NS = 1_000_000
# As many items, at some ten microseconds each, are done without yielding.
FEW = 16


async def yield_between(items: Iterable[T]) -> AsyncIterator[T]:
    """The items; yields to the event loop after each millisecond of work on them."""
    begun_ns = time.monotonic_ns()
    for item in items:
        yield item
        if time.monotonic_ns() - begun_ns > SLICE_NS:
            await asyncio.sleep(0)
            begun_ns = time.monotonic_ns()


async def map_with_yields(function: Callable[[int, S], T], items: Sequence[S]) -> list[T]:
    """`function(index, item)` for each item; yields to the event loop in between if there are many."""
    if len(items) <= FEW:
        return [function(i, item) for i, item in enumerate(items)]
    return [function(i, item) async for i, item in yield_between(enumerate(items))]

"""Marks on which thread a method runs, where the methods of a class run on several.

A mark is for the reader and for the tests; it changes nothing about the method. `tests/test_threads.py` checks
that each method of such a class has one.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Thread(Enum):
    GRPC = "the thread that polls gRPC's completion queue"
    LOOP = "the event loop"
    ENGINE = "a thread that runs batches on an engine"
    ANY = "any thread"


def runs_on(thread: Thread) -> Callable[[F], F]:
    """Marks a method: it must be called on this thread only."""

    def mark(method: F) -> F:
        method.runs_on = thread  # type: ignore[attr-defined]
        return method

    return mark


on_grpc_thread = runs_on(Thread.GRPC)
on_event_loop = runs_on(Thread.LOOP)
on_engine_thread = runs_on(Thread.ENGINE)
on_any_thread = runs_on(Thread.ANY)

"""The memory that a stream's large results land in: used again, and never while anyone looks at it."""

from __future__ import annotations

import numpy as np
import pytest

from layertap import _landing
from layertap._landing import REUSED_BYTES, Memory

SIZE = 4 * REUSED_BYTES


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_what_nobody_refers_to_is_used_again() -> None:
    memory = Memory()
    first = address(memory.take(SIZE))
    assert address(memory.take(SIZE)) == first
    assert address(memory.take(SIZE * 3 // 4)) == first
    assert memory.take(SIZE * 3 // 4).nbytes == SIZE * 3 // 4
    assert address(memory.take(SIZE // 4)) != first, "far too large for it"


@pytest.mark.parametrize(
    "look",
    [
        lambda buffer: buffer,
        lambda buffer: np.frombuffer(buffer, np.float32).reshape(4, -1)[1:, ::2],
        memoryview,
        lambda buffer: memoryview(np.frombuffer(buffer, np.uint16))[3:7],
    ],
    ids=["itself", "a view of views", "its memory", "a slice of a view's memory"],
)
def test_what_is_still_looked_at_is_not(look) -> None:  # type: ignore[no-untyped-def]
    memory = Memory()
    held = look(memory.take(SIZE))
    other = memory.take(SIZE)
    assert not np.shares_memory(np.asarray(held), other)
    here = address(other)
    del other
    assert address(memory.take(SIZE)) == here
    del held
    kept = [memory.take(SIZE), memory.take(SIZE)]
    assert here in map(address, kept)


def test_little_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_landing, "MAX_KEPT_BYTES", 3 * SIZE)
    memory = Memory()
    held = [memory.take(SIZE) for _ in range(8)]
    assert len({address(one) for one in held}) == 8
    assert len(memory._buffers) == 3
    held.append(memory.take(8 * SIZE))
    assert len(memory._buffers) == 2, "one lands while one is read, however large"

"""The arena: memory that one process writes and others only read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from layertap_server.engine.result_memory import MIN_BLOCK_BYTES, ResultMemory
from layertap_server.link.arena import ReadableArena, WritableArena, create_arena

NUM_BYTES = 1 << 24


@pytest.fixture
def descriptor() -> Iterator[int]:
    found = create_arena(NUM_BYTES)
    yield found
    os.close(found)


def test_what_is_written_is_read_by_others_and_by_others_only_read(descriptor: int) -> None:
    arena = WritableArena(descriptor)
    other = ReadableArena(descriptor)
    memory = arena.take(100)
    assert memory is not None
    memory[:] = np.arange(100)
    offset = arena.offset_of(memory[10:])
    assert offset is not None
    seen = other.read(offset, 90)
    assert seen.tolist() == list(range(10, 100))
    memory[10] = 200
    assert seen[0] == 200
    with pytest.raises(ValueError, match="read-only"):
        seen[0] = 1
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 100)
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    for place in ((NUM_BYTES - 10, 11), (NUM_BYTES, 1), (2**40, 1)):
        with pytest.raises(ValueError, match="buffer"):
            other.read(*place)


def test_memory_that_is_given_back_is_taken_again(descriptor: int) -> None:
    arena = WritableArena(descriptor)
    taken = [arena.take(NUM_BYTES // 4) for _ in range(4)]
    assert arena.take(1) is None
    for index in (2, 0, 1):
        block = taken[index]
        assert block is not None
        arena.give_back(block)
    assert arena.take(NUM_BYTES // 4 * 3) is not None
    assert arena.num_free_bytes == 0


def test_an_array_elsewhere_has_no_place(descriptor: int) -> None:
    assert WritableArena(descriptor).offset_of(np.zeros(9)) is None


def test_results_lie_in_it_until_nothing_refers_to_them(descriptor: int) -> None:
    arena, memory = WritableArena(descriptor), ResultMemory()
    memory.use(arena, NUM_BYTES)
    lent = memory.empty((MIN_BLOCK_BYTES,), torch.float32)
    part = lent[5:9].numpy()
    place = arena.offset_of(part)
    assert place is not None
    del lent
    again = memory.empty((MIN_BLOCK_BYTES,), torch.float32).numpy()
    assert arena.offset_of(again) not in (None, place - 20)
    del part
    third = memory.empty((MIN_BLOCK_BYTES,), torch.float32).numpy()
    assert arena.offset_of(third) == place - 20
    del again, third
    memory.release()
    assert arena.num_free_bytes == NUM_BYTES


def test_what_does_not_fit_comes_from_the_heap(descriptor: int) -> None:
    arena, memory = WritableArena(descriptor), ResultMemory()
    memory.use(arena, NUM_BYTES)
    whole = memory.empty((NUM_BYTES,), torch.uint8)
    other = memory.empty((NUM_BYTES,), torch.uint8)
    assert arena.offset_of(whole.numpy()) == 0
    assert arena.offset_of(other.numpy()) is None

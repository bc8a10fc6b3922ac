"""Requests begin in groups while the event loop is busy with many of them, and only then."""

from __future__ import annotations

import asyncio

import pytest

from layertap_server import coalescing
from layertap_server.coalescing import BUSY_SHARE, GROUP_SIZE, LOOK_NS, MIN_GROUP_SIZE, WAIT_S, Coalescing

WAIT_LIMIT_S = 30
STEP_NS = 2 * LOOK_NS
# That come in one step, as many as make a group worth waiting for.
ENOUGH = int(MIN_GROUP_SIZE * STEP_NS / (WAIT_S * 1e9))


class Thread:
    """Time, and how much of it the loop's thread computes."""

    def __init__(self) -> None:
        self.now = self.used = 10**15
        self.gate = Coalescing(lambda: self.now, lambda: self.used)

    async def step(self, share: float, calls: int) -> None:
        """So many requests come within a step, the last one at its end; none of them waits long."""
        self.gate._num_come += calls - 1
        self.now += STEP_NS
        self.used += int(share * STEP_NS)
        await asyncio.wait_for(self.gate.turn(), WAIT_LIMIT_S)


@pytest.fixture
async def thread() -> Thread:
    thread = Thread()
    await thread.step(0, 1)
    return thread


@pytest.mark.parametrize(
    ("share", "calls", "is_busy"),
    [
        (BUSY_SHARE + 0.1, ENOUGH + 1, True),
        (BUSY_SHARE - 0.1, ENOUGH + 1, False),
        (BUSY_SHARE + 0.1, ENOUGH - 1, False),  # with something else than calls
    ],
)
async def test_busy_with_many_calls(thread: Thread, share: float, calls: int, is_busy: bool) -> None:
    await thread.step(share, calls)
    assert thread.gate.is_busy is is_busy


async def test_what_groups_save_does_not_end_them(thread: Thread) -> None:
    await thread.step(BUSY_SHARE + 0.1, ENOUGH + 1)
    await thread.step(BUSY_SHARE - 0.1, ENOUGH + 1)
    assert thread.gate.is_busy
    await thread.step(0.1, ENOUGH + 1)
    assert not thread.gate.is_busy


async def test_the_first_after_a_pause_begins_at_once(
    thread: Thread, monkeypatch: pytest.MonkeyPatch
) -> None:
    await thread.step(BUSY_SHARE + 0.1, ENOUGH + 1)
    monkeypatch.setattr(coalescing, "WAIT_S", 10 * WAIT_LIMIT_S)
    await thread.step(0, 1)
    assert not thread.gate.is_busy


async def test_a_full_group_begins_together(thread: Thread, monkeypatch: pytest.MonkeyPatch) -> None:
    await thread.step(BUSY_SHARE + 0.1, ENOUGH + 1)
    monkeypatch.setattr(coalescing, "WAIT_S", 10 * WAIT_LIMIT_S)
    order: list[int] = []

    async def call(number: int) -> None:
        await thread.gate.turn()
        order.append(number)

    calls = [asyncio.create_task(call(number)) for number in range(GROUP_SIZE - 1)]
    await asyncio.sleep(0)
    assert not order
    calls[3].cancel()  # its caller goes away, and takes nobody along
    last = asyncio.create_task(call(GROUP_SIZE - 1))
    await asyncio.wait_for(asyncio.wait([*calls, last]), WAIT_LIMIT_S)
    assert sorted(order) == [number for number in range(GROUP_SIZE) if number != 3]


async def test_a_group_that_does_not_fill_begins_too(thread: Thread) -> None:
    await thread.step(BUSY_SHARE + 0.1, ENOUGH + 1)
    await asyncio.wait_for(asyncio.gather(thread.gate.turn(), thread.gate.turn()), WAIT_LIMIT_S)
    assert thread.gate.is_busy

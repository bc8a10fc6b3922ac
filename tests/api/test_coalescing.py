"""Requests begin in groups while the event loop is busy with many of them, and only then."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from harness import Running, serve
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.api import coalescing
from layertap_server.api.coalescing import BUSY_SHARE, GROUP_SIZE, LOOK_NS, MIN_GROUP_SIZE, WAIT_S, Coalescing
from server.support import WAIT_S as WAIT_LIMIT_S
from server.support import eventually, streaming, texts

STEP_NS = 2 * LOOK_NS
# That come in one step, as many as make a group worth waiting for.
ENOUGH = int(MIN_GROUP_SIZE * STEP_NS / (WAIT_S * 1e9))
MANY = 2 * GROUP_SIZE


class Thread:
    """Time, and how much of it the loop's thread computes; it stands still but for steps."""

    def __init__(self) -> None:
        self.now = self.used = 10**15
        self.gate = Coalescing(lambda: self.now, lambda: self.used)

    async def step(self, share: float, calls: int, at_once: int = MANY) -> None:
        """So many requests come within a step, up to so many of them at once, and the last one at its end."""
        self.gate._num_come += calls - 1
        self.gate._most_since = at_once
        self.now += STEP_NS
        self.used += int(share * STEP_NS)
        await asyncio.wait_for(self.gate.turn(1), WAIT_LIMIT_S)


@pytest.fixture
async def thread() -> Thread:
    thread = Thread()
    await thread.step(0, 1)
    return thread


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a group that is complete begins."""
    monkeypatch.setattr(coalescing, "WAIT_S", 10 * WAIT_LIMIT_S)


@pytest.mark.parametrize(
    ("share", "calls", "at_once", "is_busy"),
    [
        (BUSY_SHARE + 0.1, ENOUGH + 1, MANY, True),
        (BUSY_SHARE - 0.1, ENOUGH + 1, MANY, False),
        (BUSY_SHARE + 0.1, ENOUGH - 1, MANY, False),  # with something else than calls
        (BUSY_SHARE + 0.1, ENOUGH + 1, MIN_GROUP_SIZE - 1, False),  # with callers that are too few
    ],
)
async def test_busy_with_many_calls(
    thread: Thread, share: float, calls: int, at_once: int, is_busy: bool
) -> None:
    await thread.step(share, calls, at_once)
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


@pytest.mark.parametrize("callers", [MIN_GROUP_SIZE, GROUP_SIZE, MANY])
async def test_a_group_is_complete_with_all_there_are_or_enough(
    thread: Thread, callers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await thread.step(BUSY_SHARE + 0.1, ENOUGH + 1, callers)
    monkeypatch.setattr(coalescing, "WAIT_S", 10 * WAIT_LIMIT_S)
    size = min(callers, GROUP_SIZE)
    begun: list[int] = []

    async def call(number: int) -> None:
        await thread.gate.turn(number + 1)
        begun.append(number)

    calls = [asyncio.create_task(call(number)) for number in range(size - 1)]
    await asyncio.sleep(0)
    assert not begun
    calls[1].cancel()  # its caller goes away, and takes nobody along
    last = asyncio.create_task(call(size - 1))
    await asyncio.wait_for(asyncio.wait([*calls, last]), WAIT_LIMIT_S)
    assert sorted(begun) == [number for number in range(size) if number != 1]


async def test_a_group_that_does_not_fill_begins_too(thread: Thread) -> None:
    await thread.step(BUSY_SHARE + 0.1, ENOUGH + 1)
    await asyncio.wait_for(asyncio.gather(thread.gate.turn(1), thread.gate.turn(2)), WAIT_LIMIT_S)
    assert thread.gate.is_busy


# ------------------------------------------------------------------------------- in the server


def hold(running: Running, callers: int) -> None:
    """As if the loop were busy with so many callers, from now on."""
    running.server.service.answering._coalescing = Coalescing(
        lambda: 0, lambda: 0, is_busy=True, _most_before=callers
    )


@pytest.mark.usefixtures("patient")
def test_calls_and_streamed_requests_begin_together(folders: dict[str, Path]) -> None:
    with (
        serve({"bert": folders["bert"]}) as running,
        grpc.insecure_channel(running.address) as channel,
        streaming(EncoderServiceStub(channel)) as stream,
    ):
        stub, answering = EncoderServiceStub(channel), running.server.service.answering
        hold(running, 4)
        stream.send(1, texts("streamed"))
        calls = [stub.Encode.future(texts("a call"), timeout=WAIT_LIMIT_S) for _ in range(2)]
        eventually(running, lambda: answering.num_in_flight == 3)
        assert not any(call.done() for call in calls)
        timing = stub.Encode(texts("the last"), timeout=WAIT_LIMIT_S).timing
        assert all(call.result().timing.queue_ns > timing.queue_ns for call in calls), "their wait is told"
        stream.half_close()
        assert [frame.end.status.code for frame in stream if frame.HasField("end")] == [0]


@pytest.mark.usefixtures("patient")
def test_what_waits_for_its_group_is_under_way(folders: dict[str, Path]) -> None:
    """Told to stop, the server answers it."""
    with serve({"bert": folders["bert"]}) as running, grpc.insecure_channel(running.address) as channel:
        answering = running.server.service.answering
        hold(running, 4)
        call = EncoderServiceStub(channel).Encode.future(texts("waits"), timeout=WAIT_LIMIT_S)
        eventually(running, lambda: answering.num_in_flight == 1)
        assert not running.server.service._all_over.is_set()
        running.call(answering._coalescing._begin_group)
        assert call.result().results
        eventually(running, running.server.service._all_over.is_set)

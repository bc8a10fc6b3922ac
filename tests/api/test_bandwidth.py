"""Large frames rest while calls are answered, and only then."""

from __future__ import annotations

import asyncio

import pytest

from layertap_server.api.bandwidth import (
    FRAME_BYTES_BESIDE_CALLS,
    LARGE_FRAME_BYTES,
    RECENT_S,
    BandwidthLimiter,
)
from layertap_server.api.streaming import FrameQueue, Reply

FRAME = 1 << 20
REST_S = FRAME / 1e6


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_alone_nothing_rests(clock: Clock) -> None:
    bandwidth = BandwidthLimiter(10**6, clock)
    assert bandwidth.rest_s(FRAME) == 0
    bandwidth.note_call()
    clock.now += RECENT_S * 1.01
    assert bandwidth.rest_s(FRAME) == 0


def test_beside_calls_all_streams_share_the_rate(clock: Clock) -> None:
    bandwidth = BandwidthLimiter(10**6, clock)
    bandwidth.note_call()
    assert bandwidth.rest_s(LARGE_FRAME_BYTES - 1) == 0, "as small as a call"
    assert bandwidth.rest_s(FRAME) == pytest.approx(REST_S)
    assert bandwidth.rest_s(FRAME) == pytest.approx(2 * REST_S), "another stream's frame comes after it"
    clock.now += 2 * REST_S
    bandwidth.note_call()
    assert bandwidth.rest_s(FRAME) == pytest.approx(REST_S)
    clock.now += 100
    bandwidth.note_call()
    assert bandwidth.rest_s(FRAME) == pytest.approx(REST_S), "what was not used is not made up for"


def test_without_a_bound(clock: Clock) -> None:
    bandwidth = BandwidthLimiter(0, clock)
    bandwidth.note_call()
    assert bandwidth.rest_s(FRAME) == 0


def test_frames_are_smaller_beside_calls(clock: Clock) -> None:
    bandwidth = BandwidthLimiter(10**6, clock)
    assert bandwidth.frame_bytes(FRAME) == FRAME
    bandwidth.note_call()
    assert bandwidth.frame_bytes(FRAME) == FRAME_BYTES_BESIDE_CALLS
    assert bandwidth.frame_bytes(4096) == 4096
    clock.now += RECENT_S * 1.01
    assert bandwidth.frame_bytes(FRAME) == FRAME
    unbounded = BandwidthLimiter(0, clock)
    unbounded.note_call()
    assert unbounded.frame_bytes(FRAME) == FRAME


async def test_small_replies_pass_a_large_one_that_rests() -> None:
    bandwidth = BandwidthLimiter(1)  # one frame in eleven days
    bandwidth.note_call()
    queue, done = FrameQueue(bandwidth), []
    large, small = bytes(FRAME), b"small"
    queue.add(Reply(iter([large, large]), lambda: done.append("large")))
    queue.add(Reply(iter([small, small]), lambda: done.append("small")))
    frames = queue.__aiter__()
    assert [await anext(frames) for _ in range(3)] == [large, small, small]
    waiting = asyncio.ensure_future(anext(frames))
    await asyncio.sleep(0)
    assert done == ["small"]
    queue.add(Reply(iter([small]), lambda: done.append("late")))
    assert await waiting == small
    queue.close()
    assert done == ["small", "late", "large"]


async def test_what_rests_is_written_before_the_stream_ends() -> None:
    bandwidth = BandwidthLimiter(1 << 40)
    bandwidth.note_call()
    queue, done = FrameQueue(bandwidth), []
    queue.add(Reply(iter([bytes(FRAME)] * 3), lambda: done.append("large")))
    queue.end()
    assert [len(frame) async for frame in queue] == [FRAME] * 3
    assert done == ["large"]

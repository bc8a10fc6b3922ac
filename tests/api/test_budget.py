"""Bytes of results: the server's budget, each stream's share of it, and long work in turns."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from harness import Running
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.api import cooperative as turns
from layertap_server.api.budget import ByteBudget, StreamBudget
from layertap_server.api.cooperative import SLICE_NS, yield_between
from server.support import WAIT_S, array, assemble, eventually, large, streaming, texts


async def settle() -> None:
    """Lets every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_the_server_s_budget() -> None:
    budget = ByteBudget(100)
    assert budget.reserve(60)
    assert not budget.reserve(41)
    assert budget.reserve(40)
    budget.release(100)
    assert budget.reserve(101), "alone, whatever its size"
    assert not budget.reserve(1)


async def test_a_stream_waits_for_its_share() -> None:
    server = ByteBudget(400)
    stream, other = StreamBudget(server, 100), StreamBudget(server, 100)
    assert await stream.reserve(60)
    waiting = [asyncio.create_task(stream.reserve(num_bytes)) for num_bytes in (50, 10, 100)]
    await settle()
    assert not any(task.done() for task in waiting), "in their order: the small one does not overtake"
    assert await other.reserve(60), "a share each"
    assert server.reserved_bytes == 120
    stream.release(60)
    await settle()
    assert [task.done() for task in waiting] == [True, True, False]
    stream.release(50)
    await settle()
    assert not waiting[2].done()
    stream.release(10)
    assert await asyncio.wait_for(waiting[2], WAIT_S)
    assert (stream.reserved_bytes, server.reserved_bytes) == (100, 160)


async def test_what_is_larger_than_the_share_waits_until_it_is_alone() -> None:
    stream = StreamBudget(ByteBudget(400), 100)
    assert await stream.reserve(1)
    large_one = asyncio.create_task(stream.reserve(300))
    await settle()
    assert not large_one.done()
    stream.release(1)
    assert await asyncio.wait_for(large_one, WAIT_S)


async def test_a_full_server_refuses_what_the_share_allows() -> None:
    server = ByteBudget(400)
    assert server.reserve(350)
    assert not await StreamBudget(server, 100).reserve(60)
    assert server.reserved_bytes == 350


async def test_who_stops_waiting_leaves_no_trace() -> None:
    server = ByteBudget(400)
    stream = StreamBudget(server, 100)
    assert await stream.reserve(100)
    leaving, staying = (asyncio.create_task(stream.reserve(10)) for _ in range(2))
    await settle()
    leaving.cancel()
    stream.release(100)
    assert await asyncio.wait_for(staying, WAIT_S)
    assert leaving.cancelled()
    assert stream.reserved_bytes == server.reserved_bytes == 10


@pytest.mark.usefixtures("unharmed")
def test_a_stream_of_more_than_its_share_is_answered_as_it_reads(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that does not read takes its share, not the server's whole budget."""
    service = server.server.service
    budget = service.budget
    num_requests, num_bytes = 12, 1000 * 64 * 128
    small = replace(service.config, max_stream_result_bytes=2 * (num_bytes + 1000))
    monkeypatch.setattr(service, "config", small)
    with streaming(stub) as stream:
        for request_id in range(num_requests):
            stream.send(request_id, large(1000))
        frames = [next(iter(stream))]
        eventually(server, lambda: budget.reserved_bytes > 2 * num_bytes)
        assert budget.reserved_bytes < 3 * num_bytes
        assert stub.Encode(large(100), timeout=WAIT_S).results
        stream.half_close()
        frames.extend(stream)
    replies = assemble(frames)
    assert {reply.status.code for reply in replies.values()} == {0}
    assert len(replies) == num_requests
    assert all(len(reply.results[0].hidden_states.data) == num_bytes for reply in replies.values())


async def test_long_work_gives_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic_ns=lambda: now))
    happened: list[str] = []

    async def work() -> None:
        nonlocal now
        async for item in yield_between(range(6)):
            now += SLICE_NS // 2 + 1
            happened.append(f"work {item}")

    async def other() -> None:
        for number in range(3):
            happened.append(f"other {number}")
            await asyncio.sleep(0)

    await asyncio.gather(work(), other())
    assert happened == [
        *("work 0", "work 1", "other 0", "work 2", "work 3", "other 1", "work 4", "work 5", "other 2")
    ]


@pytest.mark.usefixtures("unharmed")
def test_a_wide_request_is_answered_in_order(stub: EncoderServiceStub) -> None:
    """300 inputs: long enough to be resolved and written in several turns."""
    contents = ["the " * (i % 60) for i in range(300)]
    outputs = pb.OutputSelection(embeddings=[pb.EmbeddingSpec()], tokens=True)
    answer = stub.Encode(texts(*contents, outputs=outputs), timeout=WAIT_S)
    assert [result.token_count for result in answer.results] == [2 + i % 60 for i in range(300)]
    for i in range(60, 300):
        same, earlier = array(answer.results[i].embeddings[0]), array(answer.results[i - 60].embeddings[0])
        assert abs(same - earlier).max() < 2e-5

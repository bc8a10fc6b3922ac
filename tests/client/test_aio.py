"""The asyncio client: the same answers and errors as the other."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

import layertap
from layertap import AsyncClient, Client, Embedding, _aio_streams
from layertap._unary import MAX_UNARY_INPUTS

from . import fake_server
from .fake_server import FakeEncoder, token_ids


async def test_encode(async_client: AsyncClient, client: Client) -> None:
    options = {"last_hidden_state": True, "attentions": [0], "embeddings": Embedding(encoding="binary")}
    expected = client.encode(["a", "bc"], **options)
    for one, other in zip(expected, await async_client.encode(["a", "bc"], **options), strict=True):
        assert list(one.arrays()) == list(other.arrays())
        for name, array in one.arrays().items():
            np.testing.assert_array_equal(array, other.arrays()[name])
    single = await async_client.encode("bc", **options)
    np.testing.assert_array_equal(single.last_hidden_state, expected[1].last_hidden_state)
    assert await async_client.encode([], **options) == []


async def test_encode_of_any_size(async_client: AsyncClient, fake: FakeEncoder) -> None:
    fake.max_message_bytes, fake.max_inputs = 400, 20
    for count in (10, 30, MAX_UNARY_INPUTS + 1):
        inputs = [str(number) for number in range(count)]
        results = await async_client.encode(inputs, last_hidden_state=True)
        for text, result in zip(inputs, results, strict=True):
            expected = fake_server.hidden_states(token_ids(text))[-1]
            np.testing.assert_array_equal(result.last_hidden_state, expected)
    assert [rpc for rpc, _ in fake.calls].count("GetModel") == 1


async def test_stream(async_client: AsyncClient, fake: FakeEncoder) -> None:
    fake.frame_bytes = 13
    inputs = ["slow", *map(str, range(50))]

    async def source() -> AsyncIterator[str]:
        for text in inputs:
            await asyncio.sleep(0)
            yield text

    indices = []
    async for index, result in async_client.stream(source(), last_hidden_state=True, ordered=True):
        expected = fake_server.hidden_states(token_ids(inputs[index]))[-1]
        np.testing.assert_array_equal(result.last_hidden_state, expected)
        indices.append(index)
    assert indices == list(range(51))
    completed = [index async for index, _ in async_client.stream(inputs[:20], tokens=True, ordered=False)]
    assert completed[-1] == 0
    assert [pair async for pair in async_client.stream([], tokens=True)] == []


async def test_an_iterable_that_waits_for_results(async_client: AsyncClient) -> None:
    """Each next input depends on the result before it."""
    asked: asyncio.Queue[str] = asyncio.Queue()

    async def inputs() -> AsyncIterator[str]:
        for _ in range(20):
            yield await asked.get()

    asked.put_nowait("text 0")
    num_got = 0
    async for index, _ in async_client.stream(inputs(), last_hidden_state=True):
        assert index == num_got
        num_got += 1
        asked.put_nowait(f"text {num_got}")
    assert num_got == 20


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("slow_s", [-1.0, 0.0, 0.01])
async def test_slow_iterables_of_any_length(
    async_client: AsyncClient, monkeypatch: pytest.MonkeyPatch, slow_s: float, is_plain: bool
) -> None:
    monkeypatch.setattr(_aio_streams, "SLOW_S", slow_s)

    async def given(texts: list[str]) -> AsyncIterator[str]:
        for text in texts:
            await asyncio.sleep(0)
            yield text

    for count in (0, 1, 3, 16, 200):
        texts = [f"text {number}" for number in range(count)]
        inputs = iter(texts) if is_plain else given(texts)
        stream = async_client.stream(inputs, last_hidden_state=True)
        got = [(index, result.last_hidden_state) async for index, result in stream]
        assert [index for index, _ in got] == list(range(count))
        for text, (_, rows) in zip(texts, got, strict=True):
            np.testing.assert_array_equal(rows, fake_server.hidden_states(token_ids(text))[-1])


async def test_an_async_iterable_that_fails_later(async_client: AsyncClient) -> None:
    async def inputs() -> AsyncIterator[str]:
        yield "a"
        await asyncio.sleep(0.05)  # longer than it takes to be called slow
        raise KeyError("mine")

    stream = async_client.stream(inputs(), last_hidden_state=True)
    assert (await anext(stream))[0] == 0
    with pytest.raises(KeyError, match="mine"):
        await anext(stream)


async def test_leaving_a_stream_ends_its_async_iterable(async_client: AsyncClient) -> None:
    ended = asyncio.Event()

    async def inputs() -> AsyncIterator[str]:
        try:
            yield "a"
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with aclosing(async_client.stream(inputs(), last_hidden_state=True)) as stream:
        async for _ in stream:
            break
    await asyncio.wait_for(ended.wait(), 60)


async def test_leaving_a_stream_cancels(async_client: AsyncClient, fake: FakeEncoder) -> None:
    async with aclosing(async_client.stream(map(str, itertools.count()), tokens=True)) as results:
        async for index, _ in results:
            assert index == 0
            break
    assert await asyncio.to_thread(fake.stream_over.wait, 10)


async def test_cancelling_a_task_cancels_its_call(async_client: AsyncClient, fake: FakeEncoder) -> None:
    async def read() -> None:
        async for _ in async_client.stream(["a", "hang"], tokens=True):
            reading.set()

    reading = asyncio.Event()
    task = asyncio.create_task(read())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(fake.stream_over.wait, 10)


async def test_errors(async_client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layertap._pipeline.MAX_BUSY_S", 0.0)
    with pytest.raises(layertap.InvalidArgument) as caught:
        await async_client.encode("poison", tokens=True)
    assert caught.value.violations == (("inputs[0].text", "is poison"),)
    with pytest.raises(layertap.ResourceExhausted) as caught:
        _ = [pair async for pair in async_client.stream(["busy"], tokens=True)]
    assert caught.value.retry_after_s == 1.5
    with pytest.raises(layertap.DeadlineExceeded):
        await async_client.encode("hang", tokens=True, timeout=0.2)
    with pytest.raises(layertap.DeadlineExceeded):
        _ = [pair async for pair in async_client.stream(["hang"], tokens=True, timeout=0.2)]
    with pytest.raises(ValueError, match="dtype='float64'"):
        await async_client.encode("a", dtype="float64")


async def test_a_busy_server_is_asked_again(async_client: AsyncClient, fake: FakeEncoder) -> None:
    fake.num_busy = 7
    got = [index async for index, _ in async_client.stream(map(str, range(40)), tokens=True)]
    assert got == list(range(40))
    assert fake.num_busy == 0


async def test_unavailable_is_tried_again(async_client: AsyncClient, fake: FakeEncoder) -> None:
    fake.num_unavailable = 2
    assert (await async_client.encode("a", tokens=True)).token_count == 3


async def test_tokens_and_models(async_client: AsyncClient, client: Client) -> None:
    tokens = await async_client.tokenize("ab")
    assert tokens.tokens == ("[CLS]", "t107", "t108", "[SEP]")
    assert [len(one) for one in await async_client.tokenize(["a", "bcd"])] == [3, 5]
    assert await async_client.models() == client.models()
    assert await async_client.model("plain") == client.model("plain")


def test_a_client_may_be_made_outside_a_loop(address: str) -> None:
    client = AsyncClient(address)

    async def use() -> int:
        async with client:
            return (await client.encode("a", tokens=True)).token_count

    assert asyncio.run(use()) == 3
    asyncio.run(AsyncClient(address).close())


async def test_a_second_event_loop_is_told(address: str) -> None:
    client = AsyncClient(address)

    async def in_another_loop(use: Callable[[], Any]) -> str:
        def run() -> str:
            async def call() -> None:
                await use()

            with pytest.raises(RuntimeError) as caught:
                asyncio.run(call())
            return str(caught.value)

        return await asyncio.to_thread(run)

    assert (await client.encode("a", tokens=True)).token_count == 3
    uses: list[Callable[[], Any]] = [
        lambda: client.encode("a", tokens=True),
        lambda: anext(aiter(client.stream(["a"], tokens=True))),
        lambda: client.tokenize("a"),
        client.models,
        client.model,
        client.close,
    ]
    for use in uses:
        text = await in_another_loop(use)
        assert text.startswith("this AsyncClient belongs to another event loop")
        assert "make one for each loop" in text
    assert (await client.encode("a", tokens=True)).token_count == 3
    await client.close()
    await client.close()
    with pytest.raises(RuntimeError, match="this AsyncClient is closed"):
        await client.models()

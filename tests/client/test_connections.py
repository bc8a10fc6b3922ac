"""Which connection a call goes to, and what the calls of one stream on several connections give."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any

import grpc
import pytest

import layertap
from layertap import AsyncClient, Client, _connections, _transport
from layertap._connections import ASK_S, BUSY_CALLS, Connections
from layertap._pipeline import MAX_GROUP_INPUTS, MAX_INPUTS_IN_FLIGHT
from layertap.v1 import encoder_pb2 as pb

from .fake_server import FakeEncoder, serving
from .test_stream import assert_right, texts

WAIT_S = 30.0


class HoldingEncoder(FakeEncoder):
    """Answers no Encode before `go` is set, or a call has ended without its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Semaphore(0)
        self.go = threading.Event()
        self.ended = threading.Semaphore(0)

    def Encode(self, request: pb.EncodeRequest, context: Any) -> pb.EncodeResponse:
        self.peers.append(("held", context.peer()))
        go = self.go
        context.add_callback(go.set)
        self.arrived.release()
        go.wait(WAIT_S)
        return super().Encode(request, context)

    def EncodeStream(
        self, requests: Iterator[pb.EncodeStreamRequest], context: Any
    ) -> Iterator[pb.EncodeStreamResponse]:
        context.add_callback(self.ended.release)
        yield from super().EncodeStream(requests, context)

    def hold(self) -> None:
        """From now on, calls wait. `go` is a new event, as calls of before may end only now."""
        self.go = threading.Event()
        self.peers.clear()

    def wait_for(self, num_calls: int) -> None:
        for _ in range(num_calls):
            assert self.arrived.acquire(timeout=WAIT_S)

    def peers_of(self, rpc: str) -> Counter[str]:
        return Counter(peer for name, peer in self.peers if name == rpc)


@pytest.fixture
def fake() -> HoldingEncoder:
    return HoldingEncoder()


@pytest.fixture
def address(fake: HoldingEncoder) -> Iterator[str]:
    with serving(fake, num_threads=64) as address:
        yield address
        fake.go.set()


@contextmanager
def held(client: Client, num_calls: int, fakes: Iterable[HoldingEncoder]) -> Iterator[list[Future[Any]]]:
    """Calls that wait in the servers. At the end, they are answered."""
    with ThreadPoolExecutor(num_calls) as pool:
        try:
            yield [pool.submit(client.encode, "a", tokens=True) for _ in range(num_calls)]
        finally:
            for fake in fakes:
                fake.go.set()


def spread(client: Client, fake: HoldingEncoder, num_calls: int) -> list[int]:
    """The number of calls on each connection, of this many at the same time."""
    fake.hold()
    with held(client, num_calls, [fake]) as calls:
        fake.wait_for(num_calls)
        counts = sorted(fake.peers_of("held").values())
    assert {call.result().token_count for call in calls} == {3}
    return counts


def open_two(client: Client | AsyncClient) -> None:
    connections = client._calls.connections
    for connection in [connections.take() for _ in range(BUSY_CALLS + 1)]:
        connections.release(connection)
    assert len(connections._open) == 2


def is_at_rest(client: Client | AsyncClient) -> bool:
    return not any(connection.num_calls for connection in client._calls.connections._open)


# ---------------------------------------------------------------------------------------------- the choice


def connections(at_most: int | None, ask: Callable[..., Any] = lambda *_: None) -> Connections:
    return Connections("Client", lambda: grpc.insecure_channel("127.0.0.1:1"), at_most, ask)


def test_the_connection_with_the_fewest_calls_is_taken() -> None:
    chooser = connections(4)
    taken = [chooser.take() for _ in range(BUSY_CALLS)]
    assert len(set(taken)) == 1
    taken += [chooser.take() for _ in range(3 * BUSY_CALLS + 10)]
    assert len(set(taken)) == 4
    rng = random.Random(0)
    for _ in range(1000):
        if rng.random() < 0.5 and taken:
            chooser.release(taken.pop(rng.randrange(len(taken))))
        else:
            least = min(one.num_calls for one in chooser._open)
            first = next(one for one in chooser._open if one.num_calls == least)
            taken.append(chooser.take())
            assert taken[-1] is first
    assert len(chooser._open) == 4
    chooser.close()


def test_another_is_taken_for_a_call_that_failed() -> None:
    chooser = connections(2)
    first = chooser.take()
    assert chooser.take(without=[first]) is not first
    second = chooser._open[1]
    chooser.take()
    assert first.num_calls == 2
    # There is no third one.
    assert chooser.take(without=[first, second]) in (first, second)
    chooser.close()


def test_the_server_is_asked_once_and_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(_connections.time, "monotonic", lambda: now_s)
    asked: list[Any] = []
    chooser = connections(None, lambda *arguments: asked.append(arguments))
    taken = [chooser.take() for _ in range(BUSY_CALLS)]
    assert asked == []
    taken += [chooser.take() for _ in range(100)]
    assert asked == [(chooser, taken[0])]
    now_s += ASK_S + 1  # no answer came
    taken.append(chooser.take())
    assert len(asked) == 2
    assert len(set(taken)) == 1
    chooser.learn([pb.Model(connections=2), pb.Model(connections=3)])
    taken += [chooser.take() for _ in range(100)]
    assert len(set(taken)) == 3
    chooser.learn([pb.Model(connections=100)])
    taken += [chooser.take() for _ in range(200)]
    assert len(set(taken)) == _connections.MAX_ADVISED
    now_s += ASK_S + 1
    chooser.take()
    assert len(asked) == 2
    chooser.close()


@pytest.mark.parametrize("models", [[], [pb.Model()], [pb.Model(connections=1)]])
def test_a_server_that_advises_one_or_nothing_is_not_asked_again(models: list[pb.Model]) -> None:
    asked: list[Any] = []
    chooser = connections(None, lambda *arguments: asked.append(arguments))
    chooser.learn(models)
    assert len({chooser.take() for _ in range(100)}) == 1
    assert asked == []
    chooser.close()


def test_a_given_number_is_kept_whatever_the_server_advises() -> None:
    chooser = connections(12, lambda *_: pytest.fail("asked"))
    chooser.learn([pb.Model(connections=2)])
    assert len({chooser.take() for _ in range(20 * BUSY_CALLS)}) == 12
    chooser.close()


def test_a_closed_client_opens_no_connection() -> None:
    chooser = connections(2)
    chooser.take()
    assert len(chooser.close()) == 1
    with pytest.raises(RuntimeError, match="this Client is closed: make another"):
        chooser.take()
    assert chooser.close() == []


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (True, TypeError), ("2", TypeError), (1.5, TypeError)],
)
def test_a_wrong_number(kind: Any, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^connections={value!r}: give a whole number"):
        kind(connections=value)


# ------------------------------------------------------------------------------------------------ Client


def test_one_call_after_another_uses_one_connection(address: str, fake: HoldingEncoder) -> None:
    fake.go.set()
    with Client(address, connections=4) as client:
        for _ in range(20):
            client.encode("a", tokens=True)
        list(client.stream(["a"] * 10, tokens=True))
        client.models()
        assert is_at_rest(client)
    assert len({peer for _, peer in fake.peers}) == 1


def test_calls_at_the_same_time_use_several(address: str, fake: HoldingEncoder) -> None:
    with Client(address, connections=4) as client:
        assert spread(client, fake, 16) == [16]
        assert spread(client, fake, 40) == [8, 16, 16]
        assert spread(client, fake, 40) == [13, 13, 14]
        assert is_at_rest(client)
    with Client(address, connections=1) as client:
        assert spread(client, fake, 40) == [40]


def test_the_servers_advice(address: str, fake: HoldingEncoder) -> None:
    fake.connections = 2
    with Client(address) as client:
        assert client.model().connections == 2
        assert spread(client, fake, 40) == [20, 20]
        assert "ListModels" not in dict(fake.calls)


@pytest.mark.parametrize("advised", [0, 3])
def test_the_advice_is_asked_for(
    address: str, fake: HoldingEncoder, advised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.connections = advised
    learned = threading.Event()
    learn = Connections.learn

    def learn_and_tell(self: Connections, models: Iterable[pb.Model]) -> None:
        learn(self, models)
        learned.set()

    monkeypatch.setattr(Connections, "learn", learn_and_tell)
    with Client(address) as client:
        assert spread(client, fake, 16) == [16]
        assert "ListModels" not in dict(fake.calls)
        assert spread(client, fake, 17) == [17]
        assert learned.wait(WAIT_S)
        assert spread(client, fake, 40) == ([8, 16, 16] if advised else [40])
    assert [rpc for rpc, _ in fake.calls].count("ListModels") == 1


@pytest.fixture
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads(_transport._SERVICE_CONFIG)
    config["methodConfig"][0]["retryPolicy"] |= {"initialBackoff": "0.01s", "maxBackoff": "0.01s"}
    monkeypatch.setattr(_transport, "_SERVICE_CONFIG", json.dumps(config))


@pytest.mark.usefixtures("short_backoff")
async def test_a_call_whose_connection_is_lost_goes_to_another(address: str, fake: HoldingEncoder) -> None:
    fake.go.set()
    with Client(address, connections=2) as client:
        fake.num_unavailable = 4
        with pytest.raises(layertap.Unavailable):
            client.encode("a", tokens=True)
        open_two(client)
        fake.peers.clear()
        fake.num_unavailable = 4
        assert client.encode("a", tokens=True).token_count == 3
        assert [count for _, count in fake.peers_of("Encode").most_common()] == [4, 1]
        fake.num_unavailable = 8
        with pytest.raises(layertap.Unavailable):
            client.encode("a", tokens=True)
        # The server itself says that no further attempt helps.
        fake.num_unavailable, fake.pushback_ms = 1, -1
        with pytest.raises(layertap.Unavailable):
            client.encode("a", tokens=True)
        assert client.encode("a", tokens=True).token_count == 3
        assert is_at_rest(client)
    async with AsyncClient(address, connections=2) as async_client:
        open_two(async_client)
        fake.peers.clear()
        fake.num_unavailable, fake.pushback_ms = 4, None
        assert (await async_client.encode("a", tokens=True)).token_count == 3
        assert [count for _, count in fake.peers_of("Encode").most_common()] == [4, 1]
        assert is_at_rest(async_client)


def test_one_of_two_servers_on_a_port_stops() -> None:
    fakes = [HoldingEncoder(), HoldingEncoder()]
    fakes[1].arrived = fakes[0].arrived
    num_calls = BUSY_CALLS + 1
    with ExitStack() as stack:
        servers = [stack.enter_context(ExitStack()) for _ in fakes]
        address = servers[0].enter_context(serving(fakes[0], num_threads=64))
        servers[1].enter_context(serving(fakes[1], address, num_threads=64))
        for _ in range(100):  # until the kernel gives one connection to each server
            for fake in fakes:
                fake.hold()
            client = stack.enter_context(Client(address, connections=2))
            with held(client, num_calls, fakes) as calls:
                fakes[0].wait_for(num_calls)
                counts = [len(fake.peers) for fake in fakes]
                if all(counts):
                    stopped = counts.index(BUSY_CALLS)
                    servers[stopped].close()
                    # All calls are in the other server now.
                    fakes[0].wait_for(BUSY_CALLS)
            if all(counts):
                break
        assert sorted(counts) == [1, BUSY_CALLS]
        assert {call.result().token_count for call in calls} == {3}
        assert fakes[stopped].peers_of("held").total() == BUSY_CALLS
        assert fakes[1 - stopped].peers_of("held").total() == num_calls
        assert {client.encode("a", tokens=True).token_count for _ in range(50)} == {3}
        assert is_at_rest(client)


# ---------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("sends_whole", [False, True])
def test_a_long_stream_uses_every_connection(address: str, fake: HoldingEncoder, sends_whole: bool) -> None:
    fake.connections, fake.sends_whole = 4, sends_whole
    inputs = ["slow", *texts(600)]
    with Client(address) as client:
        got = list(client.stream(inputs, last_hidden_state=True))
        assert [index for index, _ in got] == list(range(601))
        for text, (_, result) in zip(inputs, got, strict=True):
            assert_right(text, result)
        assert len(fake.peers_of("EncodeStream")) == 4
        assert is_at_rest(client)
        completed = dict(client.stream(inputs, last_hidden_state=True, ordered=False))
        assert sorted(completed) == list(range(601))
        for index, result in completed.items():
            assert_right(inputs[index], result)
        for text, result in zip(inputs, client.encode(inputs, last_hidden_state=True), strict=True):
            assert_right(text, result)
        assert set(fake.peers_of("EncodeStream").values()) == {3}
        assert is_at_rest(client)


def test_a_short_stream_uses_one_connection(address: str, fake: HoldingEncoder) -> None:
    with Client(address, connections=4) as client:
        for _ in range(5):
            assert len(list(client.stream(texts(MAX_GROUP_INPUTS), tokens=True))) == MAX_GROUP_INPUTS
    assert list(fake.peers_of("EncodeStream").values()) == [5]


def test_a_slow_reader_of_several_calls_holds_little(address: str, fake: HoldingEncoder) -> None:
    num_read = 0

    def source() -> Iterator[str]:
        nonlocal num_read
        while True:
            num_read += 1
            yield str(num_read)

    with Client(address, connections=4) as client:
        results = client.stream(source(), tokens=True)
        for index, _ in itertools.islice(results, 600):
            assert num_read - index <= MAX_INPUTS_IN_FLIGHT + MAX_GROUP_INPUTS
        assert len(fake.peers_of("EncodeStream")) == 4
        results.close()
        for _ in range(4):
            assert fake.ended.acquire(timeout=WAIT_S)
        assert is_at_rest(client)


def test_errors_of_a_stream_on_several_connections(address: str, fake: HoldingEncoder) -> None:
    inputs = texts(400)
    inputs[100] = inputs[333] = "poison"
    with Client(address, connections=4) as client:
        got = list(client.stream(inputs, tokens=True, on_error="return"))
        assert [index for index, _ in got] == list(range(400))
        failed = {index: outcome for index, outcome in got if isinstance(outcome, layertap.LayertapError)}
        assert list(failed) == [100, 333]
        assert [error.input_index for error in failed.values()] == [100, 333]
        before: dict[int, Any] = {}
        with pytest.raises(layertap.InvalidArgument, match=r"inputs\[100\].text: is poison"):
            before.update(client.stream(inputs, tokens=True))
        assert list(before) == list(range(100))
        assert len(fake.peers_of("EncodeStream")) == 4
        assert is_at_rest(client)


def test_a_server_from_before_fail_each_alone(address: str, fake: HoldingEncoder) -> None:
    fake.knows_fail_each_alone = False
    inputs = texts(200)
    inputs[150] = "poison"
    with Client(address, connections=4) as client:
        got = dict(client.stream(inputs, tokens=True, on_error="return", ordered=False))
        assert [index for index in got if isinstance(got[index], layertap.LayertapError)] == [150]
        assert len(got) == 200


def test_a_busy_server_gets_the_requests_again(address: str, fake: HoldingEncoder) -> None:
    fake.num_busy = 7
    with Client(address, connections=4) as client:
        assert [index for index, _ in client.stream(texts(300), tokens=True)] == list(range(300))
    assert fake.num_busy == 0


async def test_a_call_that_is_lost_ends_the_stream(address: str, fake: HoldingEncoder) -> None:
    fake.lose_connection_at = "lost"
    inputs = [*texts(300), "lost", *texts(300)]
    with Client(address, connections=4) as client:
        with pytest.raises(layertap.Unavailable, match=f"{address}: the connection is lost"):
            list(client.stream(inputs, tokens=True))
        assert is_at_rest(client)
        for _ in range(len(fake.peers_of("EncodeStream"))):
            assert fake.ended.acquire(timeout=WAIT_S)
    async with AsyncClient(address, connections=4) as async_client:
        with pytest.raises(layertap.Unavailable, match=f"{address}: the connection is lost"):
            _ = [pair async for pair in async_client.stream(inputs, tokens=True)]
        assert is_at_rest(async_client)


async def test_a_timeout_of_a_stream_on_several_connections(address: str) -> None:
    inputs = [*texts(300), "hang"]
    with Client(address, connections=4) as client, pytest.raises(layertap.DeadlineExceeded, match=r"0\.5 s"):
        list(client.stream(inputs, tokens=True, timeout=0.5))
    async with AsyncClient(address, connections=4) as async_client:
        with pytest.raises(layertap.DeadlineExceeded, match=r"0\.5 s"):
            _ = [pair async for pair in async_client.stream(inputs, tokens=True, timeout=0.5)]


def test_closing_the_client_ends_a_stream_on_several_connections(address: str, fake: HoldingEncoder) -> None:
    client = Client(address, connections=4)
    results = client.stream([*texts(300), "hang"], tokens=True)
    for index, _ in results:
        if index == 280:
            break
    client.close()
    with pytest.raises(layertap.Cancelled):
        list(results)
    for _ in range(4):
        assert fake.ended.acquire(timeout=WAIT_S)


# -------------------------------------------------------------------------------------------- AsyncClient


async def async_spread(client: AsyncClient, fake: HoldingEncoder, num_calls: int) -> list[int]:
    fake.hold()
    calls = [asyncio.ensure_future(client.encode("a", tokens=True)) for _ in range(num_calls)]
    await asyncio.to_thread(fake.wait_for, num_calls)
    counts = sorted(fake.peers_of("held").values())
    fake.go.set()
    assert {result.token_count for result in await asyncio.gather(*calls)} == {3}
    return counts


async def test_the_async_client_spreads_its_calls(address: str, fake: HoldingEncoder) -> None:
    async with AsyncClient(address, connections=4) as client:
        for _ in range(20):
            await client.models()
        assert len({peer for _, peer in fake.peers}) == 1
        assert await async_spread(client, fake, 40) == [8, 16, 16]
        assert await async_spread(client, fake, 40) == [13, 13, 14]
        assert is_at_rest(client)


async def test_the_async_client_follows_the_servers_advice(address: str, fake: HoldingEncoder) -> None:
    fake.connections = 2
    async with AsyncClient(address) as client:
        await client.model()
        assert await async_spread(client, fake, 40) == [20, 20]
    fake.connections = 3
    async with AsyncClient(address) as client:
        assert await async_spread(client, fake, 17) == [17]
        await client._calls.connections._asking  # type: ignore[misc]
        assert await async_spread(client, fake, 40) == [8, 16, 16]
    assert [rpc for rpc, _ in fake.calls].count("ListModels") == 1


async def test_an_async_stream_uses_every_connection(address: str, fake: HoldingEncoder) -> None:
    fake.connections = 4
    inputs = ["slow", *texts(600)]

    async def source() -> AsyncIterator[str]:
        for text in inputs:
            yield text

    async with AsyncClient(address) as client:
        got = [pair async for pair in client.stream(source(), last_hidden_state=True)]
        assert [index for index, _ in got] == list(range(601))
        for text, (_, result) in zip(inputs, got, strict=True):
            assert_right(text, result)
        assert len(fake.peers_of("EncodeStream")) == 4
        inputs[200] = "poison"
        unordered = client.stream(source(), tokens=True, ordered=False, on_error="return")
        outcomes = dict([pair async for pair in unordered])
        assert len(outcomes) == 601
        assert isinstance(outcomes[200], layertap.InvalidArgument)
        before = []

        async def read() -> None:
            async for index, _ in client.stream(source(), tokens=True):
                before.append(index)

        with pytest.raises(layertap.InvalidArgument, match=r"inputs\[200\]"):
            await read()
        assert before == list(range(200))
        for _ in range(12):
            assert fake.ended.acquire(timeout=WAIT_S)
        assert is_at_rest(client)


async def test_leaving_an_async_stream_cancels_every_call(address: str, fake: HoldingEncoder) -> None:
    async def read() -> None:
        async for index, _ in client.stream([*texts(300), "hang"], tokens=True):
            if index == 280:
                reading.set()

    async with AsyncClient(address, connections=4) as client:
        async with aclosing(client.stream(map(str, itertools.count()), tokens=True)) as results:
            async for index, _ in results:
                if index == 300:
                    break
        assert is_at_rest(client)
        for _ in range(4):
            assert await asyncio.to_thread(fake.ended.acquire, timeout=WAIT_S)
        reading = asyncio.Event()
        task = asyncio.create_task(read())
        await reading.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(4):
            assert await asyncio.to_thread(fake.ended.acquire, timeout=WAIT_S)
        assert is_at_rest(client)

"""The server of gRPC calls by itself, as its handlers and its callers see it."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from layertap_server.errors import Refusal
from layertap_server.rpc.call import Call
from layertap_server.rpc.request_stream import READ_AHEAD_BYTES, Requests
from layertap_server.rpc.server import RpcServer
from server.support import WAIT_S

SERVICE = "test.Service"
Event = asyncio.Event


class Handlers:
    """Of each kind of method; what happened is written down."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.began, self.ended, self.may_go = Event(), Event(), Event()
        self.num_written = 0

    async def upper(self, data: bytes, call: Call) -> bytes:
        call.add_done_callback(lambda _: self.ended.set())
        return data.upper()

    async def total(self, requests: AsyncIterator[bytes], call: Call) -> bytes:
        return b"".join([data async for data in requests])

    async def letters(self, data: bytes, call: Call) -> AsyncIterator[bytes]:
        for letter in data:
            yield bytes([letter])

    async def writes(self, data: bytes, call: Call) -> None:
        """As gRPC's health service does it."""
        for letter in data:
            await call.write(bytes([letter]))

    async def echo(self, requests: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        async for data in requests:
            yield data

    async def flood(self, data: bytes, call: Call) -> AsyncIterator[bytes]:
        call.add_done_callback(lambda _: self.ended.set())
        try:
            while True:
                self.num_written += 1
                yield bytes(1 << 20)
        finally:
            self.seen.append("closed")

    async def wait(self, data: bytes, call: Call) -> bytes:
        call.add_done_callback(lambda _: self.ended.set())
        self.began.set()
        try:
            await self.may_go.wait()
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise
        return data

    async def facts(self, data: bytes, call: Call) -> bytes:
        self.seen = [call.peer(), dict(call.invocation_metadata()), call.time_remaining()]
        return b""

    async def abort(self, data: bytes, call: Call) -> bytes:
        await call.abort(grpc.StatusCode.NOT_FOUND, "nöthing", (("what-bin", b"\x00\xff"), ("why", "so")))

    async def set(self, data: bytes, call: Call) -> bytes:
        call.set_code(grpc.StatusCode.DATA_LOSS)
        call.set_details("lost")
        return b""

    async def fail(self, data: bytes, call: Call) -> bytes:
        raise ValueError("a fault of ours")

    async def not_there(self, data: bytes, call: Call) -> bytes:
        """As a generated servicer does it."""
        call.set_code(grpc.StatusCode.UNIMPLEMENTED)
        call.set_details("not here")
        raise NotImplementedError

    async def abort_late(self, data: bytes, call: Call) -> AsyncIterator[bytes]:
        yield b"first"
        await call.abort(grpc.StatusCode.ABORTED, "then")

    def generic(self) -> grpc.GenericRpcHandler:
        unary = {
            name: getattr(self, name)
            for name in ("upper", "wait", "facts", "abort", "set", "fail", "not_there")
        }
        streamed = {name: getattr(self, name) for name in ("letters", "writes", "flood", "abort_late")}
        methods = {name: grpc.unary_unary_rpc_method_handler(act) for name, act in unary.items()}
        methods |= {name: grpc.unary_stream_rpc_method_handler(act) for name, act in streamed.items()}
        methods["total"] = grpc.stream_unary_rpc_method_handler(self.total)
        methods["echo"] = grpc.stream_stream_rpc_method_handler(self.echo)
        methods["number"] = grpc.unary_unary_rpc_method_handler(
            self.number, request_deserializer=int, response_serializer=lambda value: str(value).encode()
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def number(self, value: int, call: Call) -> int:
        return value + 1


@asynccontextmanager
async def serving(
    handlers: Handlers,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    maximum_concurrent_rpcs: int | None = None,
    **options: Any,
) -> AsyncIterator[tuple[RpcServer, str]]:
    server = RpcServer([("grpc.so_reuseport", 0), *options.items()], interceptors, maximum_concurrent_rpcs)
    server.add_generic_rpc_handlers((handlers.generic(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.fixture
async def handlers() -> Handlers:
    return Handlers()


@pytest.fixture
async def channel(handlers: Handlers) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(handlers) as (_, address), connected(address) as channel:
        yield channel


def connected(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


def path(name: str) -> str:
    return f"/{SERVICE}/{name}"


def ask(channel: grpc.aio.Channel, name: str, data: bytes = b"", **call: Any) -> Awaitable[bytes]:
    asked: Awaitable[bytes] = channel.unary_unary(path(name))(data, **{"timeout": WAIT_S} | call)
    return asked


async def error_of(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def soon(event: Event) -> None:
    await asyncio.wait_for(event.wait(), WAIT_S)


# --------------------------------------------------------------------------- kinds of method


async def test_each_kind_of_method_is_answered(channel: grpc.aio.Channel) -> None:
    assert await ask(channel, "upper", b"abc") == b"ABC"
    assert await ask(channel, "number", b"41") == b"42"
    assert await channel.stream_unary(path("total"))(iter([b"a", b"b", b""]), timeout=WAIT_S) == b"ab"
    for name in ("letters", "writes"):
        assert [one async for one in channel.unary_stream(path(name))(b"abc", timeout=WAIT_S)] == [
            b"a",
            b"b",
            b"c",
        ]
    call = channel.stream_stream(path("echo"))(iter([b"x", b"", b"z"]), timeout=WAIT_S)
    assert [one async for one in call] == [b"x", b"", b"z"]


async def test_an_empty_message_is_a_message_both_ways(channel: grpc.aio.Channel) -> None:
    assert await ask(channel, "upper", b"") == b""


async def test_many_calls_at_once_get_each_their_own(channel: grpc.aio.Channel) -> None:
    names = [f"call {number}".encode() for number in range(500)]
    assert await asyncio.gather(*(ask(channel, "upper", name) for name in names)) == [
        n.upper() for n in names
    ]


# ------------------------------------------------------------------------------- the context


async def test_what_a_handler_learns_of_its_call(handlers: Handlers, channel: grpc.aio.Channel) -> None:
    metadata = (("key", "value"), ("raw-bin", b"\x00\xff"))
    await channel.unary_unary(path("facts"))(b"", timeout=WAIT_S, metadata=metadata)
    peer, seen, remaining_s = handlers.seen
    assert peer.startswith("ipv4:127.0.0.1:")
    assert (seen["key"], seen["raw-bin"]) == ("value", b"\x00\xff")
    assert 0 < remaining_s < WAIT_S + 1  # on the wire it is rounded up


async def test_a_call_without_a_deadline_has_no_time_remaining(
    handlers: Handlers, channel: grpc.aio.Channel
) -> None:
    await ask(channel, "facts", timeout=None)
    assert handlers.seen[2] is None


async def test_the_end_of_a_call_is_told_once_its_reply_is_out(
    handlers: Handlers, channel: grpc.aio.Channel
) -> None:
    await ask(channel, "upper")
    await soon(handlers.ended)


async def test_metadata_that_are_set_are_sent(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(data: bytes, call: Call) -> bytes:
        await call.send_initial_metadata((("first", "1"),))
        with pytest.raises(RuntimeError):
            await call.send_initial_metadata((("first", "2"),))
        call.set_trailing_metadata((("last-bin", b"\x00"),))
        handlers.seen.append((call.code(), call.details(), call.trailing_metadata(), call.done()))
        if data == b"abort":
            await call.abort(grpc.StatusCode.ABORTED, "so")
        return data

    monkeypatch.setattr(handlers, "upper", act)
    async with serving(handlers) as (_, address), connected(address) as channel:
        call = channel.unary_unary(path("upper"))(b"a", timeout=WAIT_S)
        assert await call == b"a"
        assert dict(iter(await call.initial_metadata()))["first"] == "1"
        assert dict(iter(await call.trailing_metadata()))["last-bin"] == b"\x00"
        assert handlers.seen == [(grpc.StatusCode.OK, "", (("last-bin", b"\x00"),), False)]
        error = await error_of(ask(channel, "upper", b"abort"))
        assert dict(iter(error.trailing_metadata() or ()))["last-bin"] == b"\x00"


async def test_without_tls_the_caller_has_no_identity(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(data: bytes, call: Call) -> bytes:
        handlers.seen = [call.peer_identities(), call.peer_identity_key(), call.auth_context()]
        return data

    monkeypatch.setattr(handlers, "upper", act)
    async with serving(handlers) as (_, address), connected(address) as channel:
        await ask(channel, "upper")
    identities, key, properties = handlers.seen
    assert not identities
    assert key is None
    assert all(isinstance(name, str) for name in properties)


class Tracing(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Notes calls, and wraps the handlers of unary ones."""

    def __init__(self, name: str, seen: list[Any]) -> None:
        self.name, self.seen = name, seen

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        self.seen.append((self.name, details.method, dict(details.invocation_metadata).get("key")))
        handler = await continuation(details)
        if "nothing" in dict(details.invocation_metadata):
            return None
        if handler.request_streaming or handler.response_streaming:
            return handler

        async def traced(data: bytes, call: Call) -> Any:
            return self.name.encode() + await handler.unary_unary(data, call)

        return grpc.unary_unary_rpc_method_handler(traced)


async def test_interceptors_see_every_call_the_first_one_outermost(handlers: Handlers) -> None:
    seen: list[Any] = []
    interceptors = [Tracing("outer ", seen), Tracing("inner ", seen)]
    async with serving(handlers, interceptors) as (server, address), connected(address) as channel:
        server.early_checks[path("upper")] = lambda *_: pytest.fail("early checks would hide calls")
        assert await ask(channel, "upper", b"a", metadata=(("key", "v"),)) == b"outer inner A"
        assert seen == [("outer ", path("upper"), "v"), ("inner ", path("upper"), "v")]
        call = channel.stream_stream(path("echo"))(iter([b"x", b"y"]), timeout=WAIT_S)
        assert [one async for one in call] == [b"x", b"y"]
        assert await ask(channel, "upper", b"a") == b"outer inner A", "the handler is wrapped anew for each"
        error = await error_of(ask(channel, "upper", b"a", metadata=(("nothing", ""),)))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_calls_over_the_limit_are_refused_until_others_end(handlers: Handlers) -> None:
    async with serving(handlers, (), 2) as (_, address), connected(address) as channel:
        for _ in range(3):  # refused calls, and cancelled ones, do not count later
            handlers.began.clear()
            waiting = channel.unary_unary(path("wait"))(b"", timeout=WAIT_S)
            await soon(handlers.began)
            stream = channel.stream_stream(path("echo"))(timeout=WAIT_S)
            await stream.write(b"a")
            assert await stream.read() == b"a"
            for name in ("upper", "nothing", "echo"):
                error = await error_of(ask(channel, name))
                assert (error.code(), error.details()) == (
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "2 calls are open, the most that this server takes; try again later",
                )
            await stream.done_writing()
            assert await stream.read() == grpc.aio.EOF
            assert await ask(channel, "upper", b"a") == b"A"
            waiting.cancel()
            handlers.ended.clear()


# ------------------------------------------------------------------------------------ errors


async def test_an_aborted_call_carries_its_status_and_metadata(channel: grpc.aio.Channel) -> None:
    error = await error_of(ask(channel, "abort"))
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "nöthing")
    assert dict(iter(error.trailing_metadata() or ())) == {"what-bin": b"\x00\xff", "why": "so"}


async def test_a_status_that_is_set_is_sent(channel: grpc.aio.Channel) -> None:
    error = await error_of(ask(channel, "set"))
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "lost")


async def test_a_status_that_is_set_stays_when_the_handler_fails(channel: grpc.aio.Channel) -> None:
    error = await error_of(ask(channel, "not_there"))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNIMPLEMENTED, "not here")


async def test_a_stream_is_aborted_after_what_was_written(channel: grpc.aio.Channel) -> None:
    call = channel.unary_stream(path("abort_late"))(b"", timeout=WAIT_S)
    assert await call.read() == b"first"
    error = await error_of(call.read())
    assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, "then")


async def test_a_handler_that_fails_harms_nobody_else(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    error = await error_of(ask(channel, "fail"))
    assert error.code() is grpc.StatusCode.UNKNOWN
    assert "a fault of ours" in (error.details() or "")
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        f"{path('fail')} failed"
    ]
    assert await ask(channel, "upper", b"a") == b"A"


async def test_an_unknown_method_is_refused_by_name(channel: grpc.aio.Channel) -> None:
    for name in (path("nothing"), "/nobody.Service/Method"):
        error = await error_of(channel.unary_unary(name)(b"", timeout=WAIT_S))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.UNIMPLEMENTED,
            f"this server has no method {name}",
        )


async def test_one_request_is_what_a_unary_method_takes(channel: grpc.aio.Channel) -> None:
    call = channel.stream_unary(path("upper"))(iter(()), timeout=WAIT_S)
    error = await error_of(call)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "needs a request message" in (error.details() or "")


async def test_a_message_larger_than_allowed_is_refused(handlers: Handlers) -> None:
    options = {"grpc.max_receive_message_length": 1000}
    async with serving(handlers, **options) as (_, address), connected(address) as channel:
        error = await error_of(ask(channel, "upper", bytes(1001)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(await ask(channel, "upper", bytes(1000))) == 1000


async def test_an_early_check_refuses_or_leaves_the_call_to_the_handler(
    handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    def look(data: bytes, call: Call) -> Refusal | None:
        if data == b"fail":
            raise ValueError("a fault of ours")
        return (
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "no", (("why", data.decode()),)) if data == b"away" else None
        )

    async with serving(handlers) as (server, address), connected(address) as channel:
        server.early_checks[path("upper")] = look
        error = await error_of(ask(channel, "upper", b"away"))
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "no")
        assert dict(iter(error.trailing_metadata() or ())) == {"why": "away"}
        assert await ask(channel, "upper", b"stay") == b"STAY"
        assert not caplog.records
        assert await ask(channel, "upper", b"fail") == b"FAIL"
        assert "the early check" in caplog.text
        assert await ask(channel, "number", b"1") == b"2"


# ---------------------------------------------------------------------------------- leaving


@pytest.mark.parametrize("leaves", ["by cancelling", "by its deadline"])
async def test_a_caller_who_leaves_ends_the_work_for_it(
    handlers: Handlers, channel: grpc.aio.Channel, leaves: str
) -> None:
    call = channel.unary_unary(path("wait"))(b"", timeout=WAIT_S if leaves == "by cancelling" else 0.2)
    if leaves == "by cancelling":
        await soon(handlers.began)
        call.cancel()
    await soon(handlers.ended)
    assert handlers.seen in (["cancelled"], [])  # by its deadline, perhaps before it began
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await call


async def test_a_slow_reader_holds_the_writer_up_and_may_leave(
    handlers: Handlers, channel: grpc.aio.Channel
) -> None:
    call = channel.unary_stream(path("flood"))(b"", timeout=WAIT_S)
    for num_read in range(1, 51):
        await call.read()
        assert handlers.num_written < num_read + 20
    call.cancel()
    await soon(handlers.ended)
    assert handlers.seen == ["closed"]


async def test_requests_are_read_ahead_and_no_further_than_a_bound(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, is_full, has_room = asyncio.get_running_loop(), Event(), Requests._has_room
    read_ahead: list[int] = []

    def notes_when_full(requests: Requests) -> bool:
        if not (room := has_room(requests)):
            loop.call_soon_threadsafe(is_full.set)
        return room

    async def held_up(requests: Any, call: Call) -> AsyncIterator[bytes]:
        async for data in requests:
            await handlers.may_go.wait()
            read_ahead.append(sum(map(len, filter(None, requests._waiting))))
            yield data

    monkeypatch.setattr(Requests, "_has_room", notes_when_full)
    monkeypatch.setattr(handlers, "echo", held_up)
    messages = [bytes([number % 256]) * size for number in range(400) for size in (1, 1000, 20_000)]
    async with serving(handlers) as (_, address), connected(address) as channel:
        call = channel.stream_stream(path("echo"))(iter(messages), timeout=WAIT_S)
        await soon(is_full)
        handlers.may_go.set()
        assert [one async for one in call] == messages
    assert max(read_ahead) < READ_AHEAD_BYTES + 20_000


def test_a_message_that_comes_while_the_loop_looks_for_one_starts_no_second_receive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gRPC takes one receive at a time: of a second beside it the stream hangs."""
    started: list[Any] = []
    looking: list[threading.Thread] = []

    def look() -> None:
        with suppress(StopIteration):  # it has got it
            requests.__anext__().send(None)

    class Pausing(deque[Any]):
        """Lets the other thread look just before the message is there."""

        def append(self, message: Any) -> None:
            looking.append(threading.Thread(target=look))
            looking[0].start()
            looking[0].join(0.2)  # it has finished, or waits for this one
            super().append(message)

    monkeypatch.setattr("layertap_server.rpc.request_stream.deque", Pausing)
    loop = SimpleNamespace(create_future=lambda: iter([None]))
    news: Any = SimpleNamespace(loop=loop, post=lambda news: None)
    requests = Requests(news, lambda operations, take: started.append(take), None)
    requests._is_receiving = True
    message = SimpleNamespace(message=lambda: bytes(READ_AHEAD_BYTES))  # there is no room for another
    requests._take(SimpleNamespace(batch_operations=[message]))
    looking[0].join(WAIT_S)
    assert len(started) == 0


# --------------------------------------------------------------------------------- stopping


async def test_stopping_waits_for_what_is_open(handlers: Handlers) -> None:
    async with serving(handlers) as (server, address), connected(address) as channel:
        call = asyncio.ensure_future(ask(channel, "wait", b"kept"))
        await soon(handlers.began)
        stopping = asyncio.create_task(server.stop(WAIT_S))
        await asyncio.sleep(0)  # it begins
        handlers.may_go.set()
        assert await call == b"kept"
        await asyncio.wait_for(stopping, WAIT_S)
        assert await server.wait_for_termination(0) is False


@pytest.mark.parametrize("grace_s", [None, 0.05])
async def test_stopping_ends_what_is_open_after_the_grace(handlers: Handlers, grace_s: float | None) -> None:
    async with serving(handlers) as (server, address), connected(address) as channel:
        call = asyncio.ensure_future(ask(channel, "wait"))
        await soon(handlers.began)
        await asyncio.wait_for(server.stop(grace_s), WAIT_S)
        error = await error_of(call)
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        await soon(handlers.ended)
        assert handlers.seen == ["cancelled"]


async def test_nothing_of_a_stopped_server_is_left() -> None:
    def rpc_threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("rpc ")]

    before = rpc_threads()
    async with serving(Handlers()) as (server, address), connected(address) as channel:
        assert len(rpc_threads()) == len(before) + 1
        await ask(channel, "upper")
        await server.stop(None)
        await server.stop(None)  # a second call does nothing
        assert rpc_threads() == before
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0


async def test_an_address_in_use_is_refused(handlers: Handlers) -> None:
    async with serving(handlers) as (_, address):
        with pytest.raises(RuntimeError):
            RpcServer([("grpc.so_reuseport", 0)]).add_insecure_port(address)


async def test_a_step_that_fails_is_logged_and_the_others_go_on(
    channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    receive = Call.receive

    def fails_once(call: Call) -> None:
        monkeypatch.setattr(Call, "receive", receive)
        raise RuntimeError("no such step")

    monkeypatch.setattr(Call, "receive", fails_once)
    error = await error_of(ask(channel, "upper", timeout=0.2))
    assert error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
    assert "a callback of a call failed" in caplog.text
    assert await ask(channel, "upper", b"a") == b"A"


async def test_handlers_that_end_while_the_server_stops(handlers: Handlers) -> None:
    """They end after gRPC has told of the cancelled calls, and before the event loop has heard of it."""
    async with serving(handlers) as (server, address), connected(address) as channel:
        waiting = asyncio.ensure_future(ask(channel, "wait"))
        await soon(handlers.began)
        stopping = asyncio.ensure_future(server.stop(None))
        await asyncio.sleep(0)
        handlers.may_go.set()
        pause, until = threading.Event(), time.monotonic() + WAIT_S
        while len(server._bridge._posted) < 2:  # the call's end and the server's
            pause.wait(0.001)  # on the event loop, which runs none of the two meanwhile
            assert time.monotonic() < until
        assert not server._bridge.is_closed
        await asyncio.wait_for(stopping, WAIT_S)
        assert (await error_of(waiting)).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


async def test_a_handler_that_outlives_the_server(handlers: Handlers) -> None:
    """It starts nothing any more."""
    written: list[str] = []
    may_write = Event()

    async def stubborn(data: bytes, call: Call) -> None:
        handlers.began.set()
        try:
            await handlers.may_go.wait()
        except asyncio.CancelledError:
            await may_write.wait()
            try:
                await call.write(b"late")
            except asyncio.CancelledError:
                written.append("refused")
                handlers.ended.set()

    method = grpc.unary_stream_rpc_method_handler(stubborn)
    async with serving(handlers) as (server, address), connected(address) as channel:
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("late.Service", {"m": method}),)
        )
        call = channel.unary_stream("/late.Service/m")(b"", timeout=WAIT_S)
        await soon(handlers.began)
        await server.stop(None)
        may_write.set()
        await soon(handlers.ended)
        call.cancel()
    assert written == ["refused"]

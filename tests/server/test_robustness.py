"""What no well-behaved client does: garbage, cut connections, readers that stop, cancels by the hundred."""

from __future__ import annotations

import gc
import random
import socket
import struct
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from harness import Running
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.api import serialization as wire
from layertap_server.api.budget import StreamBudget
from layertap_server.api.pipeline import Answer
from layertap_server.enums import DType, OutputField
from layertap_server.errors import RequestError
from layertap_server.plan import TensorSpec
from layertap_server.scheduling.fair_queue import Ticket
from server.support import (
    CLS,
    SEP,
    WAIT_S,
    array,
    assemble,
    at_rest,
    eventually,
    gated,
    large,
    needs_fast_server,
    needs_one_process,
    read_error,
    refusal_of,
    served,
    streaming,
    texts,
    tokens,
)

pytestmark = pytest.mark.usefixtures("unharmed")

SERVICE = "/layertap.v1.EncoderService"
GARBAGE = [
    b"\xff",
    b"\xff" * 4096,
    b"\x0a\xff\xff\xff\xff\x0f",  # a field that says it is 4 GiB long
    b"\x12\x04\x0a\x02\xc3\x28",  # text that is not UTF-8
    texts("cut off in the middle").SerializeToString()[:-3],
]


# ---------------------------------------------------------------------------------- garbage


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("method", ["Encode", "Tokenize"])
def test_garbage_for_a_request(channel: grpc.Channel, method: str, garbage: bytes) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"{SERVICE}/{method}")(garbage, timeout=WAIT_S)
    refusal = read_error(refused.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert refusal.message == f"these {len(garbage)} bytes are not a valid layertap.v1.{method}Request"


def test_garbage_on_a_stream_ends_it_after_what_was_answered(channel: grpc.Channel) -> None:
    call = channel.stream_stream(f"{SERVICE}/EncodeStream")
    answered = threading.Event()

    def requests() -> Iterator[bytes]:
        yield pb.EncodeStreamRequest(request_id=1, request=texts("fine")).SerializeToString()
        assert answered.wait(WAIT_S)
        yield b"\xff" * 100

    frames = []

    def read() -> None:
        for data in call(requests(), timeout=WAIT_S):
            frames.append(pb.EncodeStreamResponse.FromString(data))
            if frames[-1].HasField("end"):
                answered.set()

    with pytest.raises(grpc.RpcError) as ended:
        read()
    assert assemble(frames)[1].status.code == 0
    refusal = read_error(ended.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")


def test_fields_of_a_later_contract_are_ignored(channel: grpc.Channel) -> None:
    data = texts("fine").SerializeToString()
    later = data + bytes([100 << 3 & 0x7F | 0x80 | 2, 100 << 3 >> 7, 3]) + b"new"
    call = channel.unary_unary(f"{SERVICE}/Encode", response_deserializer=pb.EncodeResponse.FromString)
    assert call(later, timeout=WAIT_S).results == call(data, timeout=WAIT_S).results


def test_an_unknown_method(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"{SERVICE}/Decode")(b"", timeout=WAIT_S)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_over_the_limit(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"{SERVICE}/Encode")(b"a" * 100 * 2**20, timeout=WAIT_S)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(4 * 2**20) in refused.value.details()


# ------------------------------------------------------------------------- cut connections

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, END_HEADERS = 0, 1, 4, 4


def http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def call_headers(method: str) -> bytes:
    """The request headers of a gRPC call, as HPACK literals."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"{SERVICE}/{method}",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    literals = [(name.encode(), value.encode()) for name, value in fields.items()]
    return b"".join(
        b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in literals
    )


def raw_call(method: str, message: bytes, announced: int) -> bytes:
    """A connection's bytes with one call, whose message is said to be `announced` bytes long."""
    end_stream = int(len(message) == announced)
    return b"".join(
        (
            PREFACE,
            http2_frame(SETTINGS, 0, 0, b""),
            http2_frame(HEADERS, END_HEADERS, 1, call_headers(method)),
            http2_frame(DATA, end_stream, 1, b"\x00" + struct.pack(">I", announced) + message),
        )
    )


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",  # the start of TLS
        random.Random(0).randbytes(10_000),
        PREFACE[:10],
        PREFACE,
        PREFACE + b"\xff" * 200,
        raw_call("Encode", b"\x0a" * 20, announced=1000)[:-10],
        raw_call("Encode", b"\x0a" * 20, announced=1000),
        raw_call("EncodeStream", b"\x0a" * 20, announced=1000),
    ],
    ids=[
        "nothing",
        "http1",
        "tls",
        "noise",
        "half-preface",
        "preface",
        "bad-frame",
        "half-frame",
        "half-message",
        "half-message-on-stream",
    ],
)
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_connection_that_is_cut(server: Running, sent: bytes, reset: bool) -> None:
    host, port = server.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(sent)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(server, lambda: at_rest(server))


def test_the_same_call_whole_is_answered(server: Running) -> None:
    host, port = server.address.rsplit(":", 1)
    message = texts("fine").SerializeToString()
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(raw_call("Encode", message, announced=len(message)))
        received = b""
        while b"grpc-status" not in received:
            piece = connection.recv(65536)
            assert piece, "cut off by the server"
            received += piece


# ------------------------------------------------------------------------ clients that leave


def test_callers_that_vanish_while_they_wait(server: Running, stub: EncoderServiceStub) -> None:
    service = server.server.service
    with gated(server) as gate:
        running = stub.Encode.future(tokens([CLS, 71, SEP]), timeout=WAIT_S)
        gate.wait_for_batch()
        with (
            grpc.insecure_channel(server.address) as leaving,
            streaming(EncoderServiceStub(leaving)) as stream,
        ):
            vanishing = EncoderServiceStub(leaving)
            calls = [vanishing.Encode.future(tokens([CLS, 72, SEP]), timeout=WAIT_S) for _ in range(5)]
            for request_id in range(5):
                stream.send(request_id, tokens([CLS, 73, SEP]))
            eventually(server, lambda: served(server).scheduler.queued_tokens == 30)
        assert all(call.done() for call in calls)
        # Freed at once, not when it would be in a batch.
        eventually(
            server,
            lambda: served(server).scheduler.queued_tokens == 0 and service.answering.num_in_flight == 1,
        )
        gate.open()
        assert running.result().results
        assert stub.Encode(tokens([CLS, 74, SEP]), timeout=WAIT_S).results
        assert gate.seen_ids == {CLS, SEP, 71, 74}


def test_a_caller_that_vanishes_while_its_batch_runs(server: Running, stub: EncoderServiceStub) -> None:
    with gated(server) as gate:
        call = stub.Encode.future(large(10), timeout=WAIT_S)
        gate.wait_for_batch()
        call.cancel()
        eventually(server, lambda: server.server.service.budget.reserved_bytes == 0)
        gate.open()


@needs_one_process
def test_a_caller_that_vanishes_while_it_tokenizes(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenization = served(server).tokenization
    entered, go = threading.Event(), threading.Event()
    encode_many = tokenization.encode_many

    def slow(requests):  # type: ignore[no-untyped-def]
        entered.set()
        assert go.wait(WAIT_S)
        return encode_many(requests)

    monkeypatch.setattr("layertap_server.tokenization.worker.MAX_CHARS_AT_ONCE", -1)
    monkeypatch.setattr(tokenization, "encode_many", slow)
    call = stub.Encode.future(texts("a"), timeout=WAIT_S)
    stays = stub.Encode.future(texts("the second"), timeout=WAIT_S)
    assert entered.wait(WAIT_S)
    call.cancel()
    eventually(server, lambda: server.server.service.answering.num_in_flight == 1)
    go.set()
    assert stays.result().results


@pytest.mark.parametrize("leaves_by", ["cancel", "close"])
def test_a_reader_that_stops_reading_slows_only_itself(
    server: Running, stub: EncoderServiceStub, leaves_by: str
) -> None:
    """Its results stay in the accounts until it leaves; others, on its connection too, are answered."""
    budget = server.server.service.budget
    channel = grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
    own = EncoderServiceStub(channel)
    with streaming(own) as stream:
        num_requests = 8
        for request_id in range(num_requests):
            stream.send(request_id, large(1000))
        frames = iter(stream)
        next(frames)
        held = num_requests * budget_of(large(1000))
        eventually(server, lambda: budget.reserved_bytes == held)
        eventually(server, lambda: server.server.service.answering.num_in_flight == 0)
        for other in (stub, own):
            assert other.Encode(texts("a"), timeout=WAIT_S).results
        eventually(server, lambda: budget.reserved_bytes == held)
        if leaves_by == "cancel":
            stream.call.cancel()
        else:
            channel.close()
        eventually(server, lambda: budget.reserved_bytes == 0)
    channel.close()


def budget_of(request: pb.EncodeRequest) -> int:
    """The reservation of one such request."""
    shape = (len(request.outputs.hidden_states.layers), 64, 32)
    head = pb.EncodeResult(token_count=64)
    spec = TensorSpec(OutputField.HIDDEN_STATES, DType.FLOAT32, shape)
    return wire.MAX_TIMING_BYTES + wire.result_size(head, [spec])


def test_five_hundred_random_cancels_under_load(server: Running, stub: EncoderServiceStub) -> None:
    chance = random.Random(7)
    contents = [[CLS, *chance.choices(range(5, 500), k=chance.randint(1, 40)), SEP] for _ in range(20)]
    expected = [
        array(stub.Encode(tokens(content), timeout=WAIT_S).results[0].embeddings[0]) for content in contents
    ]
    asked = [chance.randrange(20) for _ in range(800)]
    leaving = set(chance.sample(range(800), 500))
    with gated(server) as gate:
        calls = [stub.Encode.future(tokens(contents[which]), timeout=WAIT_S) for which in asked]
        waves = [sorted(leaving)[start::3] for start in range(3)]
        for number in waves[0]:  # while requests arrive
            calls[number].cancel()
        gate.wait_for_batch()
        for number in waves[1]:  # while all of them are queued
            calls[number].cancel()
        gate.open()
        for number in waves[2]:  # while results arrive
            calls[number].cancel()
        for number, (call, which) in enumerate(zip(calls, asked, strict=True)):
            if number in leaving:
                assert call.cancelled() or call.done()
                continue
            [result] = call.result().results
            np.testing.assert_allclose(array(result.embeddings[0]), expected[which], atol=2e-5, rtol=1e-4)
    assert sum(call.cancelled() for call in calls) > 300
    eventually(server, lambda: at_rest(server))
    assert served(server).scheduler.queued_tokens == 0
    assert not served(server).host._waiting


@needs_fast_server
def test_what_is_over_leaves_nothing_to_look_for(
    server: Running, stub: EncoderServiceStub, channel: grpc.Channel
) -> None:
    """Results are megabytes, and Python looks for garbage seldom."""

    def left() -> list[object]:
        kinds = (Answer, StreamBudget, RequestError, Ticket)
        return [one for one in gc.get_objects() if type(one) in kinds]

    gc.collect()
    num_before = len(left())  # clients of other tests
    gc.disable()
    try:
        for _ in range(5):
            stub.Encode(large(5), timeout=WAIT_S)
            refusal_of(stub.Encode, texts("a", model="none"), timeout=WAIT_S)
            refusal_of(stub.Encode, tokens([CLS, 10**6, SEP]), timeout=WAIT_S)
            with gated(server) as gate:
                leaves = stub.Encode.future(texts("a"), timeout=WAIT_S)
                gate.wait_for_batch()
                leaves.cancel()
            with streaming(stub) as stream:
                stream.send(1, large(5))
                assert stream.reply().results
                stream.send(2, texts("a", model="none"))
                assert stream.reply().status is not None
            ended = channel.stream_stream(f"{SERVICE}/EncodeStream")(iter([b"\xff"]), timeout=WAIT_S)
            refusal_of(list, ended)
        eventually(server, lambda: len(left()) <= num_before)
    finally:
        gc.enable()

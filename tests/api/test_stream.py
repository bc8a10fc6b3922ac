"""EncodeStream: frames, their order, and the life of a stream."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from harness import Running, serve
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server import errors
from layertap_server.api.bandwidth import FRAME_BYTES_BESIDE_CALLS, BandwidthLimiter
from layertap_server.api.budget import ByteBudget, StreamBudget
from layertap_server.api.pipeline import Answer
from layertap_server.api.serialization import varint
from layertap_server.api.service import EncoderService, Phase
from layertap_server.api.streaming import FrameQueue, StreamCall
from layertap_server.config import Config
from layertap_server.rpc.security import Guard
from layertap_server.scheduling.cost_model import CostModel
from server.support import (
    CLS,
    SEP,
    WAIT_S,
    Stream,
    array,
    assemble,
    assert_same_results,
    eventually,
    gated,
    large,
    read_error,
    read_status,
    served,
    streaming,
    tensors_of,
    texts,
    tokens,
)

pytestmark = pytest.mark.usefixtures("unharmed")

SERVICE = "/layertap.v1.EncoderService"
FRAME_BYTES = 16384  # of the shared server
MAX_STREAM_REQUESTS = 1024
EVERYTHING = pb.OutputSelection(
    last_hidden_state=True,
    pooler_output=True,
    hidden_states=pb.HiddenStateSelection(),
    attentions=pb.AttentionSelection(),
    embeddings=[pb.EmbeddingSpec(), pb.EmbeddingSpec(encoding=pb.EMBEDDING_ENCODING_INT8)],
    tokens=True,
)


def test_a_stream_answers_what_encode_answers(stub: EncoderServiceStub) -> None:
    asked = texts("one text", "another, a longer text", "the third", outputs=EVERYTHING)
    expected = stub.Encode(asked, timeout=WAIT_S)
    with streaming(stub) as stream:
        stream.send(2**64 - 1, asked)
        stream.half_close()
        frames = list(stream)
    [(request_id, reply)] = assemble(frames).items()
    assert request_id == 2**64 - 1
    assert_same_results(reply.results, expected.results)
    assert reply.status.code == 0
    assert reply.timing.batch_inputs == 3
    assert 0 < reply.timing.compute_ns < reply.timing.total_ns


def test_frames_of_one_request(stub: EncoderServiceStub) -> None:
    """A header before each input's chunks, tensors one after the other, chunks full but the last."""
    asked = large(num_copies=5, num_tokens=60)
    asked.inputs.append(asked.inputs[0])
    asked.outputs.last_hidden_state = True
    with streaming(stub) as stream:
        stream.send(1, asked)
        stream.half_close()
        frames = list(stream)
    kinds = [frame.WhichOneof("frame") for frame in frames]
    of_last, of_all = 60 * 128, 5 * 60 * 128
    chunks = [of_last, FRAME_BYTES, FRAME_BYTES, of_all - 2 * FRAME_BYTES]
    assert kinds == ["header", *["chunk"] * 4, "header", *["chunk"] * 4, "end"]
    for first, index in ((0, 0), (5, 1)):
        assert frames[first].header.input_index == index
        got = [frame.chunk for frame in frames[first + 1 : first + 5]]
        assert [len(chunk.data) for chunk in got] == chunks
        assert [chunk.tensor for chunk in got] == [0, 1, 1, 1]
        assert [chunk.offset for chunk in got] == [0, 0, FRAME_BYTES, 2 * FRAME_BYTES]
        assert {chunk.input_index for chunk in got} == {index}


def test_the_smallest_frames(folders: dict[str, Path]) -> None:
    with (
        serve({"bert": folders["bert"]}, frame_bytes=4096) as small,
        grpc.insecure_channel(small.address) as channel,
        streaming(EncoderServiceStub(channel)) as stream,
    ):
        asked = texts("some words to look into", outputs=EVERYTHING)
        expected = EncoderServiceStub(channel).Encode(asked, timeout=WAIT_S)
        stream.send(1, asked)
        stream.half_close()
        frames = list(stream)
    assert max(frame.ByteSize() for frame in frames if frame.HasField("chunk")) < 4096 + 32
    assert_same_results(assemble(frames)[1].results, expected.results)


def test_frames_are_smaller_while_calls_are_answered(folders: dict[str, Path]) -> None:
    asked = large(num_copies=100)
    with (
        serve({"bert": folders["bert"]}) as running,
        grpc.insecure_channel(running.address) as channel,
        streaming(EncoderServiceStub(channel)) as stream,
    ):
        bandwidth = running.server.service.bandwidth
        stream.send(1, asked)
        alone = chunk_sizes(stream)
        running.call(lambda: setattr(bandwidth, "clock", lambda: 0.0))  # keeps the call as the latest one
        EncoderServiceStub(channel).Encode(texts("a call"), timeout=WAIT_S)
        stream.send(2, asked)
        beside = chunk_sizes(stream)
        stream.half_close()
    assert sum(alone) == sum(beside) > 2 * FRAME_BYTES_BESIDE_CALLS
    assert len(alone) == 1
    assert max(beside) == FRAME_BYTES_BESIDE_CALLS


def chunk_sizes(stream: Stream) -> list[int]:
    """Of one reply."""
    until_end = takewhile(lambda frame: not frame.HasField("end"), stream)
    return [len(frame.chunk.data) for frame in until_end if frame.HasField("chunk")]


def test_replies_come_as_they_complete(server: Running, stub: EncoderServiceStub) -> None:
    with gated(server) as gate, streaming(stub) as stream:
        stream.send(1, texts("waits at the gate"))
        gate.wait_for_batch()
        # Needs no forward pass, so it overtakes.
        stream.send(2, texts("needs no model", outputs=pb.OutputSelection(tokens=True)))
        first = next(iter(stream))
        assert first.request_id == 2
        gate.open()
        stream.half_close()
        replies = assemble([first, *stream])
    assert {request_id: reply.status.code for request_id, reply in replies.items()} == {1: 0, 2: 0}


def test_large_results_take_turns(server: Running, stub: EncoderServiceStub) -> None:
    with gated(server) as gate, streaming(stub) as stream:
        stream.send(0, texts("holds the engine"))
        gate.wait_for_batch()
        for request_id in (1, 2):
            stream.send(request_id, large(100))
        eventually(server, lambda: served(server).scheduler.queued_tokens == 128)
        gate.open()
        stream.half_close()
        frames = [frame for frame in stream if frame.request_id]
    order = [frame.request_id for frame in frames]
    assert len(order) == 2 * (2 + 100 * 64 * 128 // FRAME_BYTES)
    # One may begin before the other arrives; after that, they write frames in turn.
    both = order[max(order.index(1), order.index(2)) :]
    assert both[:80] == [both[0], 3 - both[0]] * 40
    one, other = assemble(frames).values()
    assert one.results == other.results


def test_a_small_reply_is_not_held_up_by_a_large_one(server: Running, stub: EncoderServiceStub) -> None:
    with streaming(stub) as stream:
        stream.send(1, large(2000))
        frames = iter(stream)
        assert next(frames).request_id == 1
        stream.send(2, texts("small"))
        stream.half_close()
        order = [frame.request_id for frame in frames]
    assert max(i for i, request_id in enumerate(order) if request_id == 2) < len(order) - 100


def test_one_failed_request_ends_only_itself(stub: EncoderServiceStub) -> None:
    with streaming(stub) as stream:
        stream.send(1, texts("fine"))
        stream.send(2, texts("bad", prompt_name="unknown"))
        stream.send(3, pb.EncodeRequest())
        stream.send(4, texts("fine"))
        stream.half_close()
        replies = assemble(stream)
        assert stream.call.code() is grpc.StatusCode.OK
    assert {i: reply.status.code for i, reply in replies.items()} == {1: 0, 2: 3, 3: 3, 4: 0}
    assert [len(replies[i].results) for i in (1, 2, 3, 4)] == [1, 0, 0, 1]
    assert replies[1].results == replies[4].results


UNREADABLE = {
    "many inputs": pb.EncodeRequest(inputs=[pb.Input(text="a" * 300)] * 301).SerializeToString(),
    "many short inputs": pb.EncodeRequest(inputs=[pb.Input(text="a")] * 301).SerializeToString(),
    "one input of too many ids": tokens([CLS, *[5] * 70_000, SEP]).SerializeToString(),
    "too much beside its inputs": texts(
        "a", outputs=pb.OutputSelection(embeddings=[pb.EmbeddingSpec()] * 50_000)
    ).SerializeToString(),
    "text that is not UTF-8": b"\x12\x04\x0a\x02\xc3\x28",
    "the same, and large": b"\x12\x84\x80\x08\x0a\x80\x80\x08" + b"\xc3\x28" * 2**16,
    "cut off in an input": texts("cut off in the middle").SerializeToString()[:-3],
    "many parts of nothing": b"",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_request_that_cannot_be_read_ends_only_itself(
    server: Running, stub: EncoderServiceStub, channel: grpc.Channel, name: str
) -> None:
    with gated(server) as gate:
        fine = [
            pb.EncodeStreamRequest(request_id=request_id, request=texts("fine")).SerializeToString()
            for request_id in (1, 3)
        ]
        bad = streamed(2, UNREADABLE[name])
        if name == "many parts of nothing":
            bad += b"\x12\x00" * 50_000
        call = channel.stream_stream(f"{SERVICE}/EncodeStream")(iter([fine[0], bad, fine[1]]), timeout=WAIT_S)
        gate.wait_for_batch()  # the first is accepted, and not answered
        gate.open()
        replies = assemble(pb.EncodeStreamResponse.FromString(frame) for frame in call)
    assert call.code() is grpc.StatusCode.OK
    assert {i: reply.status.code for i, reply in replies.items()} == {1: 0, 2: 3, 3: 0}
    assert read_status(replies[2].status).reason in (
        "TOO_MANY_INPUTS",
        "INPUT_TOO_LARGE",
        "MALFORMED_REQUEST",
    )


def streamed(request_id: int, request: bytes) -> bytes:
    """An EncodeStreamRequest of which the request is these bytes."""
    envelope = pb.EncodeStreamRequest(request_id=request_id).SerializeToString()
    return envelope + b"\x12" + varint(len(request)) + request


ENDING = {
    "bytes that are nothing": (b"\xff" * 100, "MALFORMED_REQUEST"),
    "a field that goes beyond them": (b"\x12\xff\xff\x7f", "MALFORMED_REQUEST"),
    "an id that is in flight": (streamed(1, texts("another").SerializeToString()), "DUPLICATE_ID"),
    "the same, of what cannot be read": (streamed(1, b"\xff"), "DUPLICATE_ID"),
}


@pytest.mark.parametrize("name", ENDING)
def test_what_could_be_taken_for_another_ends_the_stream_after_its_answers(
    server: Running, channel: grpc.Channel, name: str
) -> None:
    """Nothing is told under an id that is another's, or nobody's."""
    bad, reason = ENDING[name]
    first = pb.EncodeStreamRequest(request_id=1, request=texts("fine")).SerializeToString()
    frames: list[pb.EncodeStreamResponse] = []
    with gated(server) as gate:
        call = channel.stream_stream(f"{SERVICE}/EncodeStream")(iter([first, bad, first]), timeout=WAIT_S)
        gate.wait_for_batch()
        eventually(server, lambda: not server.server.service._stream_readers)  # it reads no further
        gate.open()
        with pytest.raises(grpc.RpcError) as ended:
            frames.extend(pb.EncodeStreamResponse.FromString(frame) for frame in call)
    [(request_id, reply)] = assemble(frames).items()
    assert (request_id, reply.status.code, len(reply.results)) == (1, 0, 1)
    refusal = read_error(ended.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


async def test_an_id_is_free_as_soon_as_its_last_frame_is_read() -> None:
    """Its caller may send the next request with it before the server knows that the frame has gone."""
    requests: asyncio.Queue[bytes] = asyncio.Queue()

    async def asked() -> AsyncIterator[bytes]:
        while data := await requests.get():
            yield data

    async def answer(*_: object) -> Answer:
        raise errors.draining()

    frames = FrameQueue(BandwidthLimiter(0))
    budget = StreamBudget(ByteBudget(1), 1)
    config = Config(model=("a=a",))
    call = StreamCall(config, frames, budget, answer, lambda error: None, lambda: False)
    reading = asyncio.create_task(call.read(asked(), lambda: None, lambda: None))
    written = frames.__aiter__()
    for _ in range(3):
        requests.put_nowait(streamed(7, b""))
        frame = pb.EncodeStreamResponse.FromString(await asyncio.wait_for(anext(written), WAIT_S))
        assert (frame.request_id, read_status(frame.end.status).reason) == (7, "DRAINING")
    requests.put_nowait(b"")
    assert [frame async for frame in written] == []
    await reading


async def test_draining_ends_a_stream_that_has_just_begun() -> None:
    """Its reader has taken no step yet, and cancelled then it would never take one."""
    service = EncoderService(Config(model=("a=a",)), Guard.open())
    service.phase = Phase.SERVING
    callbacks: list[Callable[[object], None]] = []
    ended: list[grpc.StatusCode] = []

    async def abort(code: grpc.StatusCode, *_: object) -> None:
        ended.append(code)
        raise grpc.aio.AbortError

    async def asked() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def handle() -> None:
        with suppress(grpc.aio.AbortError):
            async for _ in service.EncodeStream(asked(), context):
                pass
        for callback in callbacks:
            callback(context)

    context = SimpleNamespace(
        add_done_callback=callbacks.append,
        invocation_metadata=tuple,
        peer=lambda: "",
        time_remaining=lambda: None,
        abort=abort,
    )
    handling = asyncio.create_task(handle())
    draining = asyncio.create_task(
        service.drain()
    )  # after the handler's first step, which creates its reader
    await asyncio.wait_for(asyncio.gather(handling, draining), WAIT_S)
    assert ended == [grpc.StatusCode.UNAVAILABLE]


def test_more_requests_than_may_be_in_flight(server: Running, stub: EncoderServiceStub) -> None:
    """Past the limit the stream is not read; every request is answered all the same."""
    num_requests = MAX_STREAM_REQUESTS + 300
    service = server.server.service
    with gated(server) as gate, streaming(stub) as stream:
        for request_id in range(num_requests):
            stream.send(request_id, tokens([CLS, 5 + request_id % 400, SEP]))
        eventually(server, lambda: service.answering.num_in_flight == MAX_STREAM_REQUESTS)
        gate.open()
        stream.half_close()
        replies = assemble(stream)
        assert stream.call.code() is grpc.StatusCode.OK
        assert max(len(works) for works in gate.batches) > 400
    assert Counter(reply.status.code for reply in replies.values()) == {0: num_requests}
    assert sorted(replies) == list(range(num_requests))
    vectors = [array(replies[i].results[0].embeddings[0]) for i in range(800)]
    assert all(abs(vectors[i] - vectors[i + 400]).max() < 2e-5 for i in range(400))
    assert abs(vectors[0] - vectors[1]).max() > 1e-2


def test_half_close_ends_the_stream_after_all_replies(server: Running, stub: EncoderServiceStub) -> None:
    with gated(server) as gate, streaming(stub) as stream:
        for request_id in range(3):
            stream.send(request_id, texts("a"))
        stream.half_close()
        gate.wait_for_batch()
        gate.open()
        assert {i: reply.status.code for i, reply in assemble(stream).items()} == {0: 0, 1: 0, 2: 0}
        assert stream.call.code() is grpc.StatusCode.OK


def test_an_empty_stream_ends_well(stub: EncoderServiceStub) -> None:
    with streaming(stub) as stream:
        stream.half_close()
        assert list(stream) == []
        assert stream.call.code() is grpc.StatusCode.OK


def test_a_deadline_ends_the_stream_and_frees_what_it_held(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served(server).scheduler.admission, "cost", CostModel())
    with gated(server) as gate, streaming(stub, timeout=0.25) as stream:
        for request_id in range(4):
            stream.send(request_id, large(10))
        with pytest.raises(grpc.RpcError) as ended:
            list(stream)
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(server, lambda: server.server.service.budget.reserved_bytes == 0)
        gate.open()


@pytest.mark.parametrize("half_closed", [False, True])
def test_draining_answers_what_an_open_stream_had_asked(folders: dict[str, Path], half_closed: bool) -> None:
    with (
        serve({"bert": folders["bert"]}, grace_s=WAIT_S) as server,
        grpc.insecure_channel(server.address) as channel,
        ThreadPoolExecutor(1) as worker,
        gated(server) as gate,
        streaming(EncoderServiceStub(channel)) as stream,
    ):
        stream.send(1, texts("at the gate"))
        gate.wait_for_batch()
        stream.send(2, large(100))
        eventually(server, lambda: served(server).scheduler.queued_tokens == 64)
        if half_closed:
            stream.half_close()
            eventually(server, lambda: not server.server.service._stream_readers)
        draining = worker.submit(server.call, server.server.shutdown)
        eventually(server, lambda: server.server.service.phase is Phase.DRAINING)
        gate.open()
        frames = []
        ended: grpc.RpcError | None = None
        try:
            frames.extend(stream)
        except grpc.RpcError as error:
            ended = error
        draining.result(WAIT_S)
        replies = assemble(frames)
    assert {i: reply.status.code for i, reply in replies.items()} == {1: 0, 2: 0}
    assert len(tensors_of(replies[2].results[0])[0].data) == 100 * 64 * 128
    if half_closed:
        assert ended is None
    else:
        refusal = read_error(ended)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert refusal.retry_s > 0

"""Results of any size: nothing heavy on the event loop, and bounded memory whoever stops reading."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest

from bench.wire_server import NUM_BYTES, Precomputed
from harness import Running
from layertap import Attentions, Client, ResourceExhausted, TokenIds
from layertap._transport import stub_of
from layertap._wire import parse_frame
from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors

LONG = TokenIds(list(range(1000, 1512)))


def longest_allowed() -> float:
    """5 ms, or more on a machine so slow that it takes a tenth of that to copy 1 MiB, or for 25,000 turns of a loop
    in Python."""
    source = bytes(2**20)

    def count() -> None:
        for _ in range(25_000):
            pass

    def seconds(step: Callable[[], object]) -> float:
        begun = time.thread_time()
        step()
        return time.thread_time() - begun

    return max(
        0.005, *(10 * min(seconds(step) for _ in range(10)) for step in (lambda: bytearray(source), count))
    )


@contextmanager
def callbacks(running: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Processor seconds of every callback of the server's loop: what other threads do is not counted."""
    taken: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: Any) -> None:
        begun = time.thread_time()
        run(handle)
        if handle._loop is running.loop:
            taken.append(time.thread_time() - begun)

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", timed)
        yield taken


def test_no_callback_is_long_for_151_megabytes(
    precomputed: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = precomputed()

    def longest() -> float:
        with Client(running.address) as client, callbacks(running, monkeypatch) as taken:
            [(_, result)] = client.stream([LONG], attentions=True)
        assert result.attentions.nbytes == NUM_BYTES == 150_994_944
        expected = Precomputed(fresh=False)._bytes.view(np.float32)
        np.testing.assert_array_equal(result.attentions.reshape(-1), expected)
        assert len(taken) > NUM_BYTES / running.server.config.frame_bytes
        return max(taken)

    assert_sometimes_short(longest)


def test_no_callback_is_long_for_the_largest_unary_reply(
    precomputed: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = precomputed()

    def longest() -> float:
        with Client(running.address) as client, callbacks(running, monkeypatch) as taken:
            result = client.encode(LONG, hidden_states=[0, 1])
        assert result.hidden_states.nbytes == 3 * 2**20
        return max(taken)

    assert_sometimes_short(longest)


def test_no_callback_is_long_for_the_largest_requests(
    precomputed: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would take protobuf or numpy more than that, at once."""
    running = precomputed()
    ids = pb.TokenIds(ids=range(1000, 1512))
    asked = [
        pb.EncodeRequest(inputs=[pb.Input(token_ids=ids)] * 1024),
        pb.EncodeRequest(inputs=[pb.Input(text="some text")] * 1024),
        pb.EncodeRequest(inputs=[pb.Input()] * 1_000_000),
        pb.EncodeRequest(inputs=[pb.Input(token_ids=pb.TokenIds(ids=[1] * 3_000_000))]),
    ]
    for request in asked:
        request.outputs.embeddings.add(dimensions=1)
    messages = [request.SerializeToString() for request in asked]

    def longest(message: bytes, is_answered: bool) -> float:
        with grpc.insecure_channel(running.address) as channel, callbacks(running, monkeypatch) as taken:
            encode = channel.unary_unary("/layertap.v1.EncoderService/Encode")
            try:
                assert len(pb.EncodeResponse.FromString(encode(message)).results) == 1024
                assert is_answered
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017
                assert not is_answered
        return max(taken)

    for message, is_answered in zip(messages, (True, True, False, False), strict=True):
        assert_sometimes_short(partial(longest, message, is_answered))


def assert_sometimes_short(longest: Callable[[], float]) -> None:
    """What is long is long each time; pages that the machine has to find first are not. Nor is what this
    process holds beside the server the server's: to look through that for garbage takes 30 ms."""
    gc.collect()
    gc.freeze()
    try:
        assert any(longest() < longest_allowed() for _ in range(5))
    finally:
        gc.unfreeze()


def attention_request(request_id: int) -> pb.EncodeStreamRequest:
    request = pb.EncodeRequest(
        inputs=[pb.Input(token_ids=pb.TokenIds(ids=LONG.ids))],
        outputs=pb.OutputSelection(attentions=pb.AttentionSelection(heads=[0])),
    )
    return pb.EncodeStreamRequest(request_id=request_id, request=request)


@contextmanager
def stopped_reader(address: str) -> Iterator[pb.EncodeStreamResponse]:
    """A caller that reads the first frame of its 12 MB, and no more."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options) as channel:
        call = stub_of(channel).EncodeStream(iter([attention_request(1)]))
        yield parse_frame(next(call))[0]
        call.cancel()


def test_readers_who_stop_hold_the_budget_and_no_more(
    precomputed: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those for whom there is no room are told so, and the SDK comes again until there is."""
    monkeypatch.setattr("layertap_server.api.service.RETRY_LATER_S", 0.01)
    limit = 40_000_000  # three such results
    running = precomputed(max_inflight_result_bytes=limit, max_result_bytes=limit, frame_bytes=1 << 18)
    budget = running.server.service.budget
    with ThreadPoolExecutor(1) as worker, Client(running.address) as client, ExitStack() as readers:
        first = [readers.enter_context(stopped_reader(running.address)) for _ in range(5)]
        assert [frame.HasField("header") for frame in first] == [True, True, True, False, False]
        assert {frame.end.status.code for frame in first[3:]} == {grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]}
        assert 0.9 * limit < running.call(lambda: budget.reserved_bytes) <= limit
        with pytest.raises(ResourceExhausted, match="max_inflight_result_bytes") as refused:
            client.encode(LONG, hidden_states=[0, 1])
        assert refused.value.retry_after_s is not None

        refusing = threading.Event()

        def overloaded(*args: Any) -> errors.RequestError:
            refusing.set()
            return refuse(*args)

        refuse = errors.overloaded
        monkeypatch.setattr(errors, "overloaded", overloaded)
        results = client.stream([LONG, LONG], attentions=Attentions(heads=[0]))
        waiting = worker.submit(lambda: [index for index, _ in results])
        assert refusing.wait(30)
        readers.close()
        assert waiting.result(60) == [0, 1]

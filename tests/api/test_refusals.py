"""Good requests that get no result: too large, too many, too late, or by our own fault."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from harness import IS_LINKED, Running, serve
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.api.early_rejection import EarlyRejection
from layertap_server.api.service import SERVICE_NAME
from layertap_server.plan import Work
from layertap_server.scheduling.cost_model import CostModel
from server.support import (
    CLS,
    SEP,
    WAIT_S,
    Refusal,
    array,
    eventually,
    gated,
    large,
    needs_fast_server,
    needs_one_process,
    read_error,
    read_status,
    refusal_of,
    served,
    streaming,
    texts,
    tokens,
)

pytestmark = pytest.mark.usefixtures("unharmed")

SHORT_S = 0.25
"""A deadline that passes while the gate is closed."""


# ----------------------------------------------------------------------------------- sizes


def test_a_reply_too_large_for_one_message_is_refused_uncomputed_and_streams(
    server: Running, stub: EncoderServiceStub
) -> None:
    asked = large(num_copies=600)
    with gated(server) as gate:
        refusal = refusal_of(stub.Encode, asked, timeout=WAIT_S)
        assert gate.batches == []
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "REPLY_TOO_LARGE")
    num_bytes = int(refusal.metadata["reply_bytes"])
    assert refusal.metadata["limit_bytes"] == str(4 * 2**20)
    assert f"{num_bytes} bytes" in refusal.message
    assert "EncodeStream" in refusal.message

    with streaming(stub) as stream:
        stream.send(1, asked)
        reply = stream.reply()
    whole = pb.EncodeResponse(results=reply.results, timing=reply.timing)
    assert num_bytes - 64 <= whole.ByteSize() <= num_bytes


def test_the_largest_reply_that_fits_is_sent(stub: EncoderServiceStub) -> None:
    # 511 copies of 64 × 128 bytes, and the rest of the message: within 8 KiB of the limit.
    [result] = stub.Encode(large(511), timeout=WAIT_S).results
    num_bytes = len(result.hidden_states.data)
    assert num_bytes == 511 * 64 * 128
    with pytest.raises(grpc.RpcError):
        stub.Encode(large(512), timeout=WAIT_S)


def test_a_result_too_large_for_a_stream(server: Running, stub: EncoderServiceStub) -> None:
    asked = pb.EncodeRequest(outputs=large(600).outputs, inputs=list(large(1).inputs) * 20)
    with gated(server) as gate, streaming(stub) as stream:
        stream.send(1, asked)
        refusal = read_status(stream.reply().status)
        assert gate.batches == []
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "RESULT_TOO_LARGE")
    assert int(refusal.metadata["reply_bytes"]) > 64 * 2**20 == int(refusal.metadata["limit_bytes"])


def test_tokens_too_large_for_one_message(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = server.server.service
    small = replace(service.config, max_message_bytes=65536)
    monkeypatch.setattr(service, "config", small)
    monkeypatch.setattr(service.answering, "_config", small)
    inputs = [pb.Input(text="the " * 62)] * 150
    refusal = refusal_of(stub.Tokenize, pb.TokenizeRequest(inputs=inputs), timeout=WAIT_S)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "REPLY_TOO_LARGE")
    outputs = pb.OutputSelection(tokens=True)
    refusal = refusal_of(stub.Encode, pb.EncodeRequest(inputs=inputs, outputs=outputs), timeout=WAIT_S)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "REPLY_TOO_LARGE")


# -------------------------------------------------------------------------------- overload


def test_queue_full(server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = served(server).scheduler
    with gated(server) as gate:
        running = stub.Encode.future(tokens([CLS, 9, SEP]), timeout=WAIT_S)
        gate.wait_for_batch()
        monkeypatch.setattr(scheduler.admission, "max_queue_tokens", 10)
        queued = stub.Encode.future(tokens([CLS, 9, 9, SEP]), timeout=WAIT_S)
        eventually(server, lambda: scheduler.queued_tokens == 4)
        refusal = refusal_of(stub.Encode, tokens([CLS, *[9] * 5, SEP]), timeout=WAIT_S)
        fits = stub.Encode.future(tokens([CLS, *[9] * 4, SEP]), timeout=WAIT_S)
        eventually(server, lambda: scheduler.queued_tokens == 10)
        gate.open()
        for answered in (running, queued, fits):
            assert len(answered.result().results) == 1
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert refusal.retry_s > 0


def test_result_bytes_full(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = server.server.service.budget
    with gated(server) as gate:
        held = stub.Encode.future(large(10), timeout=WAIT_S)
        gate.wait_for_batch()
        monkeypatch.setattr(budget, "limit_bytes", budget.reserved_bytes + 10_000)
        refusal = refusal_of(stub.Encode, large(2), timeout=WAIT_S)
        fits = stub.Encode.future(large(1), timeout=WAIT_S)
        eventually(server, lambda: served(server).scheduler.queued_tokens == 64)
        gate.open()
        for answered in (held, fits):
            assert len(answered.result().results) == 1
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RESULT_BYTES_FULL")
    assert refusal.retry_s > 0


def test_a_deadline_that_cannot_be_met(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served(server).scheduler.admission, "cost", CostModel(fixed_ns=1e9 * WAIT_S * 2))
    with gated(server) as gate:
        running = stub.Encode.future(texts("a"), timeout=WAIT_S)
        gate.wait_for_batch()
        refusal = refusal_of(stub.Encode, texts("a"), timeout=WAIT_S)
        with streaming(stub) as stream:
            stream.send(1, texts("a"))
            streamed = read_status(stream.reply().status)
        patient = stub.Encode.future(texts("a"))
        eventually(server, lambda: served(server).scheduler.queued_tokens == 3)
        gate.open()
        assert running.result().results
        assert patient.result().results, "without a deadline it is served"
        assert len(gate.batches) == 2
    for one in (refusal, streamed):
        assert (one.code, one.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE")
        assert one.retry_s > 0


@needs_one_process
@needs_fast_server
def test_while_others_are_refused_for_load_the_loop_need_not_hear_of_it(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served(server).scheduler.admission, "cost", CostModel(fixed_ns=1e9 * WAIT_S * 2))
    service, goes_on = server.server.service, threading.Event()

    def refused(asked: pb.EncodeRequest) -> Refusal:
        monkeypatch.setattr(service, "overloaded_s", math.inf)  # one was refused just now
        return refusal_of(stub.Encode, asked, timeout=WAIT_S)

    with gated(server) as gate:
        running = stub.Encode.future(texts("a"), timeout=WAIT_S)
        gate.wait_for_batch()
        usual = refusal_of(stub.Encode, texts("a"), timeout=WAIT_S)
        num_before = service.refused["DEADLINE_UNREACHABLE"]
        server.loop.call_soon_threadsafe(goes_on.wait)
        try:
            early = refused(texts("a"))
        finally:
            goes_on.set()
        assert service.refused["DEADLINE_UNREACHABLE"] == num_before + 1
        # Other errors are reported as usual.
        assert refused(texts("a", model="none")).reason == "MODEL_NOT_FOUND"
        assert refused(tokens([CLS, 10**6, SEP], priority=77)).reason == "UNKNOWN_ENUM"
        monkeypatch.setattr(service, "overloaded_s", math.inf)
        patient = stub.Encode.future(texts("a"))
        eventually(server, lambda: served(server).scheduler.queued_tokens == 3)
        gate.open()
        assert running.result().results
        assert patient.result().results, "without a deadline it is served"
    assert (early.code, early.reason) == (usual.code, usual.reason)
    assert early.retry_s > 0
    assert "the predicted time of" in early.message


@needs_one_process
@needs_fast_server
def test_a_verdict_stands_for_who_asks_for_the_same_in_no_more_time(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, num_checks = server.server.service, 0
    check = service.answering.check

    def counting(*asked: Any) -> float:
        nonlocal num_checks
        num_checks += 1
        return check(*asked)

    monkeypatch.setattr(service.answering, "check", counting)
    monkeypatch.setitem(server.server._grpc.early_checks, f"/{SERVICE_NAME}/Encode", EarlyRejection(service))
    monkeypatch.setattr("layertap_server.api.early_rejection.MAX_CACHED_S", WAIT_S)
    # An hour of work is ahead, so that a cached refusal, valid for a share of that, outlives the test.
    monkeypatch.setattr(served(server).scheduler.admission, "cost", CostModel(fixed_ns=3600e9))

    def refused(asked: pb.EncodeRequest, client: str = "one", timeout: float = WAIT_S) -> Refusal:
        metadata = (("layertap-client", client),)
        return refusal_of(stub.Encode, asked, timeout=timeout, metadata=metadata)

    with gated(server) as gate:
        running = stub.Encode.future(texts("a"), timeout=WAIT_S)
        gate.wait_for_batch()
        monkeypatch.setattr(service, "overloaded_s", math.inf)  # one was refused just now
        num_checks, num_before = 0, service.refused["DEADLINE_UNREACHABLE"]
        first = refused(texts("a"))
        assert num_checks == 1
        assert (first.code, first.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE")
        assert first.retry_s > 0
        for asked, timeout in ((texts("a"), WAIT_S), (texts("b", "c"), WAIT_S), (texts("a"), WAIT_S / 2)):
            assert refused(asked, timeout=timeout) == first
        assert num_checks == 1
        assert service.refused["DEADLINE_UNREACHABLE"] == num_before + 4

        # Any other request is checked by itself.
        refused(texts("a"), client="another")
        refused(texts("a", priority=pb.PRIORITY_HIGH))
        assert num_checks == 3
        assert refused(texts("a"), timeout=4 * WAIT_S).retry_s > 0
        assert num_checks == 4, "with so much more time left it might have been done"
        assert refusal_of(stub.Encode, texts(), timeout=WAIT_S).code is grpc.StatusCode.INVALID_ARGUMENT
        assert num_checks == 4
        patient = stub.Encode.future(texts("a"))
        eventually(server, lambda: served(server).scheduler.queued_tokens == 3)
        assert num_checks == 5
        gate.open()
        assert running.result().results
        assert patient.result().results, "without a deadline it is served"
    one = (("layertap-client", "one"),)
    assert stub.Encode(texts("a"), timeout=WAIT_S, metadata=one).results, "an idle engine takes what comes"


@needs_fast_server
def test_a_verdict_is_not_for_long(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = server.server.service
    monkeypatch.setitem(server.server._grpc.early_checks, f"/{SERVICE_NAME}/Encode", EarlyRejection(service))
    monkeypatch.setattr("layertap_server.api.early_rejection.CACHED_SHARE", 0.0)
    admission = served(server).scheduler.admission
    with gated(server) as gate:
        running = stub.Encode.future(texts("a"), timeout=WAIT_S)
        gate.wait_for_batch()
        monkeypatch.setattr(service, "overloaded_s", math.inf)
        with monkeypatch.context() as slow:
            slow.setattr(admission, "cost", CostModel(fixed_ns=3600e9))
            assert refusal_of(stub.Encode, texts("a"), timeout=WAIT_S).reason == "DEADLINE_UNREACHABLE"
        taken = stub.Encode.future(texts("a"), timeout=WAIT_S / 2)
        eventually(server, lambda: served(server).scheduler.queued_tokens == 3)
        gate.open()
        assert running.result().results
        assert taken.result().results


def test_what_is_past_its_deadline_in_the_queue_is_never_computed(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Predictions are 0, so that a request is rejected for its deadline only after that has passed.
    monkeypatch.setattr(served(server).scheduler.admission, "cost", CostModel())
    late, late_on_stream = 77, 78
    with gated(server) as gate:
        running = stub.Encode.future(texts("a"), timeout=WAIT_S)
        gate.wait_for_batch()
        with streaming(stub, timeout=SHORT_S) as stream:
            stream.send(1, tokens([CLS, late_on_stream, SEP]))
            with pytest.raises(grpc.RpcError) as refused:
                stub.Encode(tokens([CLS, late, SEP]), timeout=SHORT_S)
            assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            with pytest.raises(grpc.RpcError) as refused:
                stream.reply()
            assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(server, lambda: served(server).scheduler.queued_tokens == 0)
        gate.open()
        assert running.result().results
        assert stub.Encode(texts("a"), timeout=WAIT_S).results
        assert not {late, late_on_stream} & gate.seen_ids


# ------------------------------------------------------------------------------- our fault

POISON = 99


def fail_on_poison(works: Sequence[Work]) -> None:
    if any(POISON in work.input_ids for work in works):
        raise RuntimeError("the secret detail")


def test_a_poison_input_fails_alone(
    server: Running, stub: EncoderServiceStub, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [tokens([CLS, number, SEP], [CLS, number, number, SEP]) for number in range(90, 110)]
    alone = [stub.Encode(one, timeout=WAIT_S).results for one in asked]
    with gated(server) as gate:
        gate.fault = fail_on_poison
        first = stub.Encode.future(texts("a"), timeout=WAIT_S)
        gate.wait_for_batch()
        answers = [stub.Encode.future(one, timeout=WAIT_S) for one in asked]
        eventually(server, lambda: served(server).scheduler.queued_tokens == 20 * 7)
        gate.open()
        assert first.result().results
        gate.wait_for_batch()
        assert len(gate.batches[1]) == 40, "one batch"
        for number, answer, expected in zip(range(90, 110), answers, alone, strict=True):
            if number == POISON:
                refusal = read_error(answer.exception())
                continue
            for got, wanted in zip(answer.result().results, expected, strict=True):
                np.testing.assert_allclose(
                    array(got.embeddings[0]), array(wanted.embeddings[0]), atol=2e-5, rtol=1e-4
                )
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in str(refusal)
    [record] = [record for record in caplog.records if refusal.metadata["error_id"] in record.getMessage()]
    assert record.levelno == logging.ERROR
    assert "the secret detail" in str(record.exc_info[1])
    assert refusal.metadata["error_id"] in refusal.message


def test_a_failed_request_on_a_stream_is_internal_too(server: Running, stub: EncoderServiceStub) -> None:
    with gated(server) as gate, streaming(stub) as stream:
        gate.fault = fail_on_poison
        gate.open()
        stream.send(1, tokens([CLS, POISON, SEP]))
        refusal = read_status(stream.reply().status)
        stream.send(2, tokens([CLS, 98, SEP]))
        assert stream.reply().status.code == 0
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in str(refusal)


def test_a_dead_engine_leaves_nobody_waiting(folders: dict[str, Path]) -> None:
    class DeadError(BaseException):
        pass

    def die(works: Sequence[Work]) -> None:
        raise DeadError("the secret detail")

    with serve({"bert": folders["bert"]}) as server, grpc.insecure_channel(server.address) as channel:
        stub = EncoderServiceStub(channel)
        with gated(server) as gate:
            gate.fault = die
            running = stub.Encode.future(texts("a"), timeout=WAIT_S)
            gate.wait_for_batch()
            queued = [stub.Encode.future(texts("a b"), timeout=WAIT_S) for _ in range(3)]
            eventually(server, lambda: served(server).scheduler.queued_tokens == 12)
            gate.open()
            for waiting in (running, *queued):
                refusal = read_error(waiting.exception())
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DOWN")
                assert "secret" not in str(refusal)
            refusal = refusal_of(stub.Encode, texts("a"), timeout=WAIT_S)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DOWN")
            assert refusal.retry_s > 0
            # The trial after the restart fails too: the process must exit, with a status other than 0. A front
            # goes on; the supervisor starts another engine process.
            if not IS_LINKED:
                eventually(server, lambda: server.server.failed and server.server._stopping.is_set())

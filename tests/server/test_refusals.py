"""Good requests that get no result: too large, too many, too late, too early, not allowed, our fault."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

import harness
from harness import Running, serve
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server import app
from layertap_server.cost import CostModel
from layertap_server.plan import Work
from layertap_server.service import Phase

from .support import (
    CLS,
    SEP,
    WAIT_S,
    array,
    eventually,
    gated,
    large,
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
    monkeypatch.setattr(service, "config", replace(service.config, max_message_bytes=65536))
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
        monkeypatch.setattr(scheduler, "max_queue_tokens", 10)
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
    monkeypatch.setattr(served(server).scheduler, "cost", CostModel(fixed_ns=1e9 * WAIT_S * 2))
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


def test_what_is_past_its_deadline_in_the_queue_is_never_computed(
    server: Running, stub: EncoderServiceStub
) -> None:
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


# ------------------------------------------------------------------------- loading, draining


def test_while_the_models_load(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[app.Server] = []
    loading, go = threading.Event(), threading.Event()
    load = app.load

    class Watched(app.Server):
        async def startup(self) -> None:
            started.append(self)
            await super().startup()

    def gated_load(*args: object) -> object:
        loading.set()
        assert go.wait(WAIT_S)
        return load(*args)

    monkeypatch.setattr(harness, "Server", Watched)
    monkeypatch.setattr(app, "load", gated_load)
    with ThreadPoolExecutor(1) as worker, ExitStack() as stack:
        starting = worker.submit(stack.enter_context, serve({"bert": folders["bert"]}))
        try:
            assert loading.wait(WAIT_S)
            with grpc.insecure_channel(started[0].address) as channel:
                stub = EncoderServiceStub(channel)
                for call, asked in (
                    (stub.Encode, texts("a")),
                    (stub.ListModels, pb.ListModelsRequest()),
                    (
                        lambda message, timeout: list(stub.EncodeStream(iter([message]), timeout=timeout)),
                        pb.EncodeStreamRequest(),
                    ),
                ):
                    refusal = refusal_of(call, asked, timeout=WAIT_S)
                    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "LOADING")
                    assert refusal.retry_s > 0
                go.set()
                assert starting.result(WAIT_S).address == started[0].address
                assert stub.Encode(texts("a"), timeout=WAIT_S).results
        finally:
            go.set()


def test_while_draining(folders: dict[str, Path]) -> None:
    with (
        serve({"bert": folders["bert"]}, grace_s=WAIT_S) as server,
        grpc.insecure_channel(server.address) as channel,
        ThreadPoolExecutor(1) as worker,
    ):
        stub = EncoderServiceStub(channel)
        with gated(server) as gate:
            accepted = stub.Encode.future(texts("a"), timeout=WAIT_S)
            gate.wait_for_batch()
            draining = worker.submit(server.call, server.server.shutdown)
            eventually(server, lambda: server.server.service.phase is Phase.DRAINING)
            refusal = refusal_of(stub.Encode, texts("a"), timeout=WAIT_S)
            assert not draining.done()
            gate.open()
            assert accepted.result().results
            draining.result(WAIT_S)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert refusal.retry_s > 0


# ----------------------------------------------------------------------------- credentials


@pytest.fixture(scope="module")
def guarded(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    tokens_file = tmp_path_factory.mktemp("guard") / "tokens.toml"
    tokens_file.write_text(
        "[clients.all]\ntoken = 'everything'\n[clients.half]\ntoken = 'only-one'\nmodels = ['one']\n",
        encoding="utf-8",
    )
    with serve({"one": folders["bert"], "two": folders["bert"]}, tokens_file=str(tokens_file)) as running:
        yield running


def test_credentials(guarded: Running) -> None:
    def bearer(token: str) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {token}")]

    with grpc.insecure_channel(guarded.address) as channel:
        stub = EncoderServiceStub(channel)
        for metadata, reason in ((None, "MISSING_CREDENTIALS"), (bearer("guess"), "INVALID_CREDENTIALS")):
            for refusal in (
                refusal_of(stub.Encode, texts("a"), timeout=WAIT_S, metadata=metadata),
                refusal_of(stub.ListModels, pb.ListModelsRequest(), timeout=WAIT_S, metadata=metadata),
                refusal_of(
                    lambda **kwargs: list(stub.EncodeStream(iter([]), **kwargs)),
                    timeout=WAIT_S,
                    metadata=metadata,
                ),
            ):
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
                assert refusal.domain == "layertap"

        half = {"timeout": WAIT_S, "metadata": bearer("only-one")}
        for call, asked in (
            (stub.Encode, texts("a", model="two")),
            (stub.Tokenize, pb.TokenizeRequest(model="two")),
            (stub.GetModel, pb.GetModelRequest(model="two")),
        ):
            refusal = refusal_of(call, asked, **half)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "MODEL_NOT_ALLOWED")
        # What a client may not use is not named to it either.
        unknown = refusal_of(stub.Encode, texts("a", model="three"), **half)
        assert unknown.code is grpc.StatusCode.NOT_FOUND
        assert "two" not in str(unknown)
        assert [model.name for model in stub.ListModels(pb.ListModelsRequest(), **half).models] == ["one"]
        assert stub.Encode(texts("a", model="one"), **half).results
        everything = {"timeout": WAIT_S, "metadata": bearer("everything")}
        assert stub.Encode(texts("a", model="two"), **everything).results
        assert len(stub.ListModels(pb.ListModelsRequest(), **everything).models) == 2


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
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
                assert "secret" not in str(refusal)
            refusal = refusal_of(stub.Encode, texts("a"), timeout=WAIT_S)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DOWN")
            assert refusal.retry_s > 0
            # The process is to leave, and to say so by its exit status.
            eventually(server, lambda: server.server.failed and server.server._stopping.is_set())

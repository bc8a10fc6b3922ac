"""An engine's thread that dies or hangs: everyone is answered, health tells, and what can be mended is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from harness import IS_LINKED, serve
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.plan import Work
from layertap_server.serving import EngineState
from server.support import WAIT_S, eventually, gated, read_error, refusal_of, served, texts

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class DeadError(BaseException):
    pass


def test_a_thread_that_dies_is_started_again(folders: dict[str, Path]) -> None:
    faults = [DeadError()]

    def die_once(works: Sequence[Work]) -> None:
        if faults:
            raise faults.pop()

    with serve({"bert": folders["bert"]}) as server, grpc.insecure_channel(server.address) as channel:
        stub, model = EncoderServiceStub(channel), served(server)
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(health).status == SERVING
        with gated(server) as gate:
            gate.fault = die_once
            running = stub.Encode.future(texts("a"), timeout=WAIT_S)
            gate.wait_for_batch()
            queued = stub.Encode.future(texts("a b"), timeout=WAIT_S)
            eventually(server, lambda: model.scheduler.queued_tokens == 4)
            gate.open()
            for waiting in (running, queued):
                refusal = read_error(waiting.exception())
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DOWN")
                assert refusal.retry_s > 0
            eventually(server, lambda: model.host.num_restarts == 1 and model.state is EngineState.UP)
            assert stub.Encode(texts("a"), timeout=WAIT_S).results
        assert [next(health).status, next(health).status] == [NOT_SERVING, SERVING]
        health.cancel()
        assert not server.server.failed


def test_a_pass_that_hangs_is_noticed(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    settings = {"engine_timeout_s": 0.1}
    with (
        serve({"bert": folders["bert"]}, **settings) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = EncoderServiceStub(channel)
        with gated(server) as gate:
            running = stub.Encode.future(texts("a"), timeout=WAIT_S)
            gate.wait_for_batch()
            queued = stub.Encode.future(texts("a b"), timeout=WAIT_S)
            for waiting in (running, queued):
                refusal = read_error(waiting.exception())
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DOWN")
            refusal = refusal_of(stub.Encode, texts("a"), timeout=WAIT_S)
            assert refusal.reason == "ENGINE_DOWN"
            # The process must exit, with a status other than 0; a front goes on.
            if not IS_LINKED:
                eventually(server, lambda: server.server.failed and server.server._stopping.is_set())
    assert "hangs" in caplog.text

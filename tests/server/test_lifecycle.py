"""The real process: start-up lines, health, signals, sockets, and why it would not start."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server import app
from layertap_server.config import Config
from server.process import START_S, Process, process
from server.support import WAIT_S, Stream, assemble, large, read_error, streaming, texts, tokens

# A model whose passes never end.
HANGING = (
    sys.executable,
    str(Path(__file__).with_name("hanging_server.py")),
    "--port=0",
    "--model=fake=fake",
)
SERVICE = "layertap.v1.EncoderService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_whole_life(folders: dict[str, Path], tmp_path: Path) -> None:
    """With two models, on TCP and a Unix socket; a request is under way at SIGTERM."""
    unix_socket = tmp_path / "layertap.sock"
    models = [f"--model=first={folders['bert']}", f"--model=second={folders['distilbert']}"]
    with process("--port=0", "--grace-s=600", f"--unix-socket={unix_socket}", *models) as running:
        address = running.wait_until_serving()
        for name, architecture in (("first", "bert"), ("second", "distilbert")):
            said = [line for line in running.lines if f"{name}: {architecture}" in line]
            assert len(said) == 1
            assert "4 layers, hidden size 32, 4 heads, up to 64 tokens" in said[0]
            assert "float32 on cpu" in said[0]
        assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ", line) for line in running.lines)

        with (
            grpc.insecure_channel(f"unix:{unix_socket}") as local,
            grpc.insecure_channel(address) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", SERVICE):
                request = health_pb2.HealthCheckRequest(service=name)
                assert health.Check(request, timeout=WAIT_S).status == SERVING
            stub = EncoderServiceStub(channel)
            served = stub.ListModels(pb.ListModelsRequest(), timeout=WAIT_S).models
            assert [(model.name, model.has_pooler) for model in served] == [
                ("first", True),
                ("second", False),
            ]
            first, second, default = (
                stub.Encode(texts("the text", model=name), timeout=WAIT_S).results
                for name in ("first", "second", "")
            )
            assert default == first != second
            assert EncoderServiceStub(local).Encode(texts("the text"), timeout=WAIT_S).results == first

            watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=WAIT_S)
            assert next(watch).status == SERVING
            with streaming(stub) as stream:
                for request_id in range(3):
                    stream.send(request_id, large(1000))
                frames = [next(iter(stream))]
                running.send(signal.SIGTERM)
                # No more replies are read until it is known to be stopping.
                assert next(watch).status == NOT_SERVING
                watch.cancel()
                replies = assemble(read_all(stream, frames))
            under_way = replies[frames[0].request_id]
            assert under_way.status.code == 0
            assert len(under_way.results[0].hidden_states.data) == 1000 * 64 * 128
            assert all(reply.status is not None for reply in replies.values())
        assert running.wait() == 0
        assert not unix_socket.exists()
        assert running.lines[-1].endswith("INFO stopped")


def read_all(stream: Stream, frames: list[pb.EncodeStreamResponse]) -> list[pb.EncodeStreamResponse]:
    """All further frames, up to UNAVAILABLE: the stream was open when draining began."""
    with pytest.raises(grpc.RpcError) as ended:
        frames.extend(stream)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    return frames


@pytest.mark.long
def test_ctrl_c(folders: dict[str, Path]) -> None:
    with process("--port=0", "--grace-s=600", f"--model={folders['bert']}") as running:
        with grpc.insecure_channel(running.wait_until_serving()) as channel:
            model = EncoderServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=WAIT_S).model
            assert model.name == "bert", "a folder goes by its basename"
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), timeout=START_S
            )
            assert next(watch).status == SERVING
            running.send(signal.SIGINT)
            assert running.wait() == 0, "whoever watches the health is not waited for"
            assert next(watch).status == NOT_SERVING
        assert not any("Traceback" in line for line in running.lines)


@pytest.mark.long
def test_told_to_stop_while_loading(folders: dict[str, Path], tmp_path: Path) -> None:
    unix_socket = tmp_path / "layertap.sock"
    models = [f"--model={number}={folders['bert']}" for number in range(50)]
    with process("--port=0", f"--unix-socket={unix_socket}", *models) as running:
        running.wait_for_line("loading 0 from")
        running.send(signal.SIGTERM)
        assert running.wait() == 0
        assert running.lines[-1].endswith("INFO signal to stop while loading; exiting")
        assert not unix_socket.exists()


def test_told_to_stop_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    server = app.Server(Config(model=("a",)))
    for now, expected in ((100.0, []), (100.001, []), (100.9, []), (101.1, [1])):
        server.stop(lambda now=now: now)  # type: ignore[misc]
        assert left == expected
        assert server._stopping.is_set()


def test_two_signals_at_once_are_one() -> None:
    """As from `timeout`, which tells the process and then its group."""
    with process(command=HANGING) as running:
        running.wait_until_serving()
        running.send(signal.SIGINT)
        running.send(signal.SIGTERM)
        assert running.wait() == 0
    assert running.lines[-1].endswith("INFO stopped")


def test_a_signal_after_an_engine_was_lost_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    server = app.Server(Config(model=("a",)))
    server._stopping.set()
    server.stop(lambda: 100.0)
    assert left == []


# ------------------------------------------------------------------- passes that never end


def refusals_of_the_hanging(running: Process, then: Callable[[], None]) -> set[tuple[grpc.StatusCode, str]]:
    """What callers are told of a pass that hangs, once something happens."""
    with grpc.insecure_channel(running.wait_until_serving()) as channel:
        stub = EncoderServiceStub(channel)
        calls = [stub.Encode.future(tokens([1, 2]), timeout=START_S) for _ in range(3)]
        # Answered on the event loop, after it has accepted the others.
        stub.GetModel(pb.GetModelRequest(), timeout=WAIT_S)
        then()
        refusals = [read_error(call.exception()) for call in calls]
        return {(refusal.code, refusal.reason) for refusal in refusals}


def test_it_leaves_after_the_grace_period_though_a_pass_hangs() -> None:
    with process("--grace-s=0.2", command=HANGING) as running:
        refusals = refusals_of_the_hanging(running, lambda: running.send(signal.SIGTERM))
        assert refusals == {(grpc.StatusCode.UNAVAILABLE, "ENGINE_DOWN")}
        assert running.wait() == 1
    assert any(
        "ERROR requests are unfinished after grace_s, 0.2 s; they fail with UNAVAILABLE" in line
        for line in running.lines
    )
    assert any(
        "ERROR fake: a forward pass or the tokenizer is still running; exiting" in line
        for line in running.lines
    )
    assert running.lines[-1].endswith("INFO stopped")


def test_a_process_whose_engine_is_given_up_ends_with_1() -> None:
    """Without Python's own end, which is SIGABRT where a thread is inside native code in C++."""
    with process("--engine-timeout-s=0.2", command=HANGING) as running:
        refusals = refusals_of_the_hanging(running, lambda: None)
        assert refusals == {(grpc.StatusCode.UNAVAILABLE, "ENGINE_DOWN")}
        assert running.wait() == 1
    assert any("the engine hangs in a forward pass" in line for line in running.lines)
    assert any(
        "ERROR fake: a forward pass or the tokenizer is still running; exiting" in line
        for line in running.lines
    )
    assert running.lines[-1].endswith("INFO stopped")


# ---------------------------------------------------------------------- it does not start


def only_error(stopped: Process) -> str:
    assert stopped.wait() == 1
    assert not any("Traceback" in line or "Exception" in line for line in stopped.lines)
    [said] = [line for line in stopped.lines if " ERROR " in line]
    assert stopped.lines[-1] == said
    return said


def test_a_port_in_use(folders: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process(f"--port={port}", f"--model={folders['bert']}") as stopped:
            assert f"cannot listen on 127.0.0.1:{port}: it is in use" in only_error(stopped)
    assert len(stopped.lines) == 1, "and gRPC says nothing of it"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    unix_socket = tmp_path / "layertap.sock"
    with process("--port=0", f"--unix-socket={unix_socket}", f"--model={tmp_path}/nowhere") as stopped:
        assert f"there is no folder '{tmp_path}/nowhere'" in only_error(stopped)
    assert not unix_socket.exists()

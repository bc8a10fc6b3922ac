"""The server as several processes: the same answers, the same health and metrics, and an end in order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import layertap
from harness import Running
from layertap_server.config import Config
from layertap_server.link.plans import VERSION
from layertap_server.processes.front import LinkedModels
from server.process import Process, process
from server.support import WAIT_S
from server.test_metrics import free_port, scrape

FRONT_MB = 120


def children(pid: int) -> dict[int, str]:
    """The processes that a supervisor has started, with their command lines."""
    found = {}
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    for child in map(int, listed.split()):
        found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def pids(server: Process, module: str) -> list[int]:
    return [pid for pid, command in children(server.pid).items() if f"processes.{module}" in command]


def resident_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 1024


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text(encoding="ascii", errors="replace")


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def several(folders: dict[str, Path], metrics_port: int) -> Iterator[tuple[Process, str]]:
    flags = [f"--model={name}={folder}" for name, folder in folders.items()]
    with process("--port=0", "--fronts=2", f"--metrics-port={metrics_port}", *flags) as server:
        yield server, server.wait_until_serving()


@pytest.mark.parametrize("name", ["bert", "distilbert", "esm"])
def test_the_answers_are_those_of_one_process(
    several: tuple[Process, str], server: Running, name: str
) -> None:
    _, address = several
    contents = ["MKTAYIAK", "MKV"] if name == "esm" else ["the server is well", "a", "what a day it is " * 5]
    options: layertap.EncodeOptions = {
        "model": name,
        "last_hidden_state": True,
        "hidden_states": [0, -1, 0],
        "attentions": layertap.Attentions(heads=[1, 0, 1]),
        "embeddings": layertap.Embedding(normalize=True),
        "tokens": True,
        "truncation": "end",
    }
    with layertap.Client(server.address) as one, layertap.Client(address) as other:
        for streamed in (False, True):
            wanted, found = (
                [one for _, one in client.stream(contents, **options)]
                if streamed
                else client.encode(contents, **options)
                for client in (one, other)
            )
            assert len(found) == len(contents)
            for ours, theirs in zip(found, wanted, strict=True):
                assert ours.tokens.tokens == theirs.tokens.tokens
                np.testing.assert_array_equal(ours.tokens.ids, theirs.tokens.ids)
                np.testing.assert_allclose(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-5)
                np.testing.assert_allclose(ours.hidden_states, theirs.hidden_states, atol=1e-5)
                np.testing.assert_allclose(ours.attentions, theirs.attentions, atol=1e-5)
                np.testing.assert_allclose(ours.embedding, theirs.embedding, atol=1e-5)


def test_a_client_spreads_its_calls_over_the_fronts(several: tuple[Process, str]) -> None:
    _, address = several
    with layertap.Client(address) as client:
        assert client.model("bert").connections == 2
        texts = ["the server is well"] * 3000
        found = dict(client.stream(texts, model="bert", last_hidden_state=True))
        assert sorted(found) == list(range(3000))
        for one in (found[0], found[1700], found[2999]):
            np.testing.assert_allclose(one.last_hidden_state, found[5].last_hidden_state, atol=1e-5)


def test_large_results_come_out_of_the_arena(several: tuple[Process, str], metrics_port: int) -> None:
    _, address = several
    ids = layertap.TokenIds([2, *range(5, 30), 3] * 2)
    with layertap.Client(address) as client:
        first = client.encode([ids] * 64, model="bert", hidden_states=True, attentions=True)
        for _ in range(3):
            again = client.encode([ids] * 64, model="bert", hidden_states=True, attentions=True)
            for one, other in zip(first, again, strict=True):
                np.testing.assert_array_equal(one.hidden_states, other.hidden_states)
                np.testing.assert_array_equal(one.attentions, other.attentions)


def test_health_and_metrics_are_those_of_the_server(several: tuple[Process, str], metrics_port: int) -> None:
    _, address = several
    for number in range(6):
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.test", number)]
        with grpc.insecure_channel(address, options) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    found = scrape(metrics_port)
    assert found["layertap_engine_up",] == 1
    assert found["layertap_batches_total",] > 0
    assert found["layertap_process_restarts_total", "engine"] == 0


def test_it_ends_in_order(folders: dict[str, Path]) -> None:
    with process("--port=0", "--fronts=2", f"--model=bert={folders['bert']}") as server:
        address = server.wait_until_serving()
        started = children(server.pid)
        assert len(started) == 3
        with layertap.Client(address) as client:
            assert client.encode("a", last_hidden_state=True).last_hidden_state is not None
        for pid in (server.pid, *pids(server, "front")):
            assert not has_torch(pid)
            assert resident_mb(pid) < FRONT_MB
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait() == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def test_a_port_that_is_taken_is_told_in_one_line(
    several: tuple[Process, str], folders: dict[str, Path]
) -> None:
    _, address = several
    for fronts in ("--fronts=2", "--fronts=0"):
        with process(
            f"--port={address.rpartition(':')[2]}", fronts, f"--model=bert={folders['bert']}"
        ) as second:
            assert second.wait() == 1
            assert "in use" in second.lines[-1]


def test_a_setting_that_cannot_be_used_ends_the_server(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = f"--model=bert={folders['bert']}"
    with process("--port=0", "--fronts=1", model, f"--tokens-file={tmp_path}/none") as server:
        assert server.wait() == 2
        assert sum("ERROR" in line for line in server.lines) == 1, server.lines
        assert not any("Traceback" in line for line in server.lines)


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 7}', encoding="utf-8")
    with process("--port=0", "--fronts=1", f"--model=bad={tmp_path}") as server:
        assert server.wait() == 1
        assert sum("ERROR" in line for line in server.lines) == 1, server.lines
    assert not subprocess.run(["pgrep", "-f", f"bad={tmp_path}"], capture_output=True, check=False).stdout


async def test_a_front_ends_if_a_new_engine_serves_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("layertap_server.processes.front.os._exit", ended.append)
    models = LinkedModels(Config(), lambda: None)
    link = object()
    for words, wanted in (("a", 0), ("a", 0), ("b", 1)):
        described = [{"facts": {}, "tokenizer": {"rust": words}}]
        models._has_said_hello(link, {"version": VERSION, "models": described})  # type: ignore[arg-type]
        assert len(ended) == wanted

"""One real server over three tiny models, shared by the tests of the server's packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from families import build
from harness import Running, serve
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from server.support import WAIT_S, at_rest, eventually, texts

# bert has everything, distilbert no pooler, and esm a tokenizer that is written in Python.
FAMILIES = ("bert", "distilbert", "esm")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        build(name, root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture(scope="session")
def server(folders: dict[str, Path]) -> Iterator[Running]:
    with serve(
        folders, frame_bytes=16384, max_inputs_per_request=300, max_result_bytes=64 * 2**20
    ) as running:
        yield running


@pytest.fixture(scope="session")
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="session")
def stub(channel: grpc.Channel) -> EncoderServiceStub:
    return EncoderServiceStub(channel)


@pytest.fixture(scope="session")
def known_answer(stub: EncoderServiceStub) -> pb.EncodeResponse:
    return stub.Encode(known_request(), timeout=WAIT_S)


def known_request() -> pb.EncodeRequest:
    return texts("the server is well", outputs=pb.OutputSelection(last_hidden_state=True, tokens=True))


@pytest.fixture
def unharmed(
    server: Running,
    stub: EncoderServiceStub,
    known_answer: pb.EncodeResponse,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[None]:
    """Whatever the test did to the server: afterwards it holds nothing, and answers as before."""
    yield
    assert stub.Encode(known_request(), timeout=WAIT_S).results == known_answer.results
    eventually(server, lambda: at_rest(server))
    # Exceptions that nobody awaits end up there.
    assert not [record.getMessage() for record in caplog.get_records("call") if record.name == "asyncio"]

"""Whether anyone, and who, may call: while the models load, while it drains, and with which token."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_channelz.v1 import channelz, channelz_pb2

import harness
from harness import Running, serve
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server import app, model_sources
from layertap_server.api import service
from layertap_server.api.service import Phase
from server.support import WAIT_S, eventually, gated, refusal_of, texts


def test_while_the_models_load(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[app.Server] = []
    loading, go = threading.Event(), threading.Event()
    load = model_sources.load

    class Watched(app.Server):
        async def startup(self) -> None:
            started.append(self)
            await super().startup()

    def gated_load(*args: object) -> object:
        loading.set()
        assert go.wait(WAIT_S)
        return load(*args)

    monkeypatch.setattr(harness, "Server", Watched)
    monkeypatch.setattr(model_sources, "load", gated_load)
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


def test_calls_that_wait_to_be_taken_in_when_it_stops(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC has them already, and the event loop not: left to gRPC, they end as CANCELLED."""
    monkeypatch.setattr(service, "QUIET_S", 1.0)  # however slow the machine is
    with serve({"bert": folders["bert"]}) as server, grpc.insecure_channel(server.address) as channel:
        stub = EncoderServiceStub(channel)

        async def stop_with_calls_waiting() -> list[grpc.Future]:
            until, before = time.monotonic() + WAIT_S, calls_by_server()
            calls = [stub.Encode.future(texts("a"), timeout=WAIT_S) for _ in range(16)]
            pause = threading.Event()
            while (calls_by_server() - before).total() < len(calls):
                pause.wait(0.002)  # this code runs on the event loop, which accepts none of them meanwhile
                assert time.monotonic() < until
            await server.server.shutdown()
            return calls

        refusals = [refusal_of(call.result) for call in server.call(stop_with_calls_waiting)]
    assert {(refusal.code, refusal.reason) for refusal in refusals} == {
        (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    }


def calls_by_server() -> Counter[int]:
    """The calls to each server that this process has, as gRPC counts them: taken in or not."""
    found: Counter[int] = Counter()
    is_last = False
    while not is_last:  # they are listed in pages
        request = channelz_pb2.GetServersRequest(start_server_id=max(found, default=0) + 1)
        page = channelz.ChannelzServicer.GetServers(request, None)
        found.update({one.ref.server_id: one.data.calls_started for one in page.server})
        is_last = page.end
    return found


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
        # The error does not name models that the client may not use.
        unknown = refusal_of(stub.Encode, texts("a", model="three"), **half)
        assert unknown.code is grpc.StatusCode.NOT_FOUND
        assert "two" not in str(unknown)
        assert [model.name for model in stub.ListModels(pb.ListModelsRequest(), **half).models] == ["one"]
        assert stub.Encode(texts("a", model="one"), **half).results
        everything = {"timeout": WAIT_S, "metadata": bearer("everything")}
        assert stub.Encode(texts("a", model="two"), **everything).results
        assert len(stub.ListModels(pb.ListModelsRequest(), **everything).models) == 2

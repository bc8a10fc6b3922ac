"""Which of the two gRPC servers serves, and why."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc

from layertap_server.rpc import choice
from layertap_server.rpc.choice import AUTO, FAST, STOCK, create_server, why_not_fast
from layertap_server.rpc.server import RpcServer


async def test_auto_is_the_fast_server_where_it_works(caplog: pytest.LogCaptureFixture) -> None:
    assert await why_not_fast() == ""
    for kind in (AUTO, FAST):
        assert isinstance(await create_server(kind), RpcServer)
    assert not caplog.records


async def test_a_missing_private_name_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in choice.PRIVATE_NAMES:
        with monkeypatch.context() as without:
            without.delattr(cygrpc, name)
            without.setattr(choice, "call_echo", None)
            assert f"cygrpc has no {name}" in await why_not_fast()


def test_the_private_names_are_those_that_the_server_uses() -> None:
    folder = Path(choice.__file__).parent
    used = {
        name
        for file in ("call.py", "request_stream.py", "server.py")
        for name in re.findall(r"cygrpc\.(\w+)", (folder / file).read_text(encoding="utf-8"))
    }
    assert used == set(choice.PRIVATE_NAMES)


async def test_stock_is_grpc_aio_s_server_and_needs_no_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_not_fast", None)
    server = await create_server(STOCK)
    assert isinstance(server, grpc.aio.Server)
    assert not isinstance(server, RpcServer)
    await server.stop(None)


def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cygrpc, "SendStatusFromServerOperation")


def changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cygrpc, "SendMessageOperation", cygrpc.SendInitialMetadataOperation)


def without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    class Credentials:
        """Without the private attribute."""

    monkeypatch.setattr(grpc, "local_server_credentials", lambda kind: Credentials())


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "SELF_TEST_S", 0.0)


@pytest.mark.parametrize("breaks", [missing, changed, without_credentials, slow])
async def test_where_a_private_name_has_changed_stock_serves_and_the_log_says_why(
    breaks: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "SELF_TEST_S", 1.0)
    breaks(monkeypatch)
    server = await create_server(AUTO)
    assert not isinstance(server, RpcServer)
    await server.stop(None)
    [record] = [one for one in caplog.records if one.name == choice.logger.name]
    assert record.levelno == logging.WARNING
    assert f"the fast gRPC server does not work with grpcio {grpc.__version__}" in record.message
    assert "self-test" in record.message
    with pytest.raises(RuntimeError, match="self-test"):
        await create_server(FAST)

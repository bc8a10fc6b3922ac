"""`wait_ready` and `health`."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from layertap import AsyncClient, Client, DeadlineExceeded, NotFound, Unauthenticated, Unavailable

from .fake_server import FakeEncoder, serving

STATUSES = {"SERVING": 1, "NOT_SERVING": 2, "UNKNOWN": 0}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def health_server(status: int) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("status", STATUSES)
async def test_health(status: str) -> None:
    with health_server(STATUSES[status]) as address:
        with Client(address) as client:
            assert client.health() == status
        async with AsyncClient(address) as other:
            assert await other.health() == status


def test_health_of_no_server() -> None:
    with Client(f"127.0.0.1:{free_port()}") as client, pytest.raises(Unavailable, match=r"127\.0\.0\.1:"):
        client.health()


def test_a_server_that_loads_is_waited_for(client: Client, fake: FakeEncoder) -> None:
    fake.num_unavailable = 6  # more than the retries of one call
    assert client.wait_ready(60).name == "fake"
    fake.num_unavailable = 6
    assert client.wait_ready(model="plain").name == "plain"


def test_a_server_whose_engine_restarts_is_waited_for(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It describes its models then too, and its health service says that it does not serve."""
    statuses = iter(["NOT_SERVING", "NOT_SERVING", "SERVING"])
    monkeypatch.setattr(client._calls, "health", lambda limit: next(statuses))
    assert client.wait_ready(60).name == "fake"
    assert list(statuses) == []
    monkeypatch.setattr(client._calls, "health", lambda limit: "NOT_SERVING")
    with pytest.raises(Unavailable, match="not serving"):
        client.wait_ready(0.3)


async def test_async_waits_for_an_engine(async_client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = iter(["NOT_SERVING", "SERVING"])

    async def health(limit: object) -> str:
        return next(statuses)

    monkeypatch.setattr(async_client._calls, "health", health)
    assert (await async_client.wait_ready(60)).name == "fake"


async def test_async(async_client: AsyncClient, fake: FakeEncoder) -> None:
    fake.num_unavailable = 6
    assert (await async_client.wait_ready(60)).name == "fake"


def test_a_server_that_starts_later_is_waited_for(fake: FakeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    with ExitStack() as running:
        delays: list[float] = []

        def sleep(seconds: float) -> None:
            delays.append(seconds)
            if len(delays) == 2:
                running.enter_context(serving(fake, address))

        client = running.enter_context(Client(address))
        monkeypatch.setattr(time, "sleep", sleep)
        assert client.wait_ready(100).name == "fake"
        assert len(delays) >= 2


def test_waiting_ends(client: Client) -> None:
    with (
        Client(f"127.0.0.1:{free_port()}") as absent,
        pytest.raises(DeadlineExceeded, match="no connection to"),
    ):
        absent.wait_ready(0.3)
    with pytest.raises(ValueError, match="timeout=0"):
        client.wait_ready(0)


def test_what_waiting_cannot_mend_is_raised_at_once(client: Client, fake: FakeEncoder) -> None:
    with pytest.raises(NotFound):
        client.wait_ready(model="nobody")
    fake.token = "secret"
    with pytest.raises(Unauthenticated):
        client.wait_ready()

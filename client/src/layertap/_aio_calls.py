"""As `_calls`, for `AsyncClient`."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any

import grpc

from layertap import _arguments, errors
from layertap._arguments import Timeout
from layertap._connections import ASK_S, Connection, Connections
from layertap._transport import (
    HEALTH_CHECK,
    HealthStatus,
    TimeLimit,
    TLSLike,
    aio_connection_failure,
    call_metadata,
    channel_options,
    credentials,
    health_status,
)
from layertap.errors import LayertapError
from layertap.v1 import encoder_pb2 as pb


class Calls:
    """As `_calls.Calls`, in one event loop: that of the first call."""

    def __init__(
        self,
        address: str,
        token: str | None,
        tls: TLSLike,
        timeout: float | None,
        max_message_bytes: int | None,
        connections: int | None,
    ) -> None:
        self.address = _arguments.address(address)
        self.metadata = call_metadata(token)
        self._timeout = _arguments.seconds("timeout", timeout)
        options = channel_options(tls, max_message_bytes)
        secrets = credentials(tls)
        open_channel = (
            partial(grpc.aio.insecure_channel, address, options)
            if secrets is None
            else partial(grpc.aio.secure_channel, address, secrets, options)
        )
        self.connections = Connections(
            "AsyncClient", open_channel, _arguments.connections(connections), partial(_ask, self.metadata)
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    def enter_loop(self) -> None:
        """Checks that the running event loop is the one of the first call: a channel of grpc.aio belongs to
        the loop in which it was created."""
        self.connections.check_open()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._check_loop()

    def _check_loop(self) -> None:
        if self._loop is not None and self._loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "this AsyncClient belongs to another event loop, the one of its first call: make one for "
                "each loop (each asyncio.run is a loop of its own)"
            )

    async def close(self) -> None:
        """Closes the connections, and cancels every call on them."""
        if not self.connections.is_closed:
            self._check_loop()
        for channel in self.connections.close():
            await channel.close()

    def time_limit(self, timeout: Timeout) -> TimeLimit:
        """As `_calls.Calls.time_limit`."""
        if isinstance(timeout, _arguments.ClientDefault):
            return TimeLimit(self._timeout)
        return TimeLimit(_arguments.seconds("timeout", timeout))

    async def call(self, rpc: str, request: Any, limit: TimeLimit, first_input: int = 0) -> Any:
        """As `_calls.Calls.call`."""
        self.enter_loop()
        connections, lost = self.connections, None
        while True:
            connection = connections.take(() if lost is None else (lost,))
            try:
                call = getattr(connection.stub, rpc)
                return await call(request, timeout=limit.left_s, metadata=self.metadata)
            except grpc.RpcError as error:
                if lost is not None or not connections.may_repeat(error):
                    raise await self.located(limit, error, connection, first_input) from error
                lost = connection
            finally:
                connections.release(connection)

    async def health(self, limit: TimeLimit) -> HealthStatus:
        """The status of the whole server in its health service (grpc.health.v1)."""
        self.enter_loop()
        connection = self.connections.take()
        try:
            check = connection.channel.unary_unary(HEALTH_CHECK)
            return health_status(await check(b"", timeout=limit.left_s))
        except grpc.RpcError as error:
            raise await self.located(limit, error, connection) from error
        finally:
            self.connections.release(connection)

    async def located(
        self, limit: TimeLimit, error: grpc.RpcError, connection: Connection, first_input: int = 0
    ) -> LayertapError:
        """The LayertapError for an error of gRPC, with the address and the time limit of the call."""
        own = errors.from_rpc_error(error, first_input)
        why = await aio_connection_failure(connection.channel) if errors.is_without_cause(own) else ""
        errors.locate(own, self.address, limit.seconds, why)
        return own


def _ask(metadata: tuple[tuple[str, str], ...], connections: Connections, connection: Connection) -> Any:
    """Asks for the server's advice on connections, in a task."""

    async def ask() -> None:
        with suppress(grpc.RpcError):
            call = connection.stub.ListModels(pb.ListModelsRequest(), timeout=ASK_S, metadata=metadata)
            connections.learn((await call).models)

    return asyncio.create_task(ask())

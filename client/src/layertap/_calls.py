"""The connections of a `Client`, and calls with one message each way."""

from __future__ import annotations

import threading
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
    call_metadata,
    channel_options,
    connection_failure,
    credentials,
    health_status,
)
from layertap.errors import LayertapError
from layertap.v1 import encoder_pb2 as pb

# How long an interrupted program waits for its connections to be closed.
_CLOSE_S = 1.0


class Calls:
    """Makes calls for a client, whose arguments it takes. It is thread-safe.

    A call takes the connection with the fewest open calls. If its connection is lost, it moves once to
    another one that is open.
    """

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
            partial(grpc.insecure_channel, address, options)
            if secrets is None
            else partial(grpc.secure_channel, address, secrets, options)
        )
        self.connections = Connections(
            "Client", open_channel, _arguments.connections(connections), partial(_ask, self.metadata)
        )

    def close(self) -> None:
        """Closes the connections, and cancels every call on them."""
        for channel in self.connections.close():
            channel.close()

    def close_after_interrupt(self) -> None:
        """As `close`, but waits for at most `_CLOSE_S`: the interrupt may have come while gRPC acquired a
        lock of a channel, which then stays locked, and closing that channel waits for it without end."""
        closing = threading.Thread(target=self.close, daemon=True)
        closing.start()
        closing.join(_CLOSE_S)

    def time_limit(self, timeout: Timeout) -> TimeLimit:
        """The time limit of one call of the caller's."""
        if isinstance(timeout, _arguments.ClientDefault):
            return TimeLimit(self._timeout)
        return TimeLimit(_arguments.seconds("timeout", timeout))

    def call(self, rpc: str, request: Any, limit: TimeLimit, first_input: int = 0) -> Any:
        """The reply to one message; `first_input` is the index of its first input among the caller's.

        Raises:
            LayertapError: the call failed.
        """
        connections, lost = self.connections, None
        while True:
            connection = connections.take(() if lost is None else (lost,))
            try:
                call = getattr(connection.stub, rpc)
                return call(request, timeout=limit.left_s, metadata=self.metadata)
            except grpc.RpcError as error:
                if lost is not None or not connections.may_repeat(error):
                    raise self.located(limit, error, connection, first_input) from error
                lost = connection
            finally:
                connections.release(connection)

    def health(self, limit: TimeLimit) -> HealthStatus:
        """The status of the whole server in its health service (grpc.health.v1)."""
        connection = self.connections.take()
        try:
            check = connection.channel.unary_unary(HEALTH_CHECK)
            return health_status(check(b"", timeout=limit.left_s))
        except grpc.RpcError as error:
            raise self.located(limit, error, connection) from error
        finally:
            self.connections.release(connection)

    def located(
        self, limit: TimeLimit, error: grpc.RpcError, connection: Connection, first_input: int = 0
    ) -> LayertapError:
        """The LayertapError for an error of gRPC, with the address and the time limit of the call."""
        own = errors.from_rpc_error(error, first_input)
        why = connection_failure(connection.channel) if errors.is_without_cause(own) else ""
        errors.locate(own, self.address, limit.seconds, why)
        return own


def _ask(metadata: tuple[tuple[str, str], ...], connections: Connections, connection: Connection) -> Any:
    """Asks for the server's advice on connections. The answer comes in a thread of gRPC."""

    def learn(call: Any) -> None:
        if call.code() is grpc.StatusCode.OK:
            connections.learn(call.result().models)

    call = connection.stub.ListModels.future(pb.ListModelsRequest(), timeout=ASK_S, metadata=metadata)
    call.add_done_callback(learn)
    return call

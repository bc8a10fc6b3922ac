"""Chooses between the two gRPC servers: our own (`server.py`), and `grpc.aio`'s.

Both run the same handlers. Our own one takes some 0.6 of the processor time of a call (docs/calls.md), and uses
private names of gRPC. `grpc.aio`'s uses public names only, and serves where a version of gRPC has changed the
private ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

logger = logging.getLogger(__name__)

FAST, STOCK, AUTO = "fast", "stock", "auto"
ECHO_SERVICE = "layertap.SelfTest"
# The private names of `grpc._cython.cygrpc` that the fast server uses. Without one of them, the self-test would
# take its whole time.
PRIVATE_NAMES = (
    "CompletionQueue",
    "CompletionType",
    "ReceiveCloseOnServerOperation",
    "ReceiveMessageOperation",
    "SendInitialMetadataOperation",
    "SendMessageOperation",
    "SendStatusFromServerOperation",
    "Server",
    "auth_context",
    "peer_identities",
    "peer_identity_key",
)
# The longest that the self-test may take. It takes some milliseconds, but on an overloaded machine more.
SELF_TEST_S = 10.0


async def create_server(
    kind: str,
    options: Sequence[tuple[str, Any]] = (),
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    maximum_concurrent_rpcs: int | None = None,
) -> grpc.aio.Server:
    """A server of this kind: `FAST`, `STOCK`, or `AUTO`, which is the fast one if it passes its self-test.

    The other arguments are those of `grpc.aio.server`. Raises RuntimeError if `FAST` fails its self-test.
    """
    if kind != STOCK and (reason := await why_not_fast()):
        told = f"the fast gRPC server does not work with grpcio {grpc.__version__}: {reason}"
        if kind == FAST:
            raise RuntimeError(told)
        logger.warning("%s; grpc.aio serves instead, at about 1.7 times the CPU of a call", told)
        kind = STOCK
    if kind == STOCK:
        return grpc.aio.server(
            interceptors=interceptors, options=options, maximum_concurrent_rpcs=maximum_concurrent_rpcs
        )
    from layertap_server.rpc.server import RpcServer

    return RpcServer(options, interceptors, maximum_concurrent_rpcs)


async def why_not_fast() -> str:
    """Why the fast server cannot be used with this version of gRPC; empty if it passes its self-test."""
    try:
        await asyncio.wait_for(self_test(), SELF_TEST_S)
    except asyncio.TimeoutError:
        return f"its self-test was not done after {SELF_TEST_S:.0f} s"
    except Exception as error:  # whatever a changed private name leads to
        return f"its self-test failed: {type(error).__name__}: {error}"
    return ""


async def self_test() -> None:
    """Serves calls of each kind that the server has to this process itself, on a free port of 127.0.0.1.
    Raises if a name is missing or an answer is wrong."""
    from grpc._cython import cygrpc

    if missing := [name for name in PRIVATE_NAMES if not hasattr(cygrpc, name)]:
        raise AttributeError(f"grpc._cython.cygrpc has no {', '.join(missing)}")
    from layertap_server.rpc.server import RpcServer

    server = RpcServer([("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((echo_handlers(),))
    credentials = grpc.local_server_credentials(grpc.LocalConnectionType.LOCAL_TCP)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        # Not a channel of `grpc.aio`: the first one starts a thread that lives as long as the process.
        await asyncio.to_thread(call_echo, f"127.0.0.1:{port}")
    finally:
        await server.stop(None)


def echo_handlers() -> grpc.GenericRpcHandler:
    async def one(data: bytes, context: Any) -> bytes:
        if data == b"abort":
            await context.abort(grpc.StatusCode.ABORTED, "as asked", (("why-bin", b"\x00"),))
        if not context.peer() or context.time_remaining() is None:
            raise ValueError("the call's peer or deadline is missing")
        context.peer_identities(), context.auth_context()
        value: str = dict(context.invocation_metadata())["key"]
        return value.encode() + data

    async def each(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for data in requests:
            yield data

    methods = {
        "One": grpc.unary_unary_rpc_method_handler(one),
        "Each": grpc.stream_stream_rpc_method_handler(each),
    }
    return grpc.method_handlers_generic_handler(ECHO_SERVICE, methods)


def call_echo(address: str) -> None:
    """The caller's side of `self_test`. Blocking."""
    credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.LOCAL_TCP)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(address, credentials, options) as channel:
        one = channel.unary_unary(f"/{ECHO_SERVICE}/One")
        each = channel.stream_stream(f"/{ECHO_SERVICE}/Each")
        limits = {"timeout": SELF_TEST_S, "metadata": (("key", "value"),)}
        check(one(b"!", **limits), b"value!")
        check(list(each(iter([b"a", b"", b"c"]), **limits)), [b"a", b"", b"c"])
        try:
            one(b"abort", **limits)
        except grpc.RpcError as error:
            found = error.code(), error.details(), dict(error.trailing_metadata())["why-bin"]
            check(found, (grpc.StatusCode.ABORTED, "as asked", b"\x00"))
        else:
            check(None, grpc.StatusCode.ABORTED)


def check(found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"{found!r} came back in place of {expected!r}")

"""One call of an `RpcServer`, from its arrival on gRPC's thread to the status that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
from grpc._cython import cygrpc

from layertap_server.errors import MAX_MESSAGE_BYTES, Refusal, shortened
from layertap_server.rpc.loop_bridge import LoopBridge
from layertap_server.rpc.request_stream import NO_FLAGS, Requests
from layertap_server.runs_on import on_any_thread, on_event_loop, on_grpc_thread

logger = logging.getLogger(__name__)

# Checks the request of a unary call before the event loop is woken for it; returns a refusal, or None if the
# handler has to answer. Called on gRPC's thread.
EarlyCheck = Callable[[bytes, "Call"], "Refusal | None"]
# gRPC gives deadlines in seconds since the epoch; a later one than this means that the call has no deadline.
NO_DEADLINE_S = 1e11


class Call:
    """One call. Its handler runs as a task on the event loop, and gets the call as its context."""

    __slots__ = (
        "_bridge",
        "_call",
        "_closed",
        "_code",
        "_deadline_s",
        "_details",
        "_done_callbacks",
        "_early_check",
        "_handler",
        "_has_begun",
        "_has_ended",
        "_interceptors",
        "_is_cancelled",
        "_metadata",
        "_method",
        "_request",
        "_task",
        "_trailing",
    )

    def __init__(
        self,
        bridge: LoopBridge,
        event: Any,
        method: str,
        handler: grpc.RpcMethodHandler[Any, Any] | None,
        early_check: EarlyCheck | None,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        closed: Callable[[], None],
    ) -> None:
        """`closed` is called on gRPC's thread when the call has ended for gRPC."""
        self._bridge = bridge
        self._early_check = early_check
        self._interceptors = interceptors
        self._closed = closed
        self._call = event.call
        self._handler = handler
        self._method = method
        self._deadline_s: float = event.call_details.deadline
        self._metadata = event.invocation_metadata
        self._request: bytes | None = None
        self._task: asyncio.Task[None] | None = None
        # Whether the initial metadata have been sent, and the status.
        self._has_begun = False
        self._has_ended = False
        self._is_cancelled = False
        self._code = grpc.StatusCode.OK
        self._details = ""
        self._trailing: Any = ()
        self._done_callbacks: list[Callable[[Call], None]] = []

    @on_grpc_thread
    def receive(self) -> None:
        if self._handler is None:
            self.refuse(grpc.StatusCode.UNIMPLEMENTED, f"this server has no method {self._method}")
        elif self._handler.request_streaming:
            self._watch()
            self._bridge.post(self._begin)
        else:
            self._start((cygrpc.ReceiveMessageOperation(NO_FLAGS),), self._take_request)

    @on_any_thread
    def _start(self, operations: Sequence[Any], take: Callable[[Any], None]) -> None:
        """Starts the operations; `take` is called on gRPC's thread once all are complete. Raises
        `CancelledError` when the server has stopped."""
        if self._bridge.is_closed:
            raise asyncio.CancelledError
        if error := self._call.start_server_batch(operations, take):
            raise RuntimeError(f"gRPC did not start the operations: error {error}")

    @on_grpc_thread
    def _watch(self) -> None:
        self._start((cygrpc.ReceiveCloseOnServerOperation(NO_FLAGS),), self._take_close)

    @on_grpc_thread
    def _take_request(self, event: Any) -> None:
        self._request = event.batch_operations[0].message()
        if self._request is None:  # the client has gone, or has closed its side without a request
            details = f"{self._method} needs a request message, and there was none"
            self.refuse(grpc.StatusCode.UNIMPLEMENTED, details)
            return
        if refusal := self._early_refusal(self._request):
            self.refuse(*refusal)
        else:
            self._watch()
            self._bridge.post(self._begin)

    @on_grpc_thread
    def _early_refusal(self, request: bytes) -> Refusal | None:
        try:
            return self._early_check(request, self) if self._early_check else None
        except Exception:
            logger.exception("the early check of a call of %s failed", self._method)
            return None

    @on_grpc_thread
    def _take_written(self, future: asyncio.Future[bool], event: Any) -> None:
        self._bridge.post(partial(resolve, future, event.success))

    @on_grpc_thread
    def _take_close(self, event: Any) -> None:
        self._closed()
        if event.batch_operations[0].cancelled():
            self._bridge.post(self._cancel)

    @on_grpc_thread
    def _take_end(self, event: Any) -> None:
        if self._done_callbacks:
            self._bridge.post(self._call_back)

    @on_grpc_thread
    def refuse(self, code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, Any]] = ()) -> None:
        """Ends the call with this status. Nothing of it has reached the event loop."""
        self._code, self._details, self._trailing = code, details, trailing
        close = cygrpc.ReceiveCloseOnServerOperation(NO_FLAGS)
        self._start((close, *self._ending()), self._take_refused)

    @on_grpc_thread
    def _take_refused(self, event: Any) -> None:
        self._closed()

    @on_event_loop
    def _begin(self) -> None:
        if self._is_cancelled:
            return
        self._task = self._bridge.loop.create_task(self._run())

    @on_event_loop
    def _cancel(self) -> None:
        self._is_cancelled = True
        if self._task is not None:
            self._task.cancel()

    @on_event_loop
    async def _run(self) -> None:
        try:
            await self._answer()
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            if self._code is grpc.StatusCode.OK:
                self._code = grpc.StatusCode.CANCELLED
        except Exception as error:
            logger.exception("%s failed", self._method)
            if self._code is grpc.StatusCode.OK:  # else the handler has set a status of its own
                self._code, self._details = grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}"
        finally:
            self._task = None
        if self._is_cancelled:
            self._call_back()
        elif not self._has_ended:
            self._end()

    @on_event_loop
    async def _answer(self) -> None:
        if self._interceptors:
            self._handler = await self._intercepted()
        handler = self._handler
        if handler is None:  # an interceptor has taken it away
            await self.abort(grpc.StatusCode.UNIMPLEMENTED, f"this server has no method {self._method}")
        # Only the handler refers to the request, so that it can free it while it waits.
        if not handler.response_streaming:
            act = handler.stream_unary if handler.request_streaming else handler.unary_unary
            self._end(self._serialized(await act(self._asked(handler), self)))
            return
        act = handler.stream_stream if handler.request_streaming else handler.unary_stream
        replies = act(self._asked(handler), self)
        if not hasattr(replies, "__aiter__"):
            await replies  # the handler is a coroutine, which sends its replies by `write`
            return
        async with contextlib.aclosing(replies):
            async for reply in replies:
                await self.write(reply)

    @on_event_loop
    async def _intercepted(self) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler, as the interceptors return it."""
        found = self._handler

        async def last(_: Any) -> grpc.RpcMethodHandler[Any, Any] | None:
            return found

        continuation: Any = last
        for interceptor in reversed(self._interceptors):
            continuation = partial(interceptor.intercept_service, continuation)
        details = SimpleNamespace(method=self._method, invocation_metadata=self._metadata)
        handler: grpc.RpcMethodHandler[Any, Any] | None = await continuation(details)
        return handler

    @on_event_loop
    def _asked(self, handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
        """The one request, to which the call then keeps no reference, or an iterator over the requests."""
        if handler.request_streaming:
            return Requests(self._bridge, self._start, handler.request_deserializer)
        data, self._request = self._request, None
        return handler.request_deserializer(data) if handler.request_deserializer else data

    @on_event_loop
    def _serialized(self, message: Any) -> bytes:
        assert self._handler is not None
        serializer = self._handler.response_serializer
        data: bytes = serializer(message) if serializer else message
        return data

    @on_any_thread
    def _end(self, message: bytes | None = None) -> None:
        """Sends the status, and before it the reply of a unary call. Does nothing if the status was sent."""
        if not self._has_ended:
            self._has_ended = True
            self._start(self._ending(message), self._take_end)

    @on_any_thread
    def _ending(self, message: bytes | None = None) -> tuple[Any, ...]:
        status = cygrpc.SendStatusFromServerOperation(
            self._trailing, self._code.value[0], self._told(), NO_FLAGS
        )
        if message is None or self._code is not grpc.StatusCode.OK:
            return (*self._beginning(), status)
        return (*self._beginning(), cygrpc.SendMessageOperation(message, NO_FLAGS), status)

    @on_any_thread
    def _told(self) -> bytes:
        """The status details, shortened to fit into a header: they may contain a client's names."""
        return shortened(self._details, MAX_MESSAGE_BYTES).encode(errors="replace")

    @on_any_thread
    def _beginning(self, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> tuple[Any, ...]:
        if self._has_begun:
            return ()
        self._has_begun = True
        return (cygrpc.SendInitialMetadataOperation(metadata, NO_FLAGS),)

    @on_event_loop
    def _call_back(self) -> None:
        callbacks, self._done_callbacks = self._done_callbacks, []
        for callback in callbacks:
            callback(self)

    # The rest is what handlers use: a part of `grpc.aio.ServicerContext`.

    @on_event_loop
    def add_done_callback(self, callback: Callable[[Call], None]) -> None:
        """Has `callback` called on the event loop once the whole reply has been sent, or the call is
        cancelled."""
        self._done_callbacks.append(callback)

    @on_event_loop
    def done(self) -> bool:
        return self._has_ended or self._is_cancelled

    @on_event_loop
    def cancelled(self) -> bool:
        return self._is_cancelled

    @on_event_loop
    async def write(self, message: Any) -> None:
        """Sends one message of a reply; returns when the connection has accepted it.

        Raises CancelledError when it cannot be sent any more.
        """
        send = cygrpc.SendMessageOperation(self._serialized(message), NO_FLAGS)
        await self._send(*self._beginning(), send)

    @on_event_loop
    async def send_initial_metadata(self, initial_metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Raises RuntimeError when the reply has begun."""
        if self._has_begun:
            raise RuntimeError("the initial metadata have been sent")
        await self._send(*self._beginning(tuple(initial_metadata)))

    @on_event_loop
    async def _send(self, *operations: Any) -> None:
        future: asyncio.Future[bool] = self._bridge.loop.create_future()
        self._start(operations, partial(self._take_written, future))
        if not await future:
            raise asyncio.CancelledError

    @on_event_loop
    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, Any]] = ()
    ) -> NoReturn:
        """Ends the call with this status, and with these trailing metadata, if any, in place of those
        that were set."""
        self._code, self._details = code, details
        self._trailing = tuple(trailing_metadata) or self._trailing
        self._end()
        raise grpc.aio.AbortError(details)

    @on_event_loop
    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    @on_event_loop
    def set_details(self, details: str) -> None:
        self._details = details

    @on_event_loop
    def code(self) -> grpc.StatusCode:
        return self._code

    @on_event_loop
    def details(self) -> str:
        return self._details

    @on_event_loop
    def set_trailing_metadata(self, trailing_metadata: Sequence[tuple[str, str | bytes]]) -> None:
        self._trailing = tuple(trailing_metadata)

    @on_event_loop
    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        trailing: Sequence[tuple[str, str | bytes]] = self._trailing
        return trailing

    @on_any_thread
    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        metadata: Sequence[tuple[str, str | bytes]] = self._metadata
        return metadata

    @on_any_thread
    def peer(self) -> str:
        peer: str | bytes = self._call.peer()
        return peer.decode() if isinstance(peer, bytes) else peer

    @on_any_thread
    def peer_identities(self) -> Sequence[bytes] | None:
        """The names in the client's certificate: its subject alternative names, or else its common name.
        None without a client certificate."""
        identities: Sequence[bytes] | None = cygrpc.peer_identities(self._call)
        return identities

    @on_any_thread
    def peer_identity_key(self) -> str | None:
        """The name of the authentication property that `peer_identities` returns."""
        key: bytes | None = cygrpc.peer_identity_key(self._call)
        return None if key is None else key.decode()

    @on_any_thread
    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """The properties of the connection's authentication, such as the client certificate in PEM."""
        properties: Mapping[bytes, Sequence[bytes]] = cygrpc.auth_context(self._call)
        return {key.decode(): values for key, values in properties.items()}

    @on_any_thread
    def time_remaining(self) -> float | None:
        """Seconds until the call's deadline; None without one."""
        if self._deadline_s > NO_DEADLINE_S:
            return None
        return max(self._deadline_s - time.time(), 0.0)


def resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():  # it is done when the task that waited was cancelled
        future.set_result(value)

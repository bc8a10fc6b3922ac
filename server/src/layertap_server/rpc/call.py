"""One call of an `RpcServer`, from its arrival on gRPC's thread to the status that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import grpc
from grpc._cython import cygrpc

from layertap_server.errors import MAX_MESSAGE_BYTES, shortened
from layertap_server.rpc.loop_bridge import LoopBridge
from layertap_server.rpc.request_stream import NO_FLAGS, Requests

logger = logging.getLogger(__name__)

# A status that ends a call: code, details, trailing metadata.
Refusal = tuple[grpc.StatusCode, str, Sequence[tuple[str, Any]]]
# Checks the request of a unary call before the event loop is woken for it; the integer is the number of calls
# that are held back. It returns a refusal, or the most seconds for which the call may be held back to start
# together with others. Called on gRPC's thread.
EarlyCheck = Callable[[bytes, "Call", int], "Refusal | float"]
# gRPC gives deadlines in seconds since the epoch; a later one than this means that the call has no deadline.
NO_DEADLINE_S = 1e11


class Call:
    """One call. Its handler runs as a task on the event loop, and gets the call as its context."""

    __slots__ = (
        "_at_end",
        "_bridge",
        "_call",
        "_code",
        "_deadline_s",
        "_details",
        "_early_check",
        "_handler",
        "_has_begun",
        "_has_ended",
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
    ) -> None:
        self._bridge = bridge
        self._early_check = early_check
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
        self._at_end: list[Callable[[], None]] = []

    # ------------------------------------------------------------------- on gRPC's thread

    def receive(self) -> None:
        if self._handler is None:
            self._refuse(f"this server has no method {self._method}")
        elif self._handler.request_streaming:
            self._watch()
            self._bridge.post(self._begin)
        else:
            self._start((cygrpc.ReceiveMessageOperation(NO_FLAGS),), self._take_request)

    def _start(self, operations: Sequence[Any], take: Callable[[Any], None]) -> None:
        """Starts the operations. On any thread; `take` is called on gRPC's thread once all are complete."""
        if error := self._call.start_server_batch(operations, take):
            raise RuntimeError(f"gRPC takes no such step now: error {error}")

    def _watch(self) -> None:
        self._start((cygrpc.ReceiveCloseOnServerOperation(NO_FLAGS),), self._take_close)

    def _take_request(self, event: Any) -> None:
        self._request = event.batch_operations[0].message()
        if self._request is None:  # the client has gone, or has closed its side without a request
            self._refuse(f"{self._method} takes one request, and none came")
            return
        verdict = self._looked_at(self._request)
        if isinstance(verdict, float):
            self._watch()
            self._bridge.post_batched(self._begin, verdict)
        else:
            self._code, self._details, self._trailing = verdict
            self._end_at_once()

    def _looked_at(self, request: bytes) -> Refusal | float:
        try:
            return self._early_check(request, self, self._bridge.num_held) if self._early_check else 0.0
        except Exception:
            logger.exception("the early check of a call of %s failed", self._method)
            return 0.0

    def _take_written(self, future: asyncio.Future[bool], event: Any) -> None:
        self._bridge.post(partial(resolve, future, event.success))

    def _take_close(self, event: Any) -> None:
        if event.batch_operations[0].cancelled():
            self._bridge.post(self._cancel)

    def _take_end(self, event: Any) -> None:
        if self._at_end:
            self._bridge.post(self._act_at_end)

    def _refuse(self, details: str) -> None:
        self._code, self._details = grpc.StatusCode.UNIMPLEMENTED, details
        self._end_at_once()

    def _end_at_once(self) -> None:
        self._start((cygrpc.ReceiveCloseOnServerOperation(NO_FLAGS), *self._ending()), self._take_end)

    # ------------------------------------------------------------------------- on the loop

    def _begin(self) -> None:
        if self._is_cancelled:  # while it was held back
            return
        self._task = self._bridge.loop.create_task(self._run())

    def _cancel(self) -> None:
        self._is_cancelled = True
        if self._task is not None:
            self._task.cancel()

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
            self._act_at_end()
        elif not self._has_ended:
            self._end()

    async def _answer(self) -> None:
        handler = self._handler
        assert handler is not None
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

    def _asked(self, handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
        """The one request, to which the call then keeps no reference, or an iterator over the requests."""
        if handler.request_streaming:
            return Requests(self._bridge, self._start, handler.request_deserializer)
        data, self._request = self._request, None
        return handler.request_deserializer(data) if handler.request_deserializer else data

    def _serialized(self, message: Any) -> bytes:
        assert self._handler is not None
        serializer = self._handler.response_serializer
        data: bytes = serializer(message) if serializer else message
        return data

    def _end(self, message: bytes | None = None) -> None:
        """Sends the status, and before it the reply of a unary call. Does nothing if the status was sent."""
        if not self._has_ended:
            self._has_ended = True
            self._start(self._ending(message), self._take_end)

    def _ending(self, message: bytes | None = None) -> tuple[Any, ...]:
        status = cygrpc.SendStatusFromServerOperation(
            self._trailing, self._code.value[0], self._told(), NO_FLAGS
        )
        if message is None or self._code is not grpc.StatusCode.OK:
            return (*self._beginning(), status)
        return (*self._beginning(), cygrpc.SendMessageOperation(message, NO_FLAGS), status)

    def _told(self) -> bytes:
        """The status details, shortened to fit into a header: they may contain a client's names."""
        return shortened(self._details, MAX_MESSAGE_BYTES).encode(errors="replace")

    def _beginning(self) -> tuple[Any, ...]:
        if self._has_begun:
            return ()
        self._has_begun = True
        return (cygrpc.SendInitialMetadataOperation((), NO_FLAGS),)

    def _act_at_end(self) -> None:
        actions, self._at_end = self._at_end, []
        for act in actions:
            act()

    # --------------------------------------------------------------------- for its handler

    def at_end(self, act: Callable[[], None]) -> None:
        """Has `act` called on the event loop once the whole reply has been sent, or the call is cancelled."""
        self._at_end.append(act)

    async def write(self, message: Any) -> None:
        """Sends one message of a reply; returns when the connection has accepted it.

        Raises CancelledError when it cannot be sent any more.
        """
        future: asyncio.Future[bool] = self._bridge.loop.create_future()
        send = cygrpc.SendMessageOperation(self._serialized(message), NO_FLAGS)
        self._start((*self._beginning(), send), partial(self._take_written, future))
        if not await future:
            raise asyncio.CancelledError

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, Any]] = ()
    ) -> NoReturn:
        """Ends the call with this status."""
        self._code, self._details, self._trailing = code, details, tuple(trailing_metadata)
        self._end()
        raise grpc.aio.AbortError(details)

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        metadata: Sequence[tuple[str, str | bytes]] = self._metadata
        return metadata

    def peer(self) -> str:
        peer: str | bytes = self._call.peer()
        return peer.decode() if isinstance(peer, bytes) else peer

    def time_remaining(self) -> float | None:
        """Seconds until the call's deadline; None without one."""
        if self._deadline_s > NO_DEADLINE_S:
            return None
        return max(self._deadline_s - time.time(), 0.0)


def resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():  # it is done when the task that waited was cancelled
        future.set_result(value)

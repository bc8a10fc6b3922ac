"""gRPC's server for asyncio, at a third of its price.

`grpc.aio` takes each step of a call to the event loop, from a thread of its own: it came, its message is
there, its reply went out, it is over. What wakes whom, and the tasks and futures between, cost three times
what gRPC itself does. Here one thread takes the steps from gRPC's completion queue, and does what needs no
thought; the event loop hears of a unary call once, with its request, and gives the reply in one go.

It is built from what `grpc.server` is built from (`grpc._cython.cygrpc`), whose names are no promise of
gRPC's; pyproject says which versions have them. Handlers are those of `grpc.aio`, and see the part of its
`ServicerContext` that is used here. Source: grpc/core's `grpc_call_start_batch` and its completion queues.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
from grpc._cython import cygrpc

logger = logging.getLogger(__name__)

NO_FLAGS = 0
# Calls that gRPC may hand over before it is asked for more.
NUM_ASKED = 16
# A status that ends a call: code, details, trailing metadata.
Refusal = tuple[grpc.StatusCode, str, Sequence[tuple[str, Any]]]
# Of a unary call's request, while so many calls wait for company: a refusal, or for how many seconds this one may
# wait for it, at most. Called on gRPC's thread.
Look = Callable[[bytes, "Call", int], "Refusal | float"]
# Of a stream's requests, until its handler takes them; and what each counts for beside its own bytes.
READ_AHEAD_BYTES, MESSAGE_BYTES = 1 << 16, 1 << 10
# In this form gRPC gives deadlines, by the clock on the wall; past it there is none.
NO_DEADLINE_S = 1e11


class RpcServer(grpc.aio.Server):  # type: ignore[misc]
    """Serves `grpc.aio` handlers on the running event loop."""

    def __init__(self, options: Sequence[tuple[str, Any]] = ()) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any] | None] = {}
        self._queue = cygrpc.CompletionQueue()
        self._core = cygrpc.Server(tuple(options), False)
        self._core.register_completion_queue(self._queue)
        self._is_stopping = False
        # By method, what looks at a unary call's request before the loop hears of it.
        self.first_looks: dict[str, Look] = {}
        # Calls that wait for company, and until when.
        self._held: list[Callable[[], None]] = []
        self._held_until_s = math.inf
        # What the loop is yet to hear of.
        self._news: deque[Callable[[], None]] = deque()
        self._is_told = False

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._handlers.extend(generic_rpc_handlers)

    def add_insecure_port(self, address: str) -> int:
        """The port, which gRPC chooses for 0. Raises RuntimeError when the address cannot be bound."""
        return self._bind(address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """As above."""
        return self._bind(address, server_credentials._credentials)

    def _bind(self, address: str, *credentials: Any) -> int:
        port: int = self._core.add_http2_port(address.encode(), *credentials)
        if not port:
            raise RuntimeError(f"cannot listen on {address}")
        return port

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stopped = self.loop.create_future()
        self._core.start()
        for _ in range(NUM_ASKED):
            self._ask_for_call()
        self._thread = threading.Thread(target=self._take_events, name="rpc server", daemon=True)
        self._thread.start()

    async def stop(self, grace: float | None) -> None:
        """Takes in no more calls; those that are open after `grace` seconds are cancelled."""
        if not self._is_stopping:
            self._is_stopping = True
            self._core.shutdown(self._queue, self._take_shutdown)
        if grace:
            await asyncio.wait([self._stopped], timeout=grace)
        self._core.cancel_all_calls()
        await self._stopped
        await asyncio.to_thread(self._thread.join)

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Whether it has not stopped by then."""
        return not (await asyncio.wait([self._stopped], timeout=timeout))[0]

    # ------------------------------------------------------------------- on gRPC's thread

    def _take_events(self) -> None:
        """Each event's tag is what takes it."""
        while True:
            event = self._queue.poll(self._poll_until_s())
            if event.completion_type == cygrpc.CompletionType.queue_shutdown:
                return
            if event.completion_type != cygrpc.CompletionType.queue_timeout:
                attempt(event.tag, event)
            event = None  # it holds its call
            if self._held and time.monotonic() >= self._held_until_s:
                self._let_go()

    def _poll_until_s(self) -> float | None:
        """By the clock on the wall, as gRPC wants it."""
        return time.time() + self._held_until_s - time.monotonic() if self._held else None

    def _ask_for_call(self) -> None:
        self._core.request_call(self._queue, self._queue, self._take_call)

    def _take_call(self, event: Any) -> None:
        if not event.success:  # the server stops
            return
        with contextlib.suppress(ValueError):  # it has begun to
            self._ask_for_call()
        method = event.call_details.method.decode("latin-1")
        try:
            handler = self._methods[method]
        except KeyError:
            handler = self._find(method, event)
        Call(self, event, method, handler).receive()

    def _find(self, method: str, event: Any) -> grpc.RpcMethodHandler[Any, Any] | None:
        details = SimpleNamespace(method=method, invocation_metadata=event.invocation_metadata)
        found = (handler.service(details) for handler in self._handlers)
        handler = next((one for one in found if one is not None), None)
        if handler is not None:  # what is not there has no end of names
            self._methods[method] = handler
        return handler

    def begin(self, begin: Callable[[], None], wait_s: float = 0.0) -> None:
        """Has the loop begin a call, together with others that come within so many seconds.

        A call by itself wakes the loop, which finds little of its code in the processor's caches.
        """
        if wait_s:
            self._held.append(begin)
            self._held_until_s = min(self._held_until_s, time.monotonic() + wait_s)
        else:
            self.tell(begin)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def _let_go(self) -> None:
        held, self._held, self._held_until_s = self._held, [], math.inf
        for begin in held:
            self.tell(begin)

    def _take_shutdown(self, event: Any) -> None:
        self.tell(partial(self._stopped.set_result, None))
        self._queue.shutdown()

    def tell(self, news: Callable[[], None]) -> None:
        """Has the loop do it, soon; in the order told."""
        self._news.append(news)
        if not self._is_told:
            self._is_told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._hear)

    # ------------------------------------------------------------------------- on the loop

    def _hear(self) -> None:
        self._is_told = False
        for _ in range(len(self._news)):
            attempt(self._news.popleft())


class Call:
    """One call. Its handler, a task on the loop, has it as its context."""

    __slots__ = (
        "_at_end",
        "_call",
        "_code",
        "_deadline_s",
        "_details",
        "_handler",
        "_has_begun",
        "_has_ended",
        "_is_cancelled",
        "_metadata",
        "_method",
        "_request",
        "_server",
        "_task",
        "_trailing",
    )

    def __init__(
        self, server: RpcServer, event: Any, method: str, handler: grpc.RpcMethodHandler[Any, Any] | None
    ) -> None:
        self._server = server
        self._call = event.call
        self._handler = handler
        self._method = method
        self._deadline_s: float = event.call_details.deadline
        self._metadata = event.invocation_metadata
        self._request: bytes | None = None
        self._task: asyncio.Task[None] | None = None
        # Initial metadata, status.
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
            self._server.tell(self._begin)
        else:
            self._start((cygrpc.ReceiveMessageOperation(NO_FLAGS),), self._take_request)

    def _start(self, operations: Sequence[Any], take: Callable[[Any], None]) -> None:
        """From any thread; `take` is called on gRPC's, once all of them are done."""
        if error := self._call.start_server_batch(operations, take):
            raise RuntimeError(f"gRPC takes no such step now: error {error}")

    def _watch(self) -> None:
        self._start((cygrpc.ReceiveCloseOnServerOperation(NO_FLAGS),), self._take_close)

    def _take_request(self, event: Any) -> None:
        self._request = event.batch_operations[0].message()
        if self._request is None:  # it left, or closed its side without one
            self._refuse(f"{self._method} takes one request, and none came")
            return
        verdict = self._looked_at(self._request)
        if isinstance(verdict, float):
            self._watch()
            self._server.begin(self._begin, verdict)
        else:
            self._code, self._details, self._trailing = verdict
            self._end_at_once()

    def _looked_at(self, request: bytes) -> Refusal | float:
        look = self._server.first_looks.get(self._method)
        try:
            return look(request, self, self._server.num_held) if look else 0.0
        except Exception:
            logger.exception("the first look at a call of %s failed", self._method)
            return 0.0

    def _take_written(self, future: asyncio.Future[bool], event: Any) -> None:
        self._server.tell(partial(resolve, future, event.success))

    def _take_close(self, event: Any) -> None:
        if event.batch_operations[0].cancelled():
            self._server.tell(self._cancel)

    def _take_end(self, event: Any) -> None:
        if self._at_end:
            self._server.tell(self._act_at_end)

    def _refuse(self, details: str) -> None:
        self._code, self._details = grpc.StatusCode.UNIMPLEMENTED, details
        self._end_at_once()

    def _end_at_once(self) -> None:
        self._start((cygrpc.ReceiveCloseOnServerOperation(NO_FLAGS), *self._ending()), self._take_end)

    # ------------------------------------------------------------------------- on the loop

    def _begin(self) -> None:
        if self._is_cancelled:  # while it waited for company
            return
        self._task = self._server.loop.create_task(self._run())

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
            if self._code is grpc.StatusCode.OK:  # else the handler has set what it wants told
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
        if handler.request_streaming:
            asked: Any = Requests(self._server, self._start, handler.request_deserializer)
        else:
            data, self._request = self._request, None
            asked = handler.request_deserializer(data) if handler.request_deserializer else data
        if not handler.response_streaming:
            act = handler.stream_unary if handler.request_streaming else handler.unary_unary
            self._end(self._serialized(await act(asked, self)))
            return
        replies = (handler.stream_stream if handler.request_streaming else handler.unary_stream)(asked, self)
        if not hasattr(replies, "__aiter__"):
            await replies  # it writes for itself
            return
        async with contextlib.aclosing(replies):
            async for reply in replies:
                await self.write(reply)

    def _serialized(self, message: Any) -> bytes:
        assert self._handler is not None
        serializer = self._handler.response_serializer
        data: bytes = serializer(message) if serializer else message
        return data

    def _end(self, message: bytes | None = None) -> None:
        """The status, and the one reply of a unary call before it."""
        if not self._has_ended:
            self._has_ended = True
            self._start(self._ending(message), self._take_end)

    def _ending(self, message: bytes | None = None) -> tuple[Any, ...]:
        status = cygrpc.SendStatusFromServerOperation(
            self._trailing, self._code.value[0], self._details.encode(), NO_FLAGS
        )
        if message is None or self._code is not grpc.StatusCode.OK:
            return (*self._beginning(), status)
        return (*self._beginning(), cygrpc.SendMessageOperation(message, NO_FLAGS), status)

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
        """On the loop, when the last of the reply has gone out, or nobody waits for it."""
        self._at_end.append(act)

    async def write(self, message: Any) -> None:
        """Returns when the connection has taken it."""
        future: asyncio.Future[bool] = self._server.loop.create_future()
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
        """Seconds to its deadline; None without one."""
        if self._deadline_s > NO_DEADLINE_S:
            return None
        return max(self._deadline_s - time.time(), 0.0)


class Requests:
    """The requests of a stream, read ahead of its handler: of small ones there are several at each wake-up."""

    def __init__(
        self,
        server: RpcServer,
        start: Callable[[Sequence[Any], Callable[[Any], None]], None],
        deserializer: Callable[[bytes], Any] | None,
    ) -> None:
        self._server = server
        self._start = start
        self._deserializer = deserializer
        # Those that nobody has asked for; None is the end.
        self._waiting: deque[bytes | None] = deque()
        self._is_receiving = False
        # Since the beginning. Each is written by one thread only.
        self._bytes_received = self._bytes_read = 0
        self._reader: asyncio.Future[None] | None = None

    def _receive(self) -> None:
        self._is_receiving = True
        self._start((cygrpc.ReceiveMessageOperation(NO_FLAGS),), self._take)

    def _take(self, event: Any) -> None:
        """On gRPC's thread."""
        message: bytes | None = event.batch_operations[0].message()
        if message is not None:
            self._bytes_received += len(message) + MESSAGE_BYTES
        self._is_receiving = message is not None and self._has_room()
        self._waiting.append(message)
        if self._is_receiving:
            self._receive()
        if len(self._waiting) == 1:  # else the loop is told already, and looks again
            self._server.tell(self._wake)

    def _has_room(self) -> bool:
        return self._bytes_received - self._bytes_read < READ_AHEAD_BYTES

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        while not self._waiting:
            if not self._is_receiving:
                self._receive()
            self._reader = self._server.loop.create_future()
            await self._reader
        message = self._waiting[0]
        if message is None:  # stays, for whoever asks again
            raise StopAsyncIteration
        self._waiting.popleft()
        self._bytes_read += len(message) + MESSAGE_BYTES
        return self._deserializer(message) if self._deserializer else message


def attempt(step: Callable[..., None], *arguments: Any) -> None:
    """One call's failure is no other's."""
    try:
        step(*arguments)
    except Exception:
        logger.exception("a step of a call failed")


def resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():  # else whoever waited has left
        future.set_result(value)

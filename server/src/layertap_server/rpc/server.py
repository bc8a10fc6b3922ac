"""A gRPC server for asyncio at a third of the processor time of `grpc.aio`.

`grpc.aio` has a thread that passes each event of a call to the event loop: the call's arrival, its request,
the end of sending its reply, the end of the call. The wake-ups, tasks and futures for that cost three times
what gRPC itself does. Here a single thread polls gRPC's completion queue and handles the events that need no
event loop: arrivals, messages received, refusals, ends of calls. The event loop is woken once for a unary
call, with its request, and sends the reply and the status in one batch.

The server uses the same classes as `grpc.server` (`grpc._cython.cygrpc`). They are private names of gRPC: where
a version lacks them, `choice.py` falls back to `grpc.aio`'s own server. Handlers are those of `grpc.aio`, and so
is their context, except for compression and `read`. Source: grpc/core's `grpc_call_start_batch` and its completion
queues.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import grpc
from grpc._cython import cygrpc

from layertap_server.rpc.call import Call, EarlyCheck
from layertap_server.rpc.loop_bridge import LoopBridge, attempt
from layertap_server.runs_on import on_any_thread, on_event_loop, on_grpc_thread

# The number of `request_call` operations pending in gRPC; each is renewed when it gets its call.
NUM_ASKED = 16


class RpcServer(grpc.aio.Server):  # type: ignore[misc]
    """Serves `grpc.aio` handlers on the running event loop."""

    def __init__(
        self,
        options: Sequence[tuple[str, Any]] = (),
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        maximum_concurrent_rpcs: int | None = None,
    ) -> None:
        """The arguments are those of `grpc.aio.server`. With interceptors there are no early checks, so that
        the interceptors see every call."""
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any] | None] = {}
        self._queue = cygrpc.CompletionQueue()
        self._core = cygrpc.Server(tuple(options), False)
        self._core.register_completion_queue(self._queue)
        self._is_stopping = False
        self._interceptors = tuple(interceptors)
        self._most_open = maximum_concurrent_rpcs
        # Calls that have come and have not ended. Used on gRPC's thread only.
        self._num_open = 0
        # By full method name: the check of a unary call's request, on gRPC's thread.
        self.early_checks: dict[str, EarlyCheck] = {}

    @on_event_loop
    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._handlers.extend(generic_rpc_handlers)

    @on_event_loop
    def add_insecure_port(self, address: str) -> int:
        """The bound port, chosen by the system for 0. Raises RuntimeError if the address is unusable."""
        return self._bind(address)

    @on_event_loop
    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """As `add_insecure_port`, with TLS."""
        return self._bind(address, server_credentials._credentials)

    @on_event_loop
    def _bind(self, address: str, *credentials: Any) -> int:
        port: int = self._core.add_http2_port(address.encode(), *credentials)
        if not port:
            raise RuntimeError(f"cannot listen on {address}")
        return port

    @on_event_loop
    async def start(self) -> None:
        self._bridge = LoopBridge(asyncio.get_running_loop())
        self._stopped = self._bridge.loop.create_future()
        self._core.start()
        for _ in range(NUM_ASKED):
            self._ask_for_call()
        self._thread = threading.Thread(target=self._take_events, name="rpc server", daemon=True)
        self._thread.start()

    @on_event_loop
    async def stop(self, grace: float | None) -> None:
        """Accepts no more calls, and cancels those that are still open after `grace` seconds."""
        if not self._is_stopping:
            self._is_stopping = True
            self._core.shutdown(self._queue, self._take_shutdown)
        if grace:
            await asyncio.wait([self._stopped], timeout=grace)
        self._core.cancel_all_calls()
        await self._stopped
        await asyncio.to_thread(self._thread.join)

    @on_event_loop
    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Whether the server is still running after `timeout` seconds."""
        return not (await asyncio.wait([self._stopped], timeout=timeout))[0]

    @on_grpc_thread
    def _take_events(self) -> None:
        """The loop of gRPC's thread: calls each event's tag, the callback of its operation."""
        while True:
            event = self._queue.poll()
            if event.completion_type == cygrpc.CompletionType.queue_shutdown:
                return
            attempt(event.tag, event)
            event = None  # it refers to its call, which would stay alive during the next poll

    @on_any_thread
    def _ask_for_call(self) -> None:
        self._core.request_call(self._queue, self._queue, self._take_call)

    @on_grpc_thread
    def _take_call(self, event: Any) -> None:
        if not event.success:  # the server is stopping
            return
        with contextlib.suppress(ValueError):  # raised when the server has begun to stop
            self._ask_for_call()
        method = event.call_details.method.decode("latin-1")
        try:
            handler = self._methods[method]
        except KeyError:
            handler = self._find(method, event)
        early_check = None if self._interceptors else self.early_checks.get(method)
        call = Call(self._bridge, event, method, handler, early_check, self._interceptors, self._count_closed)
        self._num_open += 1
        if self._most_open is not None and self._num_open > self._most_open:
            details = f"{self._most_open} calls are open, the most that this server takes; try again later"
            call.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, details)
        else:
            call.receive()

    @on_grpc_thread
    def _count_closed(self) -> None:
        self._num_open -= 1

    @on_grpc_thread
    def _find(self, method: str, event: Any) -> grpc.RpcMethodHandler[Any, Any] | None:
        details = SimpleNamespace(method=method, invocation_metadata=event.invocation_metadata)
        found = (handler.service(details) for handler in self._handlers)
        handler = next((one for one in found if one is not None), None)
        if handler is not None:  # unknown methods are not cached: clients could send any number of names
            self._methods[method] = handler
        return handler

    @on_grpc_thread
    def _take_shutdown(self, event: Any) -> None:
        self._bridge.post(self._close)

    @on_event_loop
    def _close(self) -> None:
        """Ends gRPC's thread. Not called on that thread: a handler that ends at the same time would start
        operations on a queue that takes none, upon which gRPC ends the process."""
        self._bridge.is_closed = True
        self._queue.shutdown()
        self._stopped.set_result(None)

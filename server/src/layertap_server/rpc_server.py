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
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import grpc
from grpc._cython import cygrpc

from layertap_server.rpc_call import Call, Refusal

logger = logging.getLogger(__name__)

# Calls that gRPC may hand over before it is asked for more.
NUM_ASKED = 16
# Of a unary call's request, while so many calls wait for company: a refusal, or for how many seconds this one may
# wait for it, at most. Called on gRPC's thread.
Look = Callable[[bytes, Call, int], Refusal | float]


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


def attempt(step: Callable[..., None], *arguments: Any) -> None:
    """One call's failure is no other's."""
    try:
        step(*arguments)
    except Exception:
        logger.exception("a step of a call failed")

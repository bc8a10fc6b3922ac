"""The front's end of a link: models whose engine runs in another process."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import numpy as np

from layertap_server import errors
from layertap_server.link import records
from layertap_server.link.arena import Bytes, ReadableArena
from layertap_server.link.plans import plan_to_json
from layertap_server.link.records import INLINE, RecordError, Reply, Type
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import Int64Array, OutputPlan, Outputs, TensorData, TensorSpec, Work
from layertap_server.scheduling.fair_queue import Priority
from layertap_server.serving import EngineState
from layertap_server.tokenization.worker import Tokenization

logger = logging.getLogger(__name__)

# The largest record that an engine sends: a tokenizer has up to 20 MB, and results that are not in the arena
# come in the record.
MAX_RECORD_BYTES = 2**31
# Bytes that may wait to be written to an engine that does not read; beyond them, requests are refused.
MAX_UNWRITTEN_BYTES = 2**26


@dataclass(slots=True)
class LinkedComputed:
    """A `Computed` that came over the link. Its memory in the arena is released when it is no longer
    referred to."""

    outputs: list[Outputs | None]
    submitted_ns: int
    started_ns: int
    compute_ns: int
    batch_inputs: int
    batch_tokens: int
    # Called when the outputs are no longer needed; None if none of them is in the arena.
    release: Callable[[], None] | None = field(repr=False)

    def __del__(self) -> None:
        if self.release is not None:
            self.release()


class EngineLink(asyncio.Protocol):
    """One connection to an engine process. Used on the event loop, except for `release`.

    It ends at the first fault of the peer: `on_lost` is then called, and all requests fail.
    """

    def __init__(
        self,
        arena: ReadableArena,
        max_plans: int,
        on_hello: Callable[[EngineLink, Any], None],
        on_state: Callable[[int, EngineState], None],
        on_lost: Callable[[EngineLink], None],
    ) -> None:
        """At most `max_plans` plans are known to the engine at the same time: then numbers are used again."""
        self._arena = arena
        self._max_plans = max_plans
        self._on_hello, self._on_state, self._on_lost = on_hello, on_state, on_lost
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._reader = records.Reader(MAX_RECORD_BYTES)
        self._transport: asyncio.Transport | None = None
        self._unwritten: list[bytes] = []
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._next_request = 0
        # By `id()`, the number of each plan that the engine knows, with the plan, which keeps the id its own.
        self._plans: dict[int, tuple[int, OutputPlan]] = {}
        self._plan_ids: list[int] = []
        self._next_plan = 0
        self.is_lost = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # ------------------------------------------------------------------------------ requests

    async def compute(
        self, model: int, works: Sequence[Work], priority: Priority, deadline_ns: int | None, client: str
    ) -> LinkedComputed:
        """Raises a `RequestError`. If the task is cancelled, the engine drops what it has not begun."""
        if self.is_lost or self._transport is None:
            raise engine_down()
        if self._transport.get_write_buffer_size() > MAX_UNWRITTEN_BYTES:
            raise errors.overloaded("QUEUE_FULL", "the engine takes in no more requests; try again", 1.0)
        request = self._next_request
        self._next_request += 1
        has_types = works[0].token_type_ids is not None
        submit = records.Submit(
            request,
            deadline_ns,
            model,
            priority,
            client,
            [self._plan_number(work.plan, model) for work in works],
            [work.num_tokens for work in works],
            records.joined([work.input_ids for work in works]),
            records.joined([cast("Int64Array", work.token_type_ids) for work in works])
            if has_types
            else None,
        )
        self._post(records.submit_record(submit))
        replied = self._waiting[request] = self._loop.create_future()
        try:
            reply = await replied
        except asyncio.CancelledError:
            if self._waiting.pop(request, None) is not None:
                self._post(records.about(Type.CANCEL, request))
            elif replied.done() and not replied.cancelled() and not replied.exception():
                self._release_if_lent(replied.result())
            raise
        return self._computed(reply, works)

    def _plan_number(self, plan: OutputPlan, model: int) -> int:
        known = self._plans.get(id(plan))
        if known is not None:
            return known[0]
        number = self._next_plan % self._max_plans
        if self._next_plan >= self._max_plans:
            del self._plans[self._plan_ids[number]]
            self._plan_ids[number] = id(plan)
        else:
            self._plan_ids.append(id(plan))
        self._next_plan += 1
        self._plans[id(plan)] = number, plan
        self._post(records.json_record(Type.PLAN, plan_to_json(plan), records.PLAN.pack(number, model)))
        return number

    def _computed(self, reply: Reply, works: Sequence[Work]) -> LinkedComputed:
        """Ends the link, and raises a `RequestError`, for places outside of the arena or the record."""
        release = None
        if reply.is_lent:
            request = reply.request
            release = lambda: self.release(request)  # noqa: E731
        places = iter(reply.places)

        def values(num_bytes: int) -> Bytes:
            place = next(places)
            if place < INLINE:
                return self._arena.read(place, num_bytes)
            return np.frombuffer(reply.inline, np.uint8, num_bytes, place - INLINE)

        def bytes_of(spec: TensorSpec) -> int:
            if not spec.is_bound:
                return spec.nbytes
            num_bytes = next(places) - INLINE
            if not 0 <= num_bytes <= spec.nbytes or num_bytes % spec.dtype.itemsize:
                raise ValueError(f"a tensor of {num_bytes} bytes, of {spec.nbytes} at most")
            return num_bytes

        try:
            outputs: list[Outputs | None] = [
                [
                    TensorData(
                        values(bytes_of(spec)),
                        values(4 * spec.num_scales).view(np.float32) if spec.num_scales else None,
                    )
                    for spec in work.specs
                ]
                for work in works
            ]
        except (StopIteration, ValueError) as error:
            self._fail(f"a REPLY with places that are not there: {error}")
            raise engine_down() from None
        return LinkedComputed(
            outputs,
            reply.submitted_ns,
            reply.started_ns,
            reply.compute_ns,
            reply.batch_inputs,
            reply.batch_tokens,
            release,
        )

    def release(self, request: int) -> None:
        """Any thread may call this: the garbage collector runs on any."""
        told = records.about(Type.RELEASE, request)
        if threading.get_ident() == self._thread:
            self._post(told)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._post, told)

    def _release_if_lent(self, reply: Reply) -> None:
        if reply.is_lent:
            self._post(records.about(Type.RELEASE, reply.request))

    # --------------------------------------------------------------------------- the connection

    def _post(self, data: bytes) -> None:
        """Writes the record together with all others of this turn of the event loop."""
        if self.is_lost:
            return
        if not self._unwritten:
            self._loop.call_soon(self._write)
        self._unwritten.append(data)

    def _write(self) -> None:
        if self._transport is not None and not self.is_lost:
            self._transport.write(b"".join(self._unwritten))
        self._unwritten.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            for kind, body in self._reader.feed(data):
                self._receive(kind, body)
        except RecordError as error:
            self._fail(str(error))

    def _receive(self, kind: int, body: memoryview) -> None:
        if kind == Type.REPLY:
            reply = records.parse_reply(body)
            replied = self._waiting.pop(reply.request, None)
            if replied is None or replied.done():
                self._release_if_lent(reply)
            else:
                replied.set_result(reply)
        elif kind == Type.FAIL:
            request = records.parse_request(body)
            replied = self._waiting.pop(request, None)
            if replied is not None and not replied.done():
                replied.set_exception(error_from(records.parse_json(body[records.REQUEST.size :])))
        elif kind == Type.STATE:
            state = records.parse_json(body)
            self._on_state(state["model"], EngineState(state["state"]))
        elif kind == Type.HELLO:
            self._on_hello(self, records.parse_json(body))

    def _fail(self, why: str) -> None:
        logger.error("the link to the engine has failed: %s", why)
        self.abort()

    def abort(self) -> None:
        """As if the engine had ended the link."""
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.close()
        self._on_lost(self)

    def fail_all(self, error: errors.RequestError) -> None:
        """Fails every request with this error, and cancels it in the engine."""
        waiting, self._waiting = self._waiting, {}
        for request, replied in waiting.items():
            if not replied.done():
                replied.set_exception(error)
            self._post(records.about(Type.CANCEL, request))

    def close(self) -> None:
        """Ends the link; all requests fail."""
        if self.is_lost:
            return
        self.is_lost = True
        self.fail_all(engine_down())
        if self._transport is not None:
            self._transport.close()


class LinkedModel:
    """A `ServedModel` whose engine runs in another process. `link` is set when that process has said hello,
    and again when another has taken its place."""

    def __init__(self, number: int, facts: ModelFacts, tokenization: Tokenization) -> None:
        self.facts = facts
        self.tokenization = tokenization
        self._number = number
        self._link: EngineLink | None = None
        self._state = EngineState.RESTARTING
        self._on_change: Callable[[], None] = lambda: None
        self._given_up = ""

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def is_idle(self) -> bool:
        return self._link is None or not self._link.num_waiting

    def start(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    def attach(self, link: EngineLink | None, state: EngineState) -> None:
        """Sets the link, or None where there is none now, and the state of the engine."""
        self._link, self._state = link, state
        self._on_change()

    def check(self, num_inputs: int, priority: Priority, deadline_ns: int | None, client: str) -> None:
        """The engine decides when it gets the request; here only its absence is known."""
        if self._link is None:
            raise engine_down()

    async def answer(
        self, works: Sequence[Work], priority: Priority, deadline_ns: int | None, client: str
    ) -> LinkedComputed:
        if self._given_up:
            raise errors.unavailable("ENGINE_DOWN", self._given_up, 1.0)
        if self._link is None:
            raise engine_down()
        return await self._link.compute(self._number, works, priority, deadline_ns, client)

    def give_up(self, reason: str) -> None:
        self._given_up = reason
        if self._link is not None:
            self._link.fail_all(errors.unavailable("ENGINE_DOWN", reason, 1.0))

    async def stop(self, timeout_s: float) -> bool:
        """Returns whether the tokenizer is idle."""
        if self._link is not None:
            self._link.close()
        self.tokenization.close()
        return not self.tokenization.is_busy


def engine_down() -> errors.RequestError:
    return errors.unavailable("ENGINE_DOWN", "the engine process is being started again; try again", 1.0)


def error_from(data: Any) -> errors.RequestError:
    """The error that `engine_side.error_to_json` has described."""
    code = next(one for one in grpc.StatusCode if one.value[0] == data["code"])
    return errors.RequestError(
        code,
        data["reason"],
        data["message"],
        violations=[(field, text) for field, text in data["violations"]],
        retry_after_s=data["retry_after_s"],
        metadata=data["metadata"],
    )

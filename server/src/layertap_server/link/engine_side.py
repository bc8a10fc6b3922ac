"""The engine's end of its links: takes requests from the fronts, and gives each its results."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from layertap_server import errors
from layertap_server.api.budget import ByteBudget
from layertap_server.engine_host import EngineHost
from layertap_server.link import records
from layertap_server.link.arena import WritableArena
from layertap_server.link.groups import Group, Request, grouped
from layertap_server.link.plans import check_plan, plan_from_json
from layertap_server.link.records import INLINE, RecordError, Reply, Submit, Type
from layertap_server.plan import OutputCost, OutputPlan, Outputs, TensorSpec, Work
from layertap_server.scheduling.batch_builder import depth_of
from layertap_server.scheduling.fair_queue import Priority, Ticket
from layertap_server.scheduling.output_cost import output_cost

logger = logging.getLogger(__name__)

# A reply of up to so many bytes is sent in its record; a larger one stays in the arena, and the front reads
# it there. Below it, copying takes less time than the RELEASE record and its bookkeeping.
INLINE_BYTES = 1 << 14
# The largest record of a front: the ids and plans of the most inputs that one request may have.
MAX_RECORD_BYTES = 2**28
# Bytes that may wait to be written to a front that does not read. While there are more, its requests are not
# read either.
MAX_UNWRITTEN_BYTES = 2**23
# By number: looking one up in the class takes as long as a tenth of a request.
PRIORITIES = {int(one): one for one in Priority}


@dataclass(slots=True)
class KnownPlan:
    """A plan of one front, and what it means for the lengths that have occurred."""

    model: int
    plan: OutputPlan
    # The share of the model that runs for it.
    depth: float
    by_length: dict[int, tuple[tuple[TensorSpec, ...], OutputCost]] = field(default_factory=dict)


class EngineServer:
    """What all links of an engine process share. Used on the event loop."""

    def __init__(
        self,
        hosts: Sequence[EngineHost],
        hello: dict[str, Any],
        arena: WritableArena | None,
        budget: ByteBudget,
        max_result_bytes: int,
        max_plans: int,
    ) -> None:
        """`hello` is what fronts are told first. The numbers of plans are below `max_plans`. `budget` limits the bytes of results that are promised,
        computed or lent."""
        self.hosts = hosts
        self.arena = arena
        self.budget = budget
        self.max_result_bytes = max_result_bytes
        self.max_plans = max_plans
        self.links: set[FrontLink] = set()
        self._hello = records.json_record(Type.HELLO, hello)

    @property
    def hello(self) -> bytes:
        states = [
            records.json_record(Type.STATE, {"model": number, "state": host.state.value})
            for number, host in enumerate(self.hosts)
        ]
        return b"".join([self._hello, *states])

    def tell_states(self) -> None:
        """Tells all fronts the states of the engines."""
        for number, host in enumerate(self.hosts):
            told = records.json_record(Type.STATE, {"model": number, "state": host.state.value})
            for link in self.links:
                link.post(told)


class FrontLink(asyncio.Protocol):
    """One connection from a front process. Used on the event loop.

    When it ends, its requests are cancelled, and all that was lent to the front is taken back. It ends at the
    first record that is not allowed; the supervisor then connects the front anew.
    """

    def __init__(self, server: EngineServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._reader = records.Reader(MAX_RECORD_BYTES)
        self._transport: asyncio.Transport | None = None
        self._unwritten: list[bytes] = []
        self._plans: dict[int, KnownPlan] = {}
        # The requests that have come since the last call of `_submit_all`, with the number of their model.
        self._new: list[tuple[int, Request]] = []
        # By number: the requests that are not settled, and the outputs that are lent, with their bytes.
        self._requests: dict[int, Request] = {}
        self._lent: dict[int, tuple[Sequence[Outputs | None], int]] = {}

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def num_lent(self) -> int:
        return len(self._lent)

    # ------------------------------------------------------------------------------ records

    def data_received(self, data: bytes) -> None:
        try:
            for kind, body in self._reader.feed(data):
                self._receive(kind, body)
            self._submit_all()
        except RecordError as error:
            logger.error("a front has sent what is not allowed, and is cut off: %s", error)
            if self._transport is not None:
                self._transport.abort()

    def _receive(self, kind: int, body: memoryview) -> None:
        if kind == Type.SUBMIT:
            self._submit(records.parse_submit(body))
        elif kind == Type.RELEASE:
            self._release(records.parse_request(body))
        elif kind == Type.PLAN:
            self._know(body)
        elif kind == Type.CANCEL:
            self._submit_all()  # it may be among them
            self._cancel(records.parse_request(body))

    def _know(self, body: memoryview) -> None:
        if len(body) < records.PLAN.size:
            raise RecordError("a PLAN that is too short")
        number, model = records.PLAN.unpack_from(body)
        if number >= self._server.max_plans or model >= len(self._server.hosts):
            raise RecordError(f"plan {number} of model {model}")
        plan = plan_from_json(records.parse_json(body[records.PLAN.size :]))
        depth = depth_of(plan, self._server.hosts[model].facts.num_layers)
        self._plans[number] = KnownPlan(model, plan, depth)

    def _submit(self, asked: Submit) -> None:
        """Reserves the bytes of a request's results, and keeps it until `_submit_all`. Raises
        `RecordError`."""
        if asked.request in self._requests or asked.request in self._lent:
            raise RecordError(f"request {asked.request} a second time")
        if asked.model >= len(self._server.hosts):
            raise RecordError(f"a request to model {asked.model}")
        priority = PRIORITIES.get(asked.priority)
        if priority is None:
            raise RecordError(f"priority {asked.priority}")
        host = self._server.hosts[asked.model]
        works, depth = self._works(asked, host)
        num_bytes = sum([work.result_bytes for work in works])
        if num_bytes > self._server.max_result_bytes:
            raise RecordError(f"a request for {num_bytes} bytes")
        budget = self._server.budget
        if not budget.reserve(num_bytes):
            self._refuse(asked.request, result_bytes_full(num_bytes, budget))
            return
        one = Request(asked.request, works, priority, asked.deadline_ns, asked.client, depth, num_bytes)
        self._requests[asked.request] = one
        self._new.append((asked.model, one))

    def _submit_all(self) -> None:
        """Submits what has come, those that are alike together."""
        if not self._new:
            return
        new, self._new = self._new, []
        now_ns = time.monotonic_ns()
        for number, host in enumerate(self._server.hosts):
            for group in grouped((one for model, one in new if model == number), now_ns):
                Group(host, self._answered, self._failed, group).submit()

    def _works(self, asked: Submit, host: EngineHost) -> tuple[list[Work], float]:
        """The works of a request, and the share of the model that runs for them. Raises `RecordError` for
        what would make the engine read outside of its tables."""
        facts = host.facts
        if (asked.types is not None) != (facts.type_vocab_size > 1):
            raise RecordError("token types, or none, unlike the model")
        check_ids(asked, facts.vocab_size, facts.type_vocab_size)
        all_ids = records.split(asked.ids, asked.lengths)
        all_types = None if asked.types is None else records.split(asked.types, asked.lengths)
        works = []
        for index, (number, ids) in enumerate(zip(asked.plans, all_ids, strict=True)):
            known = self._plans.get(number)
            if known is None or known.model != asked.model:
                raise RecordError(f"plan {number}, which is not known for this model")
            num_tokens = len(ids)
            found = known.by_length.get(num_tokens)
            if found is None:
                if not 0 < num_tokens <= facts.max_tokens:
                    raise RecordError(f"{num_tokens} tokens")
                check_plan(known.plan, facts, num_tokens)
                specs = known.plan.specs(num_tokens, facts.hidden_size)
                found = known.by_length[num_tokens] = specs, output_cost(known.plan, num_tokens, facts)
            specs, cost = found
            types = None if all_types is None else all_types[index]
            works.append(Work(ids, types, known.plan, specs, cost))
        return works, self._plans[asked.plans[0]].depth

    def _answered(self, one: Request, outputs: Sequence[Outputs | None], ticket: Ticket) -> None:
        del self._requests[one.number]
        reply = self._reply(one, outputs, ticket)
        if reply.is_lent:
            self._lent[one.number] = outputs, one.num_bytes
        else:
            self._server.budget.release(one.num_bytes)
        self.post(records.reply_record(reply))

    def _failed(self, one: Request, error: errors.RequestError) -> None:
        del self._requests[one.number]
        self._server.budget.release(one.num_bytes)
        self._refuse(one.number, error)

    def _reply(self, one: Request, outputs: Sequence[Outputs | None], ticket: Ticket) -> Reply:
        places: list[int] = []
        inline: list[bytes] = []
        num_inline = 0
        arena = self._server.arena if one.num_bytes > INLINE_BYTES else None
        for work, own in zip(one.works, outputs, strict=True):
            for spec, data in zip(work.specs, own or (), strict=False):
                if spec.is_bound:
                    places.append(INLINE + data.data.nbytes)
                for array in (data.data,) if data.scales is None else (data.data, data.scales):
                    offset = None if arena is None else arena.offset_of(array)
                    if offset is not None:
                        places.append(offset)
                        continue
                    places.append(INLINE + num_inline)
                    inline.append(array.tobytes())
                    num_inline += len(inline[-1])
        return Reply(
            one.number,
            ticket.submitted_ns,
            ticket.started_ns,
            ticket.compute_ns,
            ticket.batch_inputs,
            ticket.batch_tokens,
            places,
            b"".join(inline),
        )

    def _refuse(self, request: int, error: errors.RequestError) -> None:
        before = records.REQUEST.pack(request)
        self.post(records.json_record(Type.FAIL, error_to_json(error), before))

    def _cancel(self, request: int) -> None:
        one = self._requests.pop(request, None)
        if one is not None:  # else its reply is under way, and will be released
            assert one.group is not None
            one.group.cancel(one)
            self._server.budget.release(one.num_bytes)

    def _release(self, request: int) -> None:
        found = self._lent.pop(request, None)
        if found is None:
            raise RecordError(f"the release of request {request}, which is not lent")
        self._server.budget.release(found[1])

    # --------------------------------------------------------------------------- the connection

    def post(self, data: bytes) -> None:
        """Writes the record together with all others of this turn of the event loop."""
        if not self._unwritten:
            self._loop.call_soon(self._write)
        self._unwritten.append(data)

    def _write(self) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(b"".join(self._unwritten))
        self._unwritten.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(MAX_UNWRITTEN_BYTES)
        self._server.links.add(self)
        self.post(self._server.hello)

    def pause_writing(self) -> None:
        """The front does not read its replies: take no more requests of it."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._server.links.discard(self)
        self._submit_all()
        for request in list(self._requests):
            self._cancel(request)
        for request in list(self._lent):
            self._release(request)

    def close(self) -> None:
        """Ends the link once what is posted has been written."""
        self._write()
        if self._transport is not None:
            self._transport.close()


def check_ids(asked: Submit, vocab_size: int, num_types: int) -> None:
    """Raises `RecordError` for ids or types that the model has no rows for."""
    ids, types = asked.ids, asked.types
    # `argmax` takes half the time of `max`, which is a function in Python.
    if len(ids) and ids[ids.argmax()] >= vocab_size:
        raise RecordError("ids that the model does not have")
    if types is not None and len(types) and types[types.argmax()] >= num_types:
        raise RecordError("token types that the model does not have")


def result_bytes_full(num_bytes: int, budget: ByteBudget) -> errors.RequestError:
    return errors.overloaded(
        "RESULT_BYTES_FULL",
        f"{budget.reserved_bytes} bytes of results are not read yet, and this request needs {num_bytes}; the "
        f"limit is {budget.limit_bytes} (max_inflight_result_bytes)",
        1.0,
    )


def error_to_json(error: errors.RequestError) -> dict[str, Any]:
    return {
        "code": error.code.value[0],
        "reason": error.reason,
        "message": error.message,
        "violations": error.violations,
        "retry_after_s": error.retry_after_s,
        "metadata": error.metadata,
    }

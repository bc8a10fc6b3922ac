"""One EncodeRequest to its answer: validated, tokenized, measured, computed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors, translate, wire
from layertap_server.budget import StreamBudget
from layertap_server.coalescing import Coalescing
from layertap_server.config import Config
from layertap_server.fair_queue import Coming, Priority, Ticket
from layertap_server.messages import head_message
from layertap_server.plan import ModelFacts, OutputField, Outputs, Work
from layertap_server.resolve import Resolver
from layertap_server.serving import ServedModel
from layertap_server.texts import Encoded
from layertap_server.turns import map_in_turns

RETRY_LATER_S = 1.0
# What takes microseconds for an input takes more than a turn for these.
MANY_INPUTS = 128
# Callers ask for the same outputs thousands of times.
MAX_KNOWN_SELECTIONS = 64
SHORT_SELECTION_BYTES = 256


@dataclass(slots=True)
class Prepared:
    """One input, ready to be computed; `num_bytes` is what its result will take on the wire."""

    work: Work
    head: pb.EncodeResult
    num_bytes: int


@dataclass(slots=True)
class Answer:
    """What one EncodeRequest came to; release `reserved_bytes` once they are sent."""

    inputs: list[Prepared]
    outputs: Sequence[Outputs | None]
    timing: pb.Timing
    reserved_bytes: int
    # Tensor bytes of all answers so far, by output.
    written: Counter[OutputField]

    def results(self) -> Iterator[wire.InputResult]:
        """Once: what is taken of them counts as written."""
        for one, outputs in zip(self.inputs, self.outputs, strict=True):
            for spec in one.work.specs:
                self.written[spec.field] += spec.nbytes
            yield wire.InputResult(one.head, one.work.specs, outputs or ())


class Answering:
    """The way of a request through one model, and how many are on it."""

    def __init__(self, config: Config) -> None:
        self.num_in_flight = 0
        # Tensor bytes written, by output.
        self.reply_bytes: Counter[OutputField] = Counter()
        self._config = config
        self._coalescing = Coalescing()
        self._resolvers: dict[tuple[str, int, bytes], Resolver] = {}

    async def answer(
        self,
        model: ServedModel,
        request: pb.EncodeRequest,
        inputs: Sequence[pb.Input],
        client: str,
        deadline_ns: int | None,
        budget: StreamBudget,
        *,
        streamed: bool,
    ) -> Answer:
        """What cannot be answered is refused before anything is computed, by a `RequestError`."""
        come_ns = time.monotonic_ns()
        self.num_in_flight += 1
        try:
            await self._coalescing.turn(self.num_in_flight)
            begun_ns = time.monotonic_ns()
            resolver = self._resolver(request, model.facts)
            selection = resolver.selection
            truncation = translate.parse_truncation(request.truncation)
            priority = translate.known_enum(Priority, request.priority, Priority.NORMAL, "priority")
            if selection.needs_model and inputs:
                model.check(len(inputs), priority, deadline_ns, client)
            max_inputs = self._config.max_inputs_per_request
            asked = await translate.parse_inputs(request, inputs, model.facts, max_inputs)
            encoded = await model.encode(asked, truncation)
            tokenize_ns = time.monotonic_ns() - begun_ns

            def prepare(index: int, tokens: Encoded) -> Prepared:
                work = resolver.resolve(asked[index], tokens, index)
                head = head_message(tokens, selection.tokens)
                return Prepared(work, head, wire.result_size(head, work.specs))

            prepared = await map_in_turns(prepare, encoded)
            reply_bytes = wire.MAX_TIMING_BYTES + sum([one.num_bytes for one in prepared])
            self._check_size(reply_bytes, streamed=streamed)
            if not await budget.reserve(reply_bytes):
                raise errors.overloaded(
                    "RESULT_BYTES_FULL",
                    f"{budget.server.reserved_bytes} bytes of results wait to be read, and this one has "
                    f"{reply_bytes}; the limit is {budget.server.limit_bytes} (max_inflight_result_bytes)",
                    RETRY_LATER_S,
                )
            try:
                timing = pb.Timing(tokenize_ns=tokenize_ns, queue_ns=begun_ns - come_ns)
                outputs: Sequence[Outputs | None] = [()] * len(prepared)
                if selection.needs_model:
                    if len(prepared) > MANY_INPUTS:
                        await asyncio.sleep(0)  # the queue takes them all at once: in a turn of its own
                    works = [one.work for one in prepared]
                    ticket = await model.answer(works, priority, deadline_ns, client)
                    outputs = ticket.outputs
                    add_times(timing, ticket)
                    if len(prepared) > MANY_INPUTS:
                        await asyncio.sleep(0)
                timing.total_ns = time.monotonic_ns() - come_ns
                return Answer(prepared, outputs, timing, reply_bytes, self.reply_bytes)
            except BaseException:
                budget.release(reply_bytes)
                raise
        finally:
            self.num_in_flight -= 1

    def check(
        self,
        model: ServedModel,
        request: pb.EncodeRequest,
        priority: Priority,
        client: str,
        deadline_ns: int | None,
        coming: Coming,
    ) -> float:
        """The nanoseconds to reckon with until the answer, 0 where little is known, or the `RequestError` that is
        certain for load, of what is asked for often; so many are `coming` beside it. From any thread."""
        resolver = self._resolvers.get(self._resolver_key(request, model.facts))
        if resolver is not None and resolver.selection.needs_model and request.inputs:
            return model.check(len(request.inputs), priority, deadline_ns, client, coming)
        return 0.0

    def _resolver(self, request: pb.EncodeRequest, facts: ModelFacts) -> Resolver:
        key = self._resolver_key(request, facts)
        resolver = self._resolvers.get(key)
        if resolver is None:
            resolver = Resolver(translate.parse_selection(request, facts), facts)
            if len(key[-1]) <= SHORT_SELECTION_BYTES:
                if len(self._resolvers) == MAX_KNOWN_SELECTIONS:
                    self._resolvers.clear()
                self._resolvers[key] = resolver
        return resolver

    @staticmethod
    def _resolver_key(request: pb.EncodeRequest, facts: ModelFacts) -> tuple[str, int, bytes]:
        return facts.name, request.wire_dtype, request.outputs.SerializeToString()

    def _check_size(self, reply_bytes: int, *, streamed: bool) -> None:
        limit = self._config.max_result_bytes if streamed else self._config.max_message_bytes
        if reply_bytes > limit:
            raise errors.reply_too_large(reply_bytes, limit, streamed=streamed)


def add_times(timing: pb.Timing, ticket: Ticket) -> None:
    timing.queue_ns += max(ticket.started_ns - ticket.submitted_ns, 0)
    timing.compute_ns = ticket.compute_ns
    timing.batch_inputs = ticket.batch_inputs
    timing.batch_tokens = ticket.batch_tokens

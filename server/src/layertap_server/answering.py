"""One EncodeRequest to its answer: validated, tokenized, measured, computed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors, translate, wire
from layertap_server.budget import StreamBudget
from layertap_server.config import Config
from layertap_server.fair_queue import Priority, Ticket
from layertap_server.messages import head_message
from layertap_server.plan import ModelFacts, TensorData, Work
from layertap_server.resolve import check_length, resolve
from layertap_server.serving import ServedModel
from layertap_server.tokenization import Encoded, Input
from layertap_server.turns import in_turns

RETRY_LATER_S = 1.0
# What takes microseconds for an input takes more than a turn for these.
MANY_INPUTS = 128
# Callers ask for the same outputs thousands of times.
MAX_KNOWN_SELECTIONS = 256
SHORT_SELECTION_BYTES = 256


@dataclass(slots=True)
class Answer:
    """What one EncodeRequest came to; release `reserved_bytes` once they are sent."""

    results: list[wire.InputResult]
    timing: pb.Timing
    reserved_bytes: int


class Answering:
    """The way of a request through one model, and how many are on it."""

    def __init__(self, config: Config) -> None:
        self.num_in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()
        # Tensor bytes, by output.
        self.reply_bytes: Counter[str] = Counter()
        self._config = config
        self._selections: dict[tuple[str, int, bytes], translate.Selection] = {}

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
        begun_ns = time.monotonic_ns()
        facts = model.facts
        selection = self._selection(request, facts)
        truncation = translate.parse_truncation(request.truncation)
        priority = translate.known_enum(Priority, request.priority, Priority.NORMAL, "priority")
        self.num_in_flight += 1
        self.idle.clear()
        try:
            if selection.needs_model and inputs:
                model.check(len(inputs), priority, deadline_ns, client)
            asked = await translate.parse_inputs(request, inputs, facts, self._config.max_inputs_per_request)
            encoded = await model.encode(asked, truncation)
            tokenize_ns = time.monotonic_ns() - begun_ns
            works = await self._resolve(selection, asked, encoded, facts)
            heads = []
            reply_bytes = wire.MAX_TIMING_BYTES
            tensor_bytes: Counter[str] = Counter()
            async for tokens, work in in_turns(zip(encoded, works, strict=True)):
                heads.append(head_message(tokens, selection.tokens))
                reply_bytes += wire.result_size(heads[-1], work.specs)
                for spec in work.specs:
                    tensor_bytes[spec.field.name.lower()] += spec.nbytes
            self._check_size(reply_bytes, streamed=streamed)
            if not await budget.reserve(reply_bytes):
                raise errors.overloaded(
                    "RESULT_BYTES_FULL",
                    f"{budget.server.reserved_bytes} bytes of results wait to be read, and this one has "
                    f"{reply_bytes}; the limit is {budget.server.limit_bytes} (max_inflight_result_bytes)",
                    RETRY_LATER_S,
                )
            try:
                timing = pb.Timing(tokenize_ns=tokenize_ns)
                outputs: Sequence[Sequence[TensorData] | None] = [()] * len(works)
                if selection.needs_model:
                    if len(works) > MANY_INPUTS:
                        await asyncio.sleep(0)  # the queue takes them all at once: in a turn of its own
                    ticket = await model.answer(works, priority, deadline_ns, client)
                    outputs = ticket.outputs
                    add_times(timing, ticket)
                    if len(works) > MANY_INPUTS:
                        await asyncio.sleep(0)
                self.reply_bytes.update(tensor_bytes)
                timing.total_ns = time.monotonic_ns() - begun_ns
                results = []
                async for head, work, output in in_turns(zip(heads, works, outputs, strict=True)):
                    results.append(wire.InputResult(head, work.specs, output or ()))
                return Answer(results, timing, reply_bytes)
            except BaseException:
                budget.release(reply_bytes)
                raise
        finally:
            self.num_in_flight -= 1
            if self.num_in_flight == 0:
                self.idle.set()

    def _selection(self, request: pb.EncodeRequest, facts: ModelFacts) -> translate.Selection:
        outputs = request.outputs.SerializeToString()
        key = facts.name, request.wire_dtype, outputs
        selection = self._selections.get(key)
        if selection is None:
            selection = translate.parse_selection(request, facts)
            if len(outputs) <= SHORT_SELECTION_BYTES:
                if len(self._selections) == MAX_KNOWN_SELECTIONS:
                    self._selections.clear()
                self._selections[key] = selection
        return selection

    async def _resolve(
        self, selection: translate.Selection, inputs: list[Input], encoded: list[Encoded], facts: ModelFacts
    ) -> list[Work]:
        works = []
        async for i, (one, tokens) in in_turns(enumerate(zip(inputs, encoded, strict=True))):
            field = f"inputs[{i}]"
            check_length(one, tokens, field, facts)
            works.append(resolve(selection, one, tokens, field, facts))
        return works

    def _check_size(self, reply_bytes: int, *, streamed: bool) -> None:
        limit = self._config.max_result_bytes if streamed else self._config.max_message_bytes
        if reply_bytes > limit:
            raise errors.reply_too_large(reply_bytes, limit, streamed=streamed)


def add_times(timing: pb.Timing, ticket: Ticket) -> None:
    timing.queue_ns = max(ticket.started_ns - ticket.submitted_ns, 0)
    timing.compute_ns = ticket.compute_ns
    timing.batch_inputs = ticket.batch_inputs
    timing.batch_tokens = ticket.batch_tokens

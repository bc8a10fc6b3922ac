"""Answers one EncodeRequest: validates it, tokenizes its inputs, calculates the reply's size, computes it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors
from layertap_server.api import serialization as wire
from layertap_server.api.budget import StreamBudget
from layertap_server.api.cooperative import map_with_yields
from layertap_server.api.field_values import known_enum
from layertap_server.api.input_validation import default_prompt, parse_inputs, parse_limit, parse_truncation
from layertap_server.api.messages import head_message
from layertap_server.api.planning import Resolver
from layertap_server.api.validation import Selection, check_num_vectors, parse_selection
from layertap_server.config import Config
from layertap_server.enums import OutputField
from layertap_server.errors import RequestError
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import Outputs, TensorSpec, Work
from layertap_server.scheduling.fair_queue import Priority
from layertap_server.serving import Computed, ServedModel, encode
from layertap_server.tokenization.inputs import Cut, Encoded, Input, Pair, Text, Truncation

RETRY_LATER_S = 1.0
# With more inputs than this, steps that take microseconds for an input hold the event loop for too long.
MANY_INPUTS = 128
# Reasons of errors that one input can cause, and would cause again; all others concern the whole request.
OF_ONE_INPUT = ("OUT_OF_MEMORY", "INTERNAL")
# Limits of the cache of resolvers; clients ask for the same outputs thousands of times. Selections whose
# serialized `outputs` are longer than `SHORT_SELECTION_BYTES` are not cached.
MAX_KNOWN_SELECTIONS = 64
SHORT_SELECTION_BYTES = 256
# The head of results that are only counted, because the reply is over its limit.
NOTHING = pb.EncodeResult()


@dataclass(slots=True)
class Prepared:
    """One input, ready to be computed; `num_bytes` is the size of its result on the wire.

    Before it is computed, this is the most that it may be, and `least_bytes` the least. An input that failed
    alone has no work, and its head holds its status.
    """

    work: Work | None
    head: pb.EncodeResult
    num_bytes: int
    least_bytes: int
    specs: Sequence[TensorSpec] = ()
    outputs: Outputs = ()
    # What the outputs are part of. It is kept, because their memory may be lent only for as long as it lives.
    computed: Computed | None = None

    @classmethod
    def of(cls, work: Work, head: pb.EncodeResult) -> Prepared:
        size = least = wire.result_size(head, work.specs)
        if work.plan.sparse is not None:
            least = wire.result_size(head, [spec for spec in work.specs if not spec.is_bound])
        return cls(work, head, size, least, work.specs)

    def take(self, outputs: Outputs, computed: Computed) -> None:
        self.outputs, self.computed = outputs, computed
        if self.least_bytes != self.num_bytes:
            self.specs = [spec.of(data) for spec, data in zip(self.specs, outputs, strict=True)]
            self.num_bytes = self.least_bytes = wire.result_size(self.head, self.specs)

    def fail(self, error: RequestError) -> None:
        """Takes the error as the input's result."""
        self.work, self.specs, self.head = None, (), pb.EncodeResult(status=error.to_status())
        self.num_bytes = self.least_bytes = wire.result_size(self.head, ())


@dataclass(slots=True)
class Answer:
    """The answer to one EncodeRequest. Whoever sends it releases `reserved_bytes` afterwards."""

    inputs: list[Prepared]
    timing: pb.Timing
    reserved_bytes: int
    # Tensor bytes of all answers so far, by output; shared by all answers.
    written: Counter[OutputField]

    def results(self) -> Iterator[wire.InputResult]:
        """The results, to be iterated once: each that is taken is added to `written`."""
        for one in self.inputs:
            for spec in one.specs:
                self.written[spec.field] += spec.nbytes
            yield wire.InputResult(one.head, one.specs, one.outputs)


@dataclass(frozen=True, slots=True)
class Asking:
    """The model that computes a request's works, and the request's priority, deadline and client."""

    model: ServedModel
    priority: Priority
    deadline_ns: int | None
    client: str

    async def answer(self, works: Sequence[Work]) -> Computed:
        return await self.model.answer(works, self.priority, self.deadline_ns, self.client)


class Answering:
    """Answers requests, and counts those in flight. Used on the event loop, except for `check`."""

    def __init__(self, config: Config, count_refusal: Callable[[Exception], None]) -> None:
        """`count_refusal` is called with the error of each input that fails alone."""
        self.num_in_flight = 0
        self._count_refusal = count_refusal
        # Tensor bytes written, by output.
        self.reply_bytes: Counter[OutputField] = Counter()
        self._config = config
        self._resolvers: dict[tuple[str, int, bytes], Resolver] = {}

    async def answer(
        self,
        model: ServedModel,
        request: pb.EncodeRequest,
        inputs: Sequence[pb.Input | RequestError],
        client: str,
        deadline_ns: int | None,
        budget: StreamBudget,
        *,
        streamed: bool,
    ) -> Answer:
        """The request's answer. Raises a `RequestError`; for an invalid request, before anything is computed.

        With `fail_each_alone`, an input at fault is answered by its own status, and the others are computed.
        """
        come_ns = time.monotonic_ns()
        self.num_in_flight += 1
        try:
            resolver = self._resolver(request, model.facts)
            selection = resolver.selection
            truncation = parse_truncation(request.truncation)
            priority = known_enum(Priority, request.priority, Priority.NORMAL, "priority")
            if selection.needs_model and inputs:
                model.check(len(inputs), priority, deadline_ns, client)
            each_alone = request.fail_each_alone
            limit_bytes = self._limit_bytes(streamed=streamed)
            prepared, tokenize_ns = await self._prepare(
                model, resolver, request, inputs, truncation, limit_bytes
            )
            del request, inputs  # frees the text, perhaps megabytes, before the wait
            reply_bytes = wire_bytes(prepared)
            self._check_size(wire_bytes(prepared, least=True), streamed=streamed)
            if not await budget.reserve(reply_bytes):
                raise errors.overloaded(
                    "RESULT_BYTES_FULL",
                    f"{budget.server.reserved_bytes} bytes of results are not read yet, and this request needs "
                    f"{reply_bytes}; the limit is {budget.server.limit_bytes} (max_inflight_result_bytes)",
                    RETRY_LATER_S,
                )
            try:
                timing = pb.Timing(tokenize_ns=tokenize_ns)
                if selection.needs_model:
                    if len(prepared) > MANY_INPUTS:
                        await asyncio.sleep(0)  # they enter the queue in one step: yield before it
                    asking = Asking(model, priority, deadline_ns, client)
                    computed = await self._compute(asking, prepared, each_alone=each_alone)
                    if computed is not None:
                        add_times(timing, computed)
                    if each_alone or selection.sparse is not None:
                        # An input's status may be larger than its result, a sparse vector smaller than its bound.
                        self._check_size(wire_bytes(prepared), streamed=streamed)
                    if selection.sparse is not None:
                        budget.release(reply_bytes - wire_bytes(prepared))
                        reply_bytes = wire_bytes(prepared)
                    if len(prepared) > MANY_INPUTS:
                        await asyncio.sleep(0)
                timing.total_ns = time.monotonic_ns() - come_ns
                return Answer(prepared, timing, reply_bytes, self.reply_bytes)
            except BaseException:
                budget.release(reply_bytes)
                raise
        finally:
            self.num_in_flight -= 1

    async def _prepare(
        self,
        model: ServedModel,
        resolver: Resolver,
        request: pb.EncodeRequest,
        inputs: Sequence[pb.Input | RequestError],
        truncation: Truncation,
        limit_bytes: int,
    ) -> tuple[list[Prepared], int]:
        """The works of the inputs, and the nanoseconds that tokenizing took. Raises a `RequestError`.

        Once the reply is over `limit_bytes`, further inputs are only measured, and their works not kept.
        """
        begun_ns = time.monotonic_ns()
        each_alone, selection, facts = request.fail_each_alone, resolver.selection, model.facts
        limit = parse_limit(request, selection, facts)
        prompt = default_prompt(request, selection, facts)
        asked = await parse_inputs(request, inputs, facts, prompt, each_alone=each_alone)
        check_num_vectors(selection, len(asked))
        cut = truncation if limit.max_tokens == facts.max_tokens else Cut(truncation, limit.max_tokens)
        if each_alone:
            encoded = await self._encode_each(model, asked, cut)
        else:
            encoded = await encode(model, cast("Sequence[Input]", asked), cut)
        pooled_from = await self._prompt_tokens(model, asked, encoded, selection, cut)
        tokenize_ns = time.monotonic_ns() - begun_ns

        least_bytes = 0

        def prepare(index: int, tokens: Encoded | RequestError) -> Prepared:
            nonlocal least_bytes
            if isinstance(tokens, RequestError):
                raise tokens
            one = cast("Input", asked[index])
            work = resolver.resolve(one, tokens, index, limit, truncation, pooled_from.get(index, 0))
            ready = Prepared.of(work, head_message(tokens, selection.tokens))
            least_bytes += ready.least_bytes
            if least_bytes > limit_bytes:
                ready.work, ready.specs, ready.head = None, (), NOTHING
            return ready

        if not each_alone:
            return await map_with_yields(prepare, encoded), tokenize_ns
        found = await map_with_yields(errors.kept(prepare), encoded)
        return [self._failed(one) if isinstance(one, RequestError) else one for one in found], tokenize_ns

    async def _encode_each(
        self, model: ServedModel, asked: Sequence[Input | RequestError], truncation: Truncation | Cut
    ) -> Sequence[Encoded | RequestError]:
        """As `serving.encode`, for the valid inputs; errors stay in their places.

        If the tokenizer fails, each input is encoded by itself, and those that fail again become errors.
        """
        good = [one for one in asked if not isinstance(one, RequestError)]
        encoded: list[Encoded | RequestError] = []
        try:
            encoded += await encode(model, good, truncation) if good else ()
        except RequestError:
            raise
        except Exception:
            each = [encode(model, [one], truncation) for one in good]
            for found in await asyncio.gather(*each, return_exceptions=True):
                if isinstance(found, RequestError | asyncio.CancelledError):
                    raise found from None
                encoded += found if isinstance(found, list) else [errors.internal(found)]
        left = iter(encoded)
        return [one if isinstance(one, RequestError) else next(left) for one in asked]

    async def _compute(
        self, asking: Asking, prepared: Sequence[Prepared], *, each_alone: bool
    ) -> Computed | None:
        """Computes the inputs and stores their outputs; returns what was computed last, if anything was.

        Raises a `RequestError`. A request fails as a whole and does not say which input was the cause. So if
        it fails and each input is to fail alone, each input is submitted again by itself. This is rare, and
        the scheduler may still put them into one batch.
        """
        whole = [one for one in prepared if one.work is not None]
        if not whole:
            return None
        works = [cast("Work", one.work) for one in whole]
        try:
            computed = await asking.answer(works)
        except RequestError as error:
            if not each_alone or error.reason not in OF_ONE_INPUT:
                raise
            answers: list[Computed | BaseException] = [error]
            if len(works) > 1:
                each = [asking.answer([work]) for work in works]
                answers = await asyncio.gather(*each, return_exceptions=True)
        else:
            for one, outputs in zip(whole, computed.outputs, strict=True):
                one.take(outputs or (), computed)
            return computed
        last = None
        for one, found in zip(whole, answers, strict=True):
            if not isinstance(found, BaseException):
                last = found
                one.take(found.outputs[0] or (), found)
            elif isinstance(found, RequestError) and found.reason in OF_ONE_INPUT:
                self._count_refusal(found)
                one.fail(found)
            else:
                raise found
        return last

    def _failed(self, error: RequestError) -> Prepared:
        """The result of an input that fails alone: its status."""
        self._count_refusal(error)
        failed = Prepared(None, NOTHING, 0, 0)
        failed.fail(error)
        return failed

    async def _prompt_tokens(
        self,
        model: ServedModel,
        inputs: Sequence[Input | RequestError],
        encoded: Sequence[Encoded | RequestError],
        selection: Selection,
        cut: Truncation | Cut,
    ) -> dict[int, int]:
        """By input, how many prompt tokens the configured embedding leaves out; empty for most models.

        Counted as in sentence-transformers: the tokens of the prompt alone, without the special token at its
        end.
        """
        if model.facts.pool_prompt or not selection.wants_configured:
            return {}
        prompted = [
            (index, one)
            for index, one in enumerate(inputs)
            if isinstance(one, Text | Pair) and one.prompt_chars
        ]
        if not prompted:
            return {}
        _, first = prompted[0]  # all have the same prompt
        prompt = (first.text if isinstance(first, Text) else first.first)[: first.prompt_chars]
        max_tokens = cut.max_tokens if isinstance(cut, Cut) else model.facts.max_tokens
        [alone] = await encode(model, [Text(prompt)], Cut(Truncation.END, max_tokens))
        special = alone.table().special
        num_tokens = alone.num_tokens - bool(special and special[-1])
        starts_cut = (cut.truncation if isinstance(cut, Cut) else cut) is Truncation.START
        counts: dict[int, int] = {}
        for index, _ in prompted:
            tokens = encoded[index]
            if isinstance(tokens, Encoded):
                counts[index] = (
                    tokens.num_prompt_tokens if starts_cut and tokens.num_truncated else num_tokens
                )
        return counts

    def check(
        self,
        model: ServedModel,
        request: pb.EncodeRequest,
        priority: Priority,
        client: str,
        deadline_ns: int | None,
    ) -> None:
        """Raises the `RequestError` of a request that is certain to be refused for load.

        Only selections that have been asked for before, and are cached, are checked. May be called on any
        thread.
        """
        resolver = self._resolvers.get(self._resolver_key(request, model.facts))
        if resolver is not None and resolver.selection.needs_model and request.inputs:
            model.check(len(request.inputs), priority, deadline_ns, client)

    def _resolver(self, request: pb.EncodeRequest, facts: ModelFacts) -> Resolver:
        key = self._resolver_key(request, facts)
        resolver = self._resolvers.get(key)
        if resolver is None:
            resolver = Resolver(parse_selection(request, facts), facts)
            if len(key[-1]) <= SHORT_SELECTION_BYTES:
                if len(self._resolvers) == MAX_KNOWN_SELECTIONS:
                    self._resolvers.clear()
                self._resolvers[key] = resolver
        return resolver

    @staticmethod
    def _resolver_key(request: pb.EncodeRequest, facts: ModelFacts) -> tuple[str, int, bytes]:
        return facts.name, request.wire_dtype, request.outputs.SerializeToString()

    def _limit_bytes(self, *, streamed: bool) -> int:
        """The size limit of one reply."""
        return self._config.max_result_bytes if streamed else self._config.max_message_bytes

    def _check_size(self, reply_bytes: int, *, streamed: bool) -> None:
        if reply_bytes > (limit := self._limit_bytes(streamed=streamed)):
            raise errors.reply_too_large(reply_bytes, limit, streamed=streamed)


def wire_bytes(prepared: Sequence[Prepared], *, least: bool = False) -> int:
    """The size of the reply, its Timing at its largest."""
    return wire.MAX_TIMING_BYTES + sum([one.least_bytes if least else one.num_bytes for one in prepared])


def add_times(timing: pb.Timing, computed: Computed) -> None:
    timing.queue_ns = max(computed.started_ns - computed.submitted_ns, 0)
    timing.compute_ns = computed.compute_ns
    timing.batch_inputs = computed.batch_inputs
    timing.batch_tokens = computed.batch_tokens

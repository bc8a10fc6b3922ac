"""RPC in, RPC out: validate, translate, await.

Requests and replies cross gRPC as bytes: parsing here gives malformed ones a clear error, and
replies are built by `wire` around the engine's own buffers.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import wraps
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors, translate, wire
from layertap_server.budget import ByteBudget, StreamBudget
from layertap_server.config import Config
from layertap_server.fair_queue import Priority, Ticket
from layertap_server.messages import head_message, model_message, tokens_message
from layertap_server.plan import ModelFacts, TensorData, Work
from layertap_server.resolve import check_length, resolve
from layertap_server.security import ANYONE, Client, Guard
from layertap_server.serving import ServedModel
from layertap_server.streaming import FrameQueue, Reply
from layertap_server.tokenization import Encoded, Input
from layertap_server.turns import in_turns

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["EncoderService"].full_name
DETAILS_KEY = "grpc-status-details-bin"
# Metadata by which callers without tokens tell themselves apart.
CLIENT_KEY = "layertap-client"
RETRY_LATER_S = 1.0
LARGE_MESSAGE_BYTES = 2**20
# Requests in flight on one stream; past it the stream is not read, and gRPC's flow control holds the caller.
MAX_STREAM_REQUESTS = 1024

MessageT = TypeVar("MessageT", bound=Message)


class Phase(Enum):
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(slots=True)
class Answer:
    """What one EncodeRequest came to; `release` its bytes once they are sent."""

    results: list[wire.InputResult]
    timing: pb.Timing
    reserved_bytes: int


def parse(message_class: type[MessageT], data: bytes) -> MessageT:
    message = message_class()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise errors.malformed(
            f"these {len(data)} bytes are no {message_class.DESCRIPTOR.full_name}"
        ) from None
    return message


def unary(method: Callable[..., Awaitable[bytes]]) -> Callable[..., Awaitable[bytes]]:
    """Ends a failed call with its status and details."""

    @wraps(method)
    async def call(self: EncoderService, data: bytes, context: Any) -> bytes:
        try:
            return await method(self, data, context)
        except Exception as error:
            self.count_refusal(error)
            await abort(context, error)
            raise

    return call


async def abort(context: Any, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        return
    refused = errors.as_request_error(error)
    details = refused.to_status().SerializeToString()
    await context.abort(refused.code, refused.message, trailing_metadata=((DETAILS_KEY, details),))


class EncoderService:
    """`layertap.v1.EncoderService`. Filled with models by the app once they are loaded."""

    def __init__(self, config: Config, guard: Guard) -> None:
        self.config = config
        self.guard = guard
        self.phase = Phase.LOADING
        self.models: dict[str, ServedModel] = {}
        self.budget = ByteBudget(config.max_inflight_result_bytes)
        # Errors answered, by their reason, and tensor bytes, by output.
        self.refused: Counter[str] = Counter()
        self.reply_bytes: Counter[str] = Counter()
        self._num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._stream_readers: set[asyncio.Task[None]] = set()

    def handlers(self) -> grpc.GenericRpcHandler:
        methods = {
            "Encode": grpc.unary_unary_rpc_method_handler(self.Encode),
            "EncodeStream": grpc.stream_stream_rpc_method_handler(self.EncodeStream),
            "Tokenize": grpc.unary_unary_rpc_method_handler(self.Tokenize),
            "GetModel": grpc.unary_unary_rpc_method_handler(self.GetModel),
            "ListModels": grpc.unary_unary_rpc_method_handler(self.ListModels),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def drain(self) -> None:
        """Accepts no more; returns once no accepted request is under way.

        Open streams answer what they accepted, and end with UNAVAILABLE.
        """
        self.phase = Phase.DRAINING
        for reader in self._stream_readers:
            reader.cancel()
        await self._idle.wait()

    # ------------------------------------------------------------------------------- RPCs

    @unary
    async def Encode(self, data: bytes, context: Any) -> bytes:
        client = self._admit(context)
        request = parse(pb.EncodeRequest, data)
        budget = StreamBudget(self.budget)
        answer = await self._encode(request, client, deadline_of(context), budget, streamed=False)
        context.add_done_callback(lambda _: budget.release(answer.reserved_bytes))
        parts: list[wire.Buffer] = []
        async for some in in_turns(wire.response_parts(answer.results, answer.timing)):
            parts += some
        message = b"".join(parts)
        if len(message) > LARGE_MESSAGE_BYTES:
            await asyncio.sleep(0)  # gRPC copies it once more, on the loop: in a turn of its own
        return message

    async def EncodeStream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            client = self._admit(context)
        except errors.RequestError as error:
            self.count_refusal(error)
            await abort(context, error)
            raise
        frames = FrameQueue(StreamBudget(self.budget))
        reader = asyncio.create_task(self._read_stream(requests, context, client, frames))
        self._stream_readers.add(reader)
        try:
            async for frame in frames:
                yield frame
            await reader
        except Exception as error:
            await abort(context, error)
            raise
        finally:
            self._stream_readers.discard(reader)
            reader.cancel()
            frames.close()

    @unary
    async def Tokenize(self, data: bytes, context: Any) -> bytes:
        client = self._admit(context)
        request = parse(pb.TokenizeRequest, data)
        model = self._model(request.model, client)
        inputs = translate.parse_inputs(request, model.facts, self.config.max_inputs_per_request)
        truncation = translate.parse_truncation(request.truncation)
        encoded = await model.encode(inputs, truncation)
        for i, (one, tokens) in enumerate(zip(inputs, encoded, strict=True)):
            check_length(one, tokens, f"inputs[{i}]", model.facts)
        reply = pb.TokenizeResponse(results=[tokens_message(tokens) for tokens in encoded])
        if (num_bytes := reply.ByteSize()) > self.config.max_message_bytes:
            raise errors.reply_too_large(num_bytes, self.config.max_message_bytes, streamed=False)
        return reply.SerializeToString()

    @unary
    async def GetModel(self, data: bytes, context: Any) -> bytes:
        client = self._admit(context)
        model = self._model(parse(pb.GetModelRequest, data).model, client)
        return pb.GetModelResponse(model=model_message(model.facts, self.config)).SerializeToString()

    @unary
    async def ListModels(self, data: bytes, context: Any) -> bytes:
        client = self._admit(context)
        parse(pb.ListModelsRequest, data)
        models = [
            model_message(model.facts, self.config)
            for name, model in self.models.items()
            if client.may_use(name)
        ]
        return pb.ListModelsResponse(models=models).SerializeToString()

    # ----------------------------------------------------------------------- a request's way

    def count_refusal(self, error: Exception) -> None:
        self.refused[error.reason if isinstance(error, errors.RequestError) else "INTERNAL"] += 1

    def _admit(self, context: Any) -> Client:
        client = self.guard.authenticate(context.invocation_metadata())
        if client is ANYONE:
            client = replace(client, name=name_of(context))
        if self.phase is Phase.LOADING:
            raise errors.unavailable("LOADING", "the models are still loading; try again", RETRY_LATER_S)
        if self.phase is Phase.DRAINING:
            raise draining()
        return client

    def _model(self, name: str, client: Client) -> ServedModel:
        """The named model; without a name the default one, which is the first."""
        model = self.models.get(name) if name else next(iter(self.models.values()))
        if model is None:
            raise errors.model_not_found(name, [known for known in self.models if client.may_use(known)])
        self.guard.authorize(client, model.facts.name)
        return model

    async def _encode(
        self,
        request: pb.EncodeRequest,
        client: Client,
        deadline_ns: int | None,
        budget: StreamBudget,
        *,
        streamed: bool,
    ) -> Answer:
        """Validates, tokenizes, awaits the engine. What cannot be answered is refused before computing."""
        begun_ns = time.monotonic_ns()
        model = self._model(request.model, client)
        facts = model.facts
        inputs = translate.parse_inputs(request, facts, self.config.max_inputs_per_request)
        truncation = translate.parse_truncation(request.truncation)
        priority = translate.known_enum(Priority, request.priority, Priority.NORMAL, "priority")
        selection = translate.parse_selection(request, facts)
        self._num_in_flight += 1
        self._idle.clear()
        try:
            if selection.needs_model:
                model.check(len(inputs), priority, deadline_ns, client.name)
            encoded = await model.encode(inputs, truncation)
            tokenize_ns = time.monotonic_ns() - begun_ns
            works = await self._resolve(selection, inputs, encoded, facts)
            heads = [head_message(tokens, selection.tokens) async for tokens in in_turns(encoded)]
            reply_bytes = self._check_size(heads, works, streamed=streamed)
            if not await budget.reserve(reply_bytes):
                raise errors.overloaded(
                    "RESULT_BYTES_FULL",
                    f"{self.budget.reserved_bytes} bytes of results wait to be read, and this one has {reply_bytes}; "
                    f"the limit is {self.budget.limit_bytes} (max_inflight_result_bytes)",
                    RETRY_LATER_S,
                )
            try:
                timing = pb.Timing(tokenize_ns=tokenize_ns)
                outputs: Sequence[Sequence[TensorData] | None] = [()] * len(works)
                if works[0].plan.needs_model:
                    ticket = await model.answer(works, priority, deadline_ns, client.name)
                    outputs = ticket.outputs
                    add_times(timing, ticket)
                for work in works:
                    for spec in work.specs:
                        self.reply_bytes[spec.field.name.lower()] += spec.nbytes
                timing.total_ns = time.monotonic_ns() - begun_ns
                results = [
                    wire.InputResult(head, work.specs, output or ())
                    for head, work, output in zip(heads, works, outputs, strict=True)
                ]
                return Answer(results, timing, reply_bytes)
            except BaseException:
                budget.release(reply_bytes)
                raise
        finally:
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self._idle.set()

    async def _resolve(
        self, selection: translate.Selection, inputs: list[Input], encoded: list[Encoded], facts: ModelFacts
    ) -> list[Work]:
        works = []
        async for i, (one, tokens) in in_turns(enumerate(zip(inputs, encoded, strict=True))):
            field = f"inputs[{i}]"
            check_length(one, tokens, field, facts)
            works.append(resolve(selection, one, tokens, field, facts))
        return works

    def _check_size(self, heads: list[pb.EncodeResult], works: list[Work], *, streamed: bool) -> int:
        num_bytes = wire.response_size([(head, work.specs) for head, work in zip(heads, works, strict=True)])
        limit = self.config.max_result_bytes if streamed else self.config.max_message_bytes
        if num_bytes > limit:
            raise errors.reply_too_large(num_bytes, limit, streamed=streamed)
        return num_bytes

    # ---------------------------------------------------------------------------- streams

    async def _read_stream(
        self, requests: AsyncIterator[bytes], context: Any, client: Client, frames: FrameQueue
    ) -> None:
        """Starts a task for each request; the frames end once the last of them is answered and written."""
        in_flight: dict[int, asyncio.Task[None]] = {}
        room = asyncio.Semaphore(MAX_STREAM_REQUESTS)
        try:
            try:
                async for data in requests:
                    message = parse(pb.EncodeStreamRequest, data)
                    await room.acquire()
                    self._start_on_stream(message, context, client, frames, in_flight, room)
            except asyncio.CancelledError:
                if self.phase is not Phase.DRAINING:
                    raise
                frames.fail(draining())  # after the answers to what was accepted
            # Read to its end: draining has nothing to interrupt here, and must not.
            reader = asyncio.current_task()
            assert reader is not None
            self._stream_readers.discard(reader)
            for _ in range(MAX_STREAM_REQUESTS):
                await room.acquire()
        except errors.RequestError as error:
            frames.fail(error)
        finally:
            for task in in_flight.values():
                task.cancel()
            frames.end()

    def _start_on_stream(
        self,
        message: pb.EncodeStreamRequest,
        context: Any,
        client: Client,
        frames: FrameQueue,
        in_flight: dict[int, asyncio.Task[None]],
        room: asyncio.Semaphore,
    ) -> None:
        request_id = message.request_id
        if request_id in in_flight:
            refused = errors.invalid_argument(
                "request_id",
                f"{request_id} is in flight on this stream; choose another",
                reason="DUPLICATE_ID",
            )
            frames.add(failed_reply(request_id, refused, room.release))
            return

        def release() -> None:
            del in_flight[request_id]
            room.release()

        in_flight[request_id] = asyncio.create_task(
            self._answer_on_stream(message, client, deadline_of(context), frames, release)
        )

    async def _answer_on_stream(
        self,
        message: pb.EncodeStreamRequest,
        client: Client,
        deadline_ns: int | None,
        frames: FrameQueue,
        release: Callable[[], None],
    ) -> None:
        request_id = message.request_id
        try:
            if self.phase is Phase.DRAINING:
                raise draining()
            answer = await self._encode(message.request, client, deadline_ns, frames.budget, streamed=True)
        except Exception as error:
            self.count_refusal(error)
            frames.add(failed_reply(request_id, errors.as_request_error(error), release))
            return

        def done() -> None:
            frames.budget.release(answer.reserved_bytes)
            release()

        if message.accepts_whole and answer.reserved_bytes <= wire.WHOLE_BYTES:
            frames.add(Reply(wire.whole_frame(request_id, answer.results, answer.timing), done))
            return
        frames.add(
            Reply(wire.reply_frames(request_id, answer.results, answer.timing, self.config.frame_bytes), done)
        )


def draining() -> errors.RequestError:
    return errors.unavailable("DRAINING", "the server is shutting down; try another", RETRY_LATER_S)


def failed_reply(request_id: int, error: errors.RequestError, done: Callable[[], None]) -> Reply:
    return Reply(iter([wire.end_frame(request_id, error.to_status())]), done)


def name_of(context: Any) -> str:
    """Whose share of the engine a call takes where nobody authenticates: the name it gives itself, else
    its address."""
    for key, value in context.invocation_metadata() or ():
        if key == CLIENT_KEY:
            return value if isinstance(value, str) else value.decode("latin-1")
    peer: str = context.peer()
    return peer.rpartition(":")[0] or peer


def deadline_of(context: Any) -> int | None:
    """The call's deadline on the monotonic clock, in nanoseconds."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic_ns() + int(remaining_s * 1e9)


def add_times(timing: pb.Timing, ticket: Ticket) -> None:
    timing.queue_ns = max(ticket.started_ns - ticket.submitted_ns, 0)
    timing.compute_ns = ticket.compute_ns
    timing.batch_inputs = ticket.batch_inputs
    timing.batch_tokens = ticket.batch_tokens

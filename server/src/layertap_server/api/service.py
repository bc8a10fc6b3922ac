"""The RPC methods: they authenticate the caller and find the model; `pipeline` and `streaming` do the rest.

Requests and replies pass through gRPC as bytes: malformed requests are parsed here, to get a clear error, and
`serialization` builds replies around the engine's own buffers.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from functools import lru_cache, wraps
from typing import Any, cast

import grpc

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors
from layertap_server.api import serialization as wire
from layertap_server.api.bandwidth import BandwidthLimiter
from layertap_server.api.budget import ByteBudget, StreamBudget
from layertap_server.api.cooperative import FEW, yield_between
from layertap_server.api.input_validation import model_limit, parse_inputs, parse_truncation
from layertap_server.api.messages import model_message, tokens_message
from layertap_server.api.parsing import StreamRequest, parse, read_request
from layertap_server.api.pipeline import RETRY_LATER_S, Answer, Answering
from layertap_server.api.planning import check_ids, check_length
from layertap_server.api.streaming import FrameQueue, StreamCall
from layertap_server.config import Config
from layertap_server.rpc.security import ANYONE, Client, Guard
from layertap_server.serving import ServedModel, encode
from layertap_server.tokenization.inputs import Input

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["EncoderService"].full_name
DETAILS_KEY = "grpc-status-details-bin"
# Metadata key with which clients give their name where there are no bearer tokens.
CLIENT_KEY = "layertap-client"
# Bounded, because a name stays in memory for as long as the scheduler expects requests of that client.
MAX_CLIENT_NAME_CHARS = 128
LARGE_MESSAGE_BYTES = 2**20
# Reasons of refusals for load; for `RECENT_S` after one, calls are checked early (`EarlyRejection`).
OVERLOADED, RECENT_S = ("QUEUE_FULL", "DEADLINE_UNREACHABLE"), 0.1
# If no call has come for so long, assume that none is waiting inside gRPC, and none is on its way from the
# clients that got the last replies.
QUIET_S = 0.1
# The longest wait for that, where clients keep calling.
MAX_QUIET_WAIT_S = 1.0


class Phase(Enum):
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


def unary(method: Callable[..., Awaitable[bytes]]) -> Callable[..., Awaitable[bytes]]:
    """Ends a failed call with its status and details."""

    @wraps(method)
    async def call(self: EncoderService, data: bytes, context: Any) -> bytes:
        answer = method(self, data, context)
        del data  # the method frees the request's bytes while it waits
        self.bandwidth.note_call()
        try:
            return await answer
        except Exception as error:
            self.count_refusal(error)
            await abort(context, error)
            raise
        finally:
            self.bandwidth.note_call()

    return call


async def abort(context: Any, error: Exception) -> None:
    if not isinstance(error, grpc.aio.AbortError):
        await context.abort(*refusal(errors.as_request_error(error)))


def refusal(error: errors.RequestError) -> errors.Refusal:
    return error.code, error.message, ((DETAILS_KEY, error.to_status().SerializeToString()),)


class EncoderService:
    """`layertap.v1.EncoderService`. The app adds the models once they are loaded.

    Used on the event loop, except for what `EarlyRejection` calls on gRPC's thread.
    """

    def __init__(self, config: Config, guard: Guard) -> None:
        self.config = config
        self.guard = guard
        self.phase = Phase.LOADING
        self.models: dict[str, ServedModel] = {}
        self.answering = Answering(config, self.count_refusal)
        self.budget = ByteBudget(config.max_inflight_result_bytes)
        self.bandwidth = BandwidthLimiter(config.bytes_per_s_beside_calls)
        # The number of errors answered, by reason; `_counting` guards it, since two threads count.
        self.refused: Counter[str] = Counter()
        self._counting = threading.Lock()
        # When a request was last refused for load, in seconds of the monotonic clock.
        self.overloaded_s = -math.inf
        self.reply_bytes = self.answering.reply_bytes
        self._stream_readers: set[asyncio.Task[None]] = set()
        # Calls that were admitted and have not ended.
        self._num_open = 0
        self._all_over = asyncio.Event()
        self._all_over.set()

    def handlers(self) -> grpc.GenericRpcHandler:
        methods = {
            "Encode": grpc.unary_unary_rpc_method_handler(self.Encode),
            "EncodeStream": grpc.stream_stream_rpc_method_handler(self.EncodeStream),
            "Tokenize": grpc.unary_unary_rpc_method_handler(self.Tokenize),
            "GetModel": grpc.unary_unary_rpc_method_handler(self.GetModel),
            "ListModels": grpc.unary_unary_rpc_method_handler(self.ListModels),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    @property
    def is_overloaded(self) -> bool:
        """Whether a request was refused for load in the last `RECENT_S` seconds."""
        return time.monotonic() - self.overloaded_s <= RECENT_S

    async def drain(self) -> None:
        """Accepts no more calls; returns once all accepted requests are answered and the answers are sent.

        Open streams answer the requests they have accepted, and end with UNAVAILABLE.
        """
        self.phase = Phase.DRAINING
        for reader in self._stream_readers:
            reader.cancel()
        await self._all_over.wait()

    async def quiet(self, deadline: float) -> None:
        """After `drain`: returns once no call has come for `QUIET_S`, or at the deadline (monotonic seconds).

        Calls are accepted from gRPC one by one. A gRPC server that stops cancels the calls that still wait to
        be accepted, and those that arrive before their clients notice. Until this returns, such calls are
        answered with UNAVAILABLE, "the server is shutting down".
        """
        deadline = min(deadline, time.monotonic() + MAX_QUIET_WAIT_S)
        num_told = -1
        while num_told != self.refused["DRAINING"] and time.monotonic() < deadline:
            num_told = self.refused["DRAINING"]
            await asyncio.sleep(QUIET_S)

    # ------------------------------------------------------------------------------- RPCs

    @unary
    async def Encode(self, data: bytes, context: Any) -> bytes:
        client = self._admit(context)
        request, inputs = await read_request(pb.EncodeRequest, data, self.config.max_inputs_per_request)
        model = self.model_for(request.model, client)
        budget = self._stream_budget()
        answering = self.answering.answer(
            model, request, inputs, client.name, deadline_of(context), budget, streamed=False
        )
        del data, request, inputs  # only `answering` refers to them now, and frees them early
        answer = await answering
        num_bytes = answer.reserved_bytes
        context.add_done_callback(lambda _: budget.release(num_bytes))
        if len(answer.inputs) <= FEW:
            message = b"".join(wire.message_parts(answer.results(), answer.timing))
        else:
            parts: list[wire.Buffer] = []
            async for some in yield_between(wire.response_parts(answer.results(), answer.timing)):
                parts += some
            message = b"".join(parts)
        if len(message) > LARGE_MESSAGE_BYTES:
            await asyncio.sleep(0)  # gRPC copies it once more, on the loop: yield before that
        return message

    async def EncodeStream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            client = self._admit(context)
        except errors.RequestError as error:
            self.count_refusal(error)
            await abort(context, error)
            raise
        frames = FrameQueue(self.bandwidth)

        async def answer(asked: StreamRequest, budget: StreamBudget) -> Answer:
            request, inputs = asked.take()
            model = self.model_for(request.model, client)
            answering = self.answering.answer(
                model, request, inputs, client.name, deadline_of(context), budget, streamed=True
            )
            del request, inputs  # only `answering` refers to them now, and frees them early
            return await answering

        call = StreamCall(
            self.config,
            frames,
            self._stream_budget(),
            answer,
            self.count_refusal,
            lambda: self.phase is Phase.DRAINING,
        )
        reader = asyncio.create_task(call.read(requests, self._begins_reading, self._has_read_all))
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

    def _begins_reading(self) -> None:
        """Called by a stream's reader task once `drain` may cancel it.

        Not when the task is created: a task that is cancelled before its first step never runs. The task is
        looked up here, because a local variable in its coroutine would form a reference cycle: a cancelled
        task keeps its exception, whose traceback keeps the coroutine's frames.
        """
        self._stream_readers.add(cast("asyncio.Task[None]", asyncio.current_task()))

    def _has_read_all(self) -> None:
        """Called by a stream's reader task once it has read all requests: `drain` must not cancel it now."""
        self._stream_readers.discard(asyncio.current_task())

    @unary
    async def Tokenize(self, data: bytes, context: Any) -> bytes:
        client = self._admit(context)
        request, asked = await read_request(pb.TokenizeRequest, data, self.config.max_inputs_per_request)
        model = self.model_for(request.model, client)
        inputs = cast("Sequence[Input]", await parse_inputs(request, asked, model.facts))
        truncation = parse_truncation(request.truncation)
        encoded = await encode(model, inputs, truncation)
        is_limited = request.truncation != pb.TRUNCATION_UNSPECIFIED
        parts: list[wire.Buffer] = []
        num_bytes = 0
        async for i, (one, tokens) in yield_between(enumerate(zip(inputs, encoded, strict=True))):
            if is_limited:
                check_length(one, tokens, i, model_limit(model.facts), truncation)
            check_ids(one, tokens, i, model.facts)
            message = tokens_message(tokens, with_special=not request.without_special_tokens)
            result = message.SerializeToString()
            parts += (wire.RESULTS_TAG, wire.varint(len(result)), result)
            num_bytes += sum(map(len, parts[-3:]))
        if num_bytes > self.config.max_message_bytes:
            raise errors.reply_too_large(num_bytes, self.config.max_message_bytes, streamed=False)
        return b"".join(parts)

    @unary
    async def GetModel(self, data: bytes, context: Any) -> bytes:
        client = self._admit(context)
        model = self.model_for(parse(pb.GetModelRequest, data).model, client)
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

    # -------------------------------------------------------------------- steps of a request

    def count_refusal(self, error: Exception) -> None:
        """Counts an error that is answered. May be called on any thread."""
        self.count_refused(error.reason if isinstance(error, errors.RequestError) else "INTERNAL")

    def count_refused(self, reason: str) -> None:
        """As `count_refusal`, by the error's reason."""
        if reason in OVERLOADED:
            self.overloaded_s = time.monotonic()
        with self._counting:
            self.refused[reason] += 1

    def client_of(self, context: Any) -> Client:
        metadata = context.invocation_metadata() or ()
        identities = context.peer_identities() or () if self.guard.has_certificates else ()
        client = self.guard.authenticate(metadata, identities)
        return client_named(name_of(metadata, context)) if client is ANYONE else client

    def _admit(self, context: Any) -> Client:
        client = self.client_of(context)
        if self.phase is Phase.LOADING:
            raise errors.unavailable("LOADING", "the models are still loading; try again", RETRY_LATER_S)
        if self.phase is Phase.DRAINING:
            raise errors.draining()
        self._num_open += 1
        self._all_over.clear()
        context.add_done_callback(self._count_over)
        return client

    def _count_over(self, _: Any) -> None:
        self._num_open -= 1
        if not self._num_open:
            self._all_over.set()

    def model_for(self, name: str, client: Client) -> ServedModel:
        """The named model; without a name the default one, which is the first. Raises a `RequestError`."""
        model = self.models.get(name) if name else next(iter(self.models.values()))
        if model is None:
            raise errors.model_not_found(name, [known for known in self.models if client.may_use(known)])
        self.guard.authorize(client, model.facts.name)
        return model

    def _stream_budget(self) -> StreamBudget:
        return StreamBudget(self.budget, self.config.max_stream_result_bytes)


def name_of(metadata: Iterable[tuple[str, str | bytes]], context: Any) -> str:
    """The client name for fair queueing where there are no bearer tokens: the one in the metadata, else the
    peer's address without its port."""
    for key, value in metadata:
        if key == CLIENT_KEY:
            return bounded_name(value if isinstance(value, str) else value.decode("latin-1"))
    peer: str = context.peer()
    return peer.rpartition(":")[0] or peer


def bounded_name(name: str) -> str:
    """The name; if it is long, its beginning and a hash, to tell it from others that begin alike."""
    if len(name) <= MAX_CLIENT_NAME_CHARS:
        return name
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:16]
    return f"{name[: MAX_CLIENT_NAME_CHARS - len(digest) - 1]}…{digest}"


@lru_cache(maxsize=1024)
def client_named(name: str) -> Client:
    return replace(ANYONE, name=name)


def deadline_of(context: Any) -> int | None:
    """The call's deadline on the monotonic clock, in nanoseconds."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic_ns() + int(remaining_s * 1e9)

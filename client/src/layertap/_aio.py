"""The asyncio client: the methods of `Client` as coroutines and async iterators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import grpc

from layertap import _arguments, _replies, _requests, _rerank, errors
from layertap._aio_calls import Calls
from layertap._aio_streams import Inputs, Streams, fill
from layertap._arguments import CLIENT_TIMEOUT, OnError, Timeout
from layertap._client import DEFAULT_ADDRESS, WAIT_DELAY_S, WAIT_STEP_S
from layertap._embed import ArrayKind, EmbedCall, EmbedOptions, Rows, embed_request
from layertap._pipeline import Pipeline
from layertap._progress import progress
from layertap._results import Model, Ranked, Result, Tokens
from layertap._signatures import shows_options
from layertap._transport import HealthStatus, TimeLimit, TLSLike
from layertap._types import Array, EncodeOptions, Input, PriorityName, TruncationName
from layertap._unary import (
    MAX_UNARY_BYTES,
    Limits,
    is_of_the_only_input,
    limits_of,
    may_be_streamed,
    results_among,
    tokenize_requests,
    unary_request,
)
from layertap.errors import LayertapError
from layertap.v1 import encoder_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AsyncClient:
    """A client of a Layertap server for one event loop. It is an async context manager.

    Arguments, results and errors are those of `Client`. The first call opens a connection, in the event loop
    that is running then. In another event loop, such as that of a second `asyncio.run`, every
    method raises RuntimeError.

    Example:
        >>> async with AsyncClient("127.0.0.1:50051") as client:
        ...     result = await client.encode("a text", last_hidden_state=True)
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: TLSLike = None,
        timeout: float | None = 60.0,
        max_message_bytes: int | None = None,
        connections: int | None = None,
    ) -> None:
        self._calls = Calls(address, token, tls, timeout, max_message_bytes, connections)
        self._models: dict[str, Model] = {}

    def __repr__(self) -> str:
        return f"AsyncClient({self._calls.address!r})"

    async def close(self) -> None:
        """Closes the connections, and cancels every call on them."""
        await self._calls.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @overload
    async def encode(  # type: ignore[overload-overlap]
        self,
        inputs: Input,
        *,
        on_error: Literal["raise"] = "raise",
        timeout: Timeout = CLIENT_TIMEOUT,
        **options: Unpack[EncodeOptions],
    ) -> Result: ...
    @overload
    async def encode(
        self,
        inputs: Iterable[Input],
        *,
        on_error: Literal["raise"] = "raise",
        timeout: Timeout = CLIENT_TIMEOUT,
        **options: Unpack[EncodeOptions],
    ) -> list[Result]: ...
    @overload
    async def encode(  # type: ignore[overload-overlap]
        self,
        inputs: Input,
        *,
        on_error: Literal["return"],
        timeout: Timeout = CLIENT_TIMEOUT,
        **options: Unpack[EncodeOptions],
    ) -> Result | LayertapError: ...
    @overload
    async def encode(
        self,
        inputs: Iterable[Input],
        *,
        on_error: Literal["return"],
        timeout: Timeout = CLIENT_TIMEOUT,
        **options: Unpack[EncodeOptions],
    ) -> list[Result | LayertapError]: ...
    @shows_options(EncodeOptions, _requests.encode_request)
    async def encode(
        self,
        inputs: Input | Iterable[Input],
        *,
        on_error: OnError = "raise",
        timeout: Timeout = CLIENT_TIMEOUT,
        **options: Unpack[EncodeOptions],
    ) -> Any:
        """As `Client.encode`."""
        template = _requests.encode_request(**options)
        on_error = _arguments.on_error(on_error)
        limit = self._calls.time_limit(timeout)
        if _requests.is_single(inputs):
            return (await self._encode(template, [inputs], on_error, limit))[0]
        _arguments.check_inputs(inputs)
        return await self._encode(template, list(inputs), on_error, limit)

    async def _encode(
        self, template: pb.EncodeRequest, inputs: Sequence[Input], on_error: OnError, limit: TimeLimit
    ) -> list[Result | LayertapError]:
        outcomes: dict[int, Result | LayertapError] = {}
        try:
            async for index, outcome in self._outcomes(template, inputs, on_error, limit):
                outcomes[index] = outcome  # noqa: PERF403  (keeps the results received before an error)
        except LayertapError as error:
            error.results = results_among(outcomes)
            raise
        return [outcomes[index] for index in range(len(inputs))]

    async def _outcomes(
        self, template: pb.EncodeRequest, inputs: Sequence[Input], on_error: OnError, limit: TimeLimit
    ) -> AsyncIterator[tuple[int, Result | LayertapError]]:
        """Yields (index, outcome) of each input, in any order: from one message if that is enough, otherwise
        from a stream."""
        if not inputs:
            return
        request = unary_request(template, inputs, on_error)
        if request is not None:
            outcomes: list[Result | LayertapError] | None = None
            try:
                outcomes = _replies.decode_reply(await self._calls.call("Encode", request, limit), template)
            except LayertapError as error:
                if is_of_the_only_input(error, len(inputs)) and on_error == "return":
                    outcomes = [error]
                else:
                    ask = isinstance(error, errors.InvalidArgument) and len(inputs) > 1
                    limits = await self._limits_of(template.model, limit) if ask else None
                    if not may_be_streamed(error, len(inputs), limits, on_error):
                        raise
            if outcomes is not None:
                for index, outcome in enumerate(outcomes):
                    yield index, outcome
                return
        async for index, outcome in self._stream(
            template, inputs, ordered=False, on_error=on_error, limit=limit
        ):
            yield index, outcome

    @overload
    def stream(
        self,
        inputs: Iterable[Input] | AsyncIterable[Input],
        *,
        ordered: bool = True,
        on_error: Literal["raise"] = "raise",
        timeout: Timeout = None,
        **options: Unpack[EncodeOptions],
    ) -> AsyncIterator[tuple[int, Result]]: ...
    @overload
    def stream(
        self,
        inputs: Iterable[Input] | AsyncIterable[Input],
        *,
        ordered: bool = True,
        on_error: Literal["return"],
        timeout: Timeout = None,
        **options: Unpack[EncodeOptions],
    ) -> AsyncIterator[tuple[int, Result | LayertapError]]: ...
    @shows_options(EncodeOptions, _requests.encode_request)
    def stream(
        self,
        inputs: Iterable[Input] | AsyncIterable[Input],
        *,
        ordered: bool = True,
        on_error: OnError = "raise",
        timeout: Timeout = None,
        **options: Unpack[EncodeOptions],
    ) -> AsyncIterator[tuple[int, Any]]:
        """As `Client.stream`; `inputs` may also be an async iterable.

        To cancel the rest at once when you leave the loop early, use `contextlib.aclosing`.
        """
        template = _requests.encode_request(**options)
        if not isinstance(inputs, AsyncIterable):
            _arguments.check_inputs(inputs)
        return self._stream(
            template,
            inputs,
            ordered=_arguments.flag("ordered", ordered),
            on_error=_arguments.on_error(on_error),
            limit=self._calls.time_limit(timeout),
        )

    async def _stream(
        self,
        template: pb.EncodeRequest,
        inputs: Iterable[Input] | AsyncIterable[Input],
        *,
        ordered: bool,
        on_error: OnError,
        limit: TimeLimit,
    ) -> AsyncIterator[tuple[int, Any]]:
        limits = await self._limits_of(template.model, limit)
        locate = partial(errors.locate, address=self._calls.address, seconds=limit.seconds)
        pipeline = Pipeline(
            template,
            ordered=ordered,
            on_error=on_error,
            locate=locate,
            max_lanes=self._calls.connections.limit,
            **limits._asdict(),
        )
        self._calls.enter_loop()
        streams = Streams(
            self._calls.connections, self._calls.metadata, limit, partial(self._calls.located, limit)
        )
        source = Inputs(inputs)
        try:
            while True:
                waits_for_input = await fill(pipeline, source, streams)
                for index, outcome in pipeline.ready():
                    yield index, outcome
                if pipeline.is_idle:
                    if not source.has_more:
                        break
                    await source.wait()
                    continue
                if waits_for_input:
                    received = await streams.receive_or(source.getting)
                    if received is None:
                        continue
                    [message] = received
                else:
                    message = await streams.next_one()
                if message is None:
                    break
                for index, outcome in pipeline.receive(message):
                    yield index, outcome
            pipeline.finish()
            await streams.finish()
        finally:
            source.close()
            streams.close()

    @overload
    async def embed(
        self,
        inputs: Input | Iterable[Input],
        *,
        convert_to: Literal["numpy"] = "numpy",
        show_progress_bar: bool | None = False,
        timeout: Timeout = None,
        **options: Unpack[EmbedOptions],
    ) -> Array: ...
    @overload
    async def embed(
        self,
        inputs: Input | Iterable[Input],
        *,
        convert_to: Literal["torch"],
        show_progress_bar: bool | None = False,
        timeout: Timeout = None,
        **options: Unpack[EmbedOptions],
    ) -> Any: ...
    @shows_options(EmbedOptions, embed_request)
    async def embed(
        self,
        inputs: Input | Iterable[Input],
        *,
        convert_to: ArrayKind = "numpy",
        show_progress_bar: bool | None = False,
        timeout: Timeout = None,
        **options: Unpack[EmbedOptions],
    ) -> Any:
        """As `Client.embed`."""
        call = EmbedCall(convert_to, **options)
        limit = self._calls.time_limit(timeout)
        if _requests.is_single(inputs):
            rows = await self._embed(call, [inputs], False, limit)
            return call.converted(rows[0])
        _arguments.check_inputs(inputs)
        values = list(inputs)
        if not values:
            return call.of_nothing(await self._facts_of(call.template.model, limit))
        return call.converted(await self._embed(call, values, show_progress_bar, limit))

    async def _embed(
        self, call: EmbedCall, inputs: Sequence[Input], show_progress_bar: object, limit: TimeLimit
    ) -> Array:
        rows = Rows(len(inputs))
        with progress(len(inputs), show_progress_bar) as advance:
            async for index, result in self._outcomes(call.template, inputs, "raise", limit):
                rows.put(index, result.embeddings[0])  # type: ignore[union-attr]  # errors are raised
                advance()
        return rows.array()

    @overload
    async def tokenize(  # type: ignore[overload-overlap]
        self,
        inputs: Input,
        *,
        model: str = "",
        truncation: TruncationName | None = None,
        prompt_name: str = "",
        without_special_tokens: bool = False,
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> Tokens: ...
    @overload
    async def tokenize(
        self,
        inputs: Iterable[Input],
        *,
        model: str = "",
        truncation: TruncationName | None = None,
        prompt_name: str = "",
        without_special_tokens: bool = False,
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> list[Tokens]: ...
    async def tokenize(
        self,
        inputs: Input | Iterable[Input],
        *,
        model: str = "",
        truncation: TruncationName | None = None,
        prompt_name: str = "",
        without_special_tokens: bool = False,
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> Tokens | list[Tokens]:
        """As `Client.tokenize`."""
        template = _requests.tokenize_request(
            model=model,
            truncation=truncation,
            prompt_name=prompt_name,
            without_special_tokens=without_special_tokens,
        )
        limit = self._calls.time_limit(timeout)
        if _requests.is_single(inputs):
            return (await self._tokenize(template, [inputs], limit))[0]
        _arguments.check_inputs(inputs)
        return await self._tokenize(template, list(inputs), limit)

    async def _tokenize(
        self, template: pb.TokenizeRequest, inputs: Sequence[Input], limit: TimeLimit
    ) -> list[Tokens]:
        request = _requests.filled(template, inputs)
        requests: Iterable[tuple[int, pb.TokenizeRequest]] = [(0, request)]
        if len(inputs) != 1 or request.ByteSize() > MAX_UNARY_BYTES:
            requests = (
                tokenize_requests(request, await self._limits_of(template.model, limit)) if inputs else ()
            )
        tokens: list[Tokens] = []
        for first, part in requests:
            reply = await self._calls.call("Tokenize", part, limit, first)
            tokens += map(_replies.decode_tokens, reply.results)
        return tokens

    async def rerank(
        self,
        query: str,
        texts: Iterable[str],
        *,
        model: str = "",
        top_k: int | None = None,
        activation: _rerank.ScoreActivation | None = None,
        truncation: TruncationName | None = None,
        max_tokens: int = 0,
        prompt_name: str = "",
        prompt: str = "",
        priority: PriorityName | None = None,
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> list[Ranked]:
        """As `Client.rerank`."""
        template = _requests.encode_request(
            model=model,
            logits=_rerank.scores_selection(activation),
            truncation=truncation,
            max_tokens=max_tokens,
            prompt_name=prompt_name,
            prompt=prompt,
            priority=priority,
        )
        pairs, top_k = _rerank.pairs(query, texts), _rerank.limit_of(top_k)
        limit = self._calls.time_limit(timeout)
        if not pairs:
            return []
        if not _rerank.can_rerank(await self._facts_of(template.model, limit)):
            # The facts may be from before the server's last start.
            _rerank.check_head(await self._model(template.model, limit))
        return _rerank.ranked(pairs, await self._encode(template, pairs, "raise", limit), top_k)

    async def wait_ready(self, timeout: float | None = None, *, model: str = "") -> Model:
        """As `Client.wait_ready`."""
        limit = self._calls.time_limit(timeout)
        while True:
            left_s = limit.left_s
            try:
                step = TimeLimit(WAIT_STEP_S if left_s is None else min(left_s, WAIT_STEP_S))
                found = await self._model(model, step)
                await self._check_serving(step)
                return found
            except (errors.Unavailable, errors.DeadlineExceeded):
                left_s = limit.left_s
                if left_s is not None and left_s <= WAIT_DELAY_S:
                    raise
            await asyncio.sleep(WAIT_DELAY_S)

    async def _check_serving(self, limit: TimeLimit) -> None:
        """Raises `Unavailable` if the health service says that the server does not serve, such as while its
        engine restarts: the models are described then too. A server without the service is taken to serve."""
        try:
            status = await self._calls.health(limit)
        except LayertapError as error:
            if error.code is grpc.StatusCode.UNIMPLEMENTED:
                return
            raise
        if status == "NOT_SERVING":
            raise errors.Unavailable(f"{self._calls.address}: the server is not serving yet; try again")

    async def health(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> HealthStatus:
        """As `Client.health`."""
        return await self._calls.health(self._calls.time_limit(timeout))

    async def models(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> list[Model]:
        """As `Client.models`."""
        reply = await self._calls.call("ListModels", pb.ListModelsRequest(), self._calls.time_limit(timeout))
        self._calls.connections.learn(reply.models)
        return [_replies.decode_model(model) for model in reply.models]

    async def model(self, name: str = "", *, timeout: Timeout = CLIENT_TIMEOUT) -> Model:
        """As `Client.model`."""
        return await self._model(name, self._calls.time_limit(timeout))

    async def _model(self, name: str, limit: TimeLimit) -> Model:
        reply = await self._calls.call("GetModel", _requests.model_request(name), limit)
        self._calls.connections.learn([reply.model])
        self._models[name] = _replies.decode_model(reply.model)
        return self._models[name]

    async def _facts_of(self, model: str, limit: TimeLimit) -> Model:
        """The served model of this name; the server is asked once."""
        return self._models.get(model) or await self._model(model, limit)

    async def _limits_of(self, model: str, limit: TimeLimit) -> Limits:
        return limits_of(await self._facts_of(model, limit))

"""The client for asyncio: the methods of `Client`, as coroutines and async iterators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import grpc

from layertap import _codec
from layertap._client import DEFAULT_ADDRESS, MAX_TOKENIZE_INPUTS, MAX_UNARY_BYTES, MAX_UNARY_INPUTS
from layertap._pipeline import Pipeline
from layertap._transport import TLSLike, call_metadata, channel_options, credentials, stub_of
from layertap._types import EncodeOptions, Input, Model, Result, Tokens
from layertap.errors import InvalidArgument, OutOfRange, transport_errors
from layertap.v1 import encoder_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AsyncClient:
    """A connection to a Layertap server for one event loop; an async context manager.

    Arguments, results and errors are those of `Client`. The connection opens with the first call.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: TLSLike = None,
        timeout: float | None = 60.0,
        max_message_bytes: int | None = None,
    ) -> None:
        self._address = address
        self._options = channel_options(tls, max_message_bytes)
        self._credentials = credentials(tls)
        self._metadata = call_metadata(token)
        self._timeout = timeout
        self._max_inputs: dict[str, int] = {}
        self._channel: Any = None
        self._opened_stub: Any = None

    @property
    def _stub(self) -> Any:
        # A channel of grpc.aio belongs to the loop that runs when it is made: not before a call.
        if self._channel is None:
            self._channel = (
                grpc.aio.insecure_channel(self._address, self._options)
                if self._credentials is None
                else grpc.aio.secure_channel(self._address, self._credentials, self._options)
            )
            self._opened_stub = stub_of(self._channel)
        return self._opened_stub

    async def close(self) -> None:
        """Ends the connection, and every call on it."""
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @overload
    async def encode(  # type: ignore[overload-overlap]
        self, inputs: Input, *, timeout: float | None = None, **options: Unpack[EncodeOptions]
    ) -> Result: ...
    @overload
    async def encode(
        self, inputs: Iterable[Input], *, timeout: float | None = None, **options: Unpack[EncodeOptions]
    ) -> list[Result]: ...
    async def encode(
        self,
        inputs: Input | Iterable[Input],
        *,
        timeout: float | None = None,
        **options: Unpack[EncodeOptions],
    ) -> Result | list[Result]:
        """As `Client.encode`."""
        template = _codec.encode_request(**options)
        if _codec.is_single(inputs):
            return (await self._encode(template, [inputs], timeout))[0]
        return await self._encode(template, list(inputs), timeout)

    async def _encode(
        self, template: pb.EncodeRequest, inputs: Sequence[Input], timeout: float | None
    ) -> list[Result]:
        if not inputs:
            return []
        request = _codec.filled(template, inputs)
        if len(inputs) <= MAX_UNARY_INPUTS and request.ByteSize() <= MAX_UNARY_BYTES:
            try:
                return _codec.decode_reply(await self._call(self._stub.Encode, request, timeout))
            except OutOfRange:
                pass
            except InvalidArgument:
                if len(inputs) <= await self._max_inputs_per_request(template.model):
                    raise
        stream = self._stream(template, inputs, ordered=False, timeout=timeout)
        results = {index: result async for index, result in stream}
        return [results[index] for index in range(len(inputs))]

    def stream(
        self,
        inputs: Iterable[Input] | AsyncIterable[Input],
        *,
        ordered: bool = True,
        timeout: float | None = None,
        **options: Unpack[EncodeOptions],
    ) -> AsyncIterator[tuple[int, Result]]:
        """As `Client.stream`; the inputs may come asynchronously as well.

        To leave the loop early and cancel the rest at once, use `contextlib.aclosing`.
        """
        return self._stream(_codec.encode_request(**options), inputs, ordered=ordered, timeout=timeout)

    async def _stream(
        self,
        template: pb.EncodeRequest,
        inputs: Iterable[Input] | AsyncIterable[Input],
        *,
        ordered: bool,
        timeout: float | None,
    ) -> AsyncIterator[tuple[int, Result]]:
        max_inputs = await self._max_inputs_per_request(template.model)
        pipeline = Pipeline(template, ordered=ordered, max_inputs=max_inputs)
        outbox: _Outbox = asyncio.Queue()
        source = await _fill(pipeline, _aiter(inputs), outbox)
        if pipeline.is_idle:
            return
        call = self._stub.EncodeStream(_messages(outbox), timeout=timeout, metadata=self._metadata)
        messages = aiter(call)
        try:
            while source is not None or not pipeline.is_idle:
                with transport_errors():
                    message = await anext(messages, None)
                if message is None:
                    break
                for index, result in pipeline.receive(message):
                    yield index, result
                source = await _fill(pipeline, source, outbox)
            pipeline.finish()
            outbox.put_nowait(None)
            with suppress(grpc.RpcError):  # all is answered: how the stream ends changes nothing
                await anext(messages, None)
        finally:
            call.cancel()

    @overload
    async def tokenize(  # type: ignore[overload-overlap]
        self,
        inputs: Input,
        *,
        model: str = "",
        truncation: Literal["end", "start"] | None = None,
        prompt_name: str = "",
        timeout: float | None = None,
    ) -> Tokens: ...
    @overload
    async def tokenize(
        self,
        inputs: Iterable[Input],
        *,
        model: str = "",
        truncation: Literal["end", "start"] | None = None,
        prompt_name: str = "",
        timeout: float | None = None,
    ) -> list[Tokens]: ...
    async def tokenize(
        self,
        inputs: Input | Iterable[Input],
        *,
        model: str = "",
        truncation: Literal["end", "start"] | None = None,
        prompt_name: str = "",
        timeout: float | None = None,
    ) -> Tokens | list[Tokens]:
        """As `Client.tokenize`."""
        template = _codec.tokenize_request(model=model, truncation=truncation, prompt_name=prompt_name)
        if _codec.is_single(inputs):
            return (await self._tokenize(template, [inputs], timeout))[0]
        return await self._tokenize(template, list(inputs), timeout)

    async def _tokenize(
        self, template: pb.TokenizeRequest, inputs: Sequence[Input], timeout: float | None
    ) -> list[Tokens]:
        step = MAX_TOKENIZE_INPUTS
        if len(inputs) > 1:
            step = min(step, await self._max_inputs_per_request(template.model))
        tokens: list[Tokens] = []
        for start in range(0, len(inputs), step):
            request = _codec.filled(template, inputs[start : start + step])
            reply = await self._call(self._stub.Tokenize, request, timeout)
            tokens += map(_codec.decode_tokens, reply.results)
        return tokens

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """As `Client.models`."""
        reply = await self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout)
        return [_codec.decode_model(model) for model in reply.models]

    async def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """As `Client.model`."""
        reply = await self._call(self._stub.GetModel, pb.GetModelRequest(model=name), timeout)
        return _codec.decode_model(reply.model)

    async def _max_inputs_per_request(self, model: str) -> int:
        if model not in self._max_inputs:
            limits = (await self.model(model)).limits
            self._max_inputs[model] = limits.max_inputs_per_request or MAX_UNARY_INPUTS
        return self._max_inputs[model]

    async def _call(self, rpc: Any, request: Any, timeout: float | None) -> Any:
        with transport_errors():
            return await rpc(
                request, timeout=self._timeout if timeout is None else timeout, metadata=self._metadata
            )


async def _aiter(inputs: Iterable[Input] | AsyncIterable[Input]) -> AsyncIterator[Input]:
    if isinstance(inputs, AsyncIterable):
        async for value in inputs:
            yield value
    else:
        for value in inputs:
            yield value


# Messages and the times before which they are not sent, nor what comes after them; None is the end.
_Outbox: TypeAlias = "asyncio.Queue[tuple[float, pb.EncodeStreamRequest] | None]"


async def _messages(outbox: _Outbox) -> AsyncIterator[pb.EncodeStreamRequest]:
    while (item := await outbox.get()) is not None:
        not_before, message = item
        if (delay_s := not_before - time.monotonic()) > 0:
            await asyncio.sleep(delay_s)
        yield message


async def _fill(
    pipeline: Pipeline, source: AsyncIterator[Input] | None, outbox: _Outbox
) -> AsyncIterator[Input] | None:
    """Sends what may be sent now. Returns the source, or None when it has no more inputs."""
    for delay_s, refused in pipeline.take_refused():
        outbox.put_nowait((time.monotonic() + delay_s, refused))
    while source is not None and (count := pipeline.num_wanted):
        group: list[Input] = []
        async for value in source:
            group.append(value)
            if len(group) == count:
                break
        for request in pipeline.submit(group):
            outbox.put_nowait((0.0, request))
        if len(group) < count:
            source = None
    return source

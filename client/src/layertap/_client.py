"""The client for ordinary Python."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, overload

import grpc

from layertap import _codec
from layertap._pipeline import Pipeline
from layertap._transport import TLSLike, call_metadata, channel_options, credentials, stub_of
from layertap._types import EncodeOptions, Input, Model, Result, Tokens
from layertap.errors import InvalidArgument, OutOfRange, transport_errors
from layertap.v1 import encoder_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

DEFAULT_ADDRESS = "127.0.0.1:50051"
# What is asked for in one message, where the server does not say otherwise; more is streamed.
MAX_UNARY_INPUTS = 256
MAX_UNARY_BYTES = 1 << 20
# The Tokenize RPC has no stream: this many inputs a call keep its replies small.
MAX_TOKENIZE_INPUTS = 64


class Client:
    """A connection to a Layertap server. Threads may share one; it is a context manager.

    `address` is "host:port" or "unix:/path". `token` goes along with every call as a bearer token.
    `tls`: True for the usual roots, a `TLS` for files of your own, or gRPC channel credentials.
    `timeout` is the seconds that a call may take, unless it says otherwise (None: no limit).
    `max_message_bytes` refuses replies over this; None leaves the limit to the server.

    Every method that calls the server raises `LayertapError`, by its subclasses. A server that is
    unavailable is tried again a few times first.
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
        options = channel_options(tls, max_message_bytes)
        secrets = credentials(tls)
        self._channel: Any = (
            grpc.insecure_channel(address, options)
            if secrets is None
            else grpc.secure_channel(address, secrets, options)
        )
        self._stub = stub_of(self._channel)
        self._metadata = call_metadata(token)
        self._timeout = timeout
        self._max_inputs: dict[str, int] = {}

    def close(self) -> None:
        """Ends the connection, and every call on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def encode(  # type: ignore[overload-overlap]  # a str is a sequence of str as well; the first wins
        self, inputs: Input, *, timeout: float | None = None, **options: Unpack[EncodeOptions]
    ) -> Result: ...
    @overload
    def encode(
        self, inputs: Iterable[Input], *, timeout: float | None = None, **options: Unpack[EncodeOptions]
    ) -> list[Result]: ...
    def encode(
        self,
        inputs: Input | Iterable[Input],
        *,
        timeout: float | None = None,
        **options: Unpack[EncodeOptions],
    ) -> Result | list[Result]:
        """The outputs of one input, or of any number of them in the order given.

        See `EncodeOptions` for the options. Results too large for one message, and inputs too many
        for one, are streamed. `timeout` is for all of the call; when it is left out, the client's
        holds for what one message answers, and none for what is streamed.

        Raises:
            LayertapError: as the server answers.
            ValueError, TypeError: an argument is not understood; it is named.
        """
        template = _codec.encode_request(**options)
        if _codec.is_single(inputs):
            return self._encode(template, [inputs], timeout)[0]
        return self._encode(template, list(inputs), timeout)

    def _encode(
        self, template: pb.EncodeRequest, inputs: Sequence[Input], timeout: float | None
    ) -> list[Result]:
        if not inputs:
            return []
        request = _codec.filled(template, inputs)
        if len(inputs) <= MAX_UNARY_INPUTS and request.ByteSize() <= MAX_UNARY_BYTES:
            try:
                return _codec.decode_reply(self._call(self._stub.Encode, request, timeout))
            except OutOfRange:
                pass  # refused before any computation
            except InvalidArgument:
                if len(inputs) <= self._max_inputs_per_request(template.model):
                    raise
        results = dict(self._stream(template, inputs, ordered=False, timeout=timeout))
        return [results[index] for index in range(len(inputs))]

    def stream(
        self,
        inputs: Iterable[Input],
        *,
        ordered: bool = True,
        timeout: float | None = None,
        **options: Unpack[EncodeOptions],
    ) -> Iterator[tuple[int, Result]]:
        """Pairs of an input's index and its result, for any number of inputs, while they come.

        Keeps some requests in flight on one stream, and in memory no more than what is in flight.
        `inputs` is read ahead by that much. `ordered=False` gives each result as soon as it is
        complete. Dropping the iterator cancels what is not done. `timeout` is for all of the stream;
        there is none by default. A request that the server is too busy for is sent again when the
        server says so, up to a minute; fewer are then in flight.

        Raises:
            LayertapError: any request failed; the stream is over.
        """
        return self._stream(_codec.encode_request(**options), inputs, ordered=ordered, timeout=timeout)

    def _stream(
        self, template: pb.EncodeRequest, inputs: Iterable[Input], *, ordered: bool, timeout: float | None
    ) -> Iterator[tuple[int, Result]]:
        max_inputs = self._max_inputs_per_request(template.model)
        pipeline = Pipeline(template, ordered=ordered, max_inputs=max_inputs)
        outbox = _Outbox()
        source = _fill(pipeline, iter(inputs), outbox)
        if pipeline.is_idle:
            return
        call = self._stub.EncodeStream(iter(outbox), timeout=timeout, metadata=self._metadata)
        try:
            while source is not None or not pipeline.is_idle:
                with transport_errors():
                    message = next(call, None)
                if message is None:
                    break
                yield from pipeline.receive(message)
                source = _fill(pipeline, source, outbox)
            pipeline.finish()
            outbox.end()
            with suppress(grpc.RpcError):  # all is answered: how the stream ends changes nothing
                next(call, None)
        finally:
            call.cancel()
            outbox.end()

    @overload
    def tokenize(  # type: ignore[overload-overlap]
        self,
        inputs: Input,
        *,
        model: str = "",
        truncation: Literal["end", "start"] | None = None,
        prompt_name: str = "",
        timeout: float | None = None,
    ) -> Tokens: ...
    @overload
    def tokenize(
        self,
        inputs: Iterable[Input],
        *,
        model: str = "",
        truncation: Literal["end", "start"] | None = None,
        prompt_name: str = "",
        timeout: float | None = None,
    ) -> list[Tokens]: ...
    def tokenize(
        self,
        inputs: Input | Iterable[Input],
        *,
        model: str = "",
        truncation: Literal["end", "start"] | None = None,
        prompt_name: str = "",
        timeout: float | None = None,
    ) -> Tokens | list[Tokens]:
        """The tokens of one input, or of each of several, without running the model.

        `timeout` is for each message; several are sent for many inputs.
        """
        template = _codec.tokenize_request(model=model, truncation=truncation, prompt_name=prompt_name)
        if _codec.is_single(inputs):
            return self._tokenize(template, [inputs], timeout)[0]
        return self._tokenize(template, list(inputs), timeout)

    def _tokenize(
        self, template: pb.TokenizeRequest, inputs: Sequence[Input], timeout: float | None
    ) -> list[Tokens]:
        step = MAX_TOKENIZE_INPUTS
        if len(inputs) > 1:
            step = min(step, self._max_inputs_per_request(template.model))
        tokens: list[Tokens] = []
        for start in range(0, len(inputs), step):
            request = _codec.filled(template, inputs[start : start + step])
            reply = self._call(self._stub.Tokenize, request, timeout)
            tokens += map(_codec.decode_tokens, reply.results)
        return tokens

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """The served models."""
        reply = self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout)
        return [_codec.decode_model(model) for model in reply.models]

    def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """One served model; the default one without a name."""
        reply = self._call(self._stub.GetModel, pb.GetModelRequest(model=name), timeout)
        return _codec.decode_model(reply.model)

    def _max_inputs_per_request(self, model: str) -> int:
        if model not in self._max_inputs:
            self._max_inputs[model] = self.model(model).limits.max_inputs_per_request or MAX_UNARY_INPUTS
        return self._max_inputs[model]

    def _call(self, rpc: Any, request: Any, timeout: float | None) -> Any:
        with transport_errors():
            return rpc(
                request, timeout=self._timeout if timeout is None else timeout, metadata=self._metadata
            )


class _Outbox:
    """Messages to gRPC's own thread, which iterates over this until `end`."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[tuple[float, pb.EncodeStreamRequest] | None] = SimpleQueue()
        self._ended = Event()

    def put(self, message: pb.EncodeStreamRequest, delay_s: float = 0.0) -> None:
        """Sends it, and what is put after it, no earlier than in `delay_s` seconds."""
        self._messages.put((time.monotonic() + delay_s, message))

    def end(self) -> None:
        self._ended.set()
        self._messages.put(None)

    def __iter__(self) -> Iterator[pb.EncodeStreamRequest]:
        while (item := self._messages.get()) is not None:
            not_before, message = item
            if (delay_s := not_before - time.monotonic()) > 0 and self._ended.wait(delay_s):
                return
            yield message


def _fill(pipeline: Pipeline, source: Iterator[Input] | None, outbox: _Outbox) -> Iterator[Input] | None:
    """Sends what may be sent now. Returns the source, or None when it has no more inputs."""
    for delay_s, refused in pipeline.take_refused():
        outbox.put(refused, delay_s)
    while source is not None and (count := pipeline.num_wanted):
        group = list(islice(source, count))
        for request in pipeline.submit(group):
            outbox.put(request)
        if len(group) < count:
            source = None
    return source

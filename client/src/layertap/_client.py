"""The client for ordinary Python."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, overload

import grpc

from layertap import _arguments, _codec, errors
from layertap._arguments import CLIENT_TIMEOUT, OnError, Timeout
from layertap._pipeline import Pipeline
from layertap._transport import (
    TimeLimit,
    TLSLike,
    call_metadata,
    channel_options,
    connection_failure,
    credentials,
    stub_of,
)
from layertap._types import EncodeOptions, Input, Model, Result, Tokens
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

DEFAULT_ADDRESS = "127.0.0.1:50051"


class Client:
    """A connection to a Layertap server. Threads may share one; it is a context manager.

    `address` is "host:port" or "unix:/path". `token` goes along with every call as a bearer token.
    `tls`: True for the usual roots, a `TLS` for files of your own, or gRPC channel credentials.
    `timeout` is the seconds that a call may take, unless the call says otherwise (None: no limit).
    `max_message_bytes` refuses replies over this; None leaves the limit to the server.

    Every method that calls the server raises `LayertapError`, by its subclasses. A server that is
    unavailable is tried again a few times first.

    Example:
        >>> with Client("127.0.0.1:50051") as client:
        ...     result = client.encode("a text", last_hidden_state=True)

    Raises:
        TypeError, ValueError: an argument is not understood; it is named.
        OSError: a file of `tls` cannot be read.
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
        self._address = _arguments.address(address)
        self._metadata = call_metadata(token)
        self._timeout = _arguments.seconds("timeout", timeout)
        options = channel_options(tls, max_message_bytes)
        secrets = credentials(tls)
        self._channel: Any = (
            grpc.insecure_channel(address, options)
            if secrets is None
            else grpc.secure_channel(address, secrets, options)
        )
        self._stub = stub_of(self._channel)
        self._limits: dict[str, Limits] = {}
        self._is_closed = False

    def close(self) -> None:
        """Ends the connection, and every call on it."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def encode(  # type: ignore[overload-overlap]  # a str is a sequence of str as well; the first wins
        self,
        inputs: Input,
        *,
        on_error: Literal["raise"] = "raise",
        timeout: Timeout = CLIENT_TIMEOUT,
        **options: Unpack[EncodeOptions],
    ) -> Result: ...
    @overload
    def encode(
        self,
        inputs: Iterable[Input],
        *,
        on_error: Literal["raise"] = "raise",
        timeout: Timeout = CLIENT_TIMEOUT,
        **options: Unpack[EncodeOptions],
    ) -> list[Result]: ...
    @overload
    def encode(  # type: ignore[overload-overlap]
        self,
        inputs: Input,
        *,
        on_error: Literal["return"],
        timeout: Timeout = CLIENT_TIMEOUT,
        **options: Unpack[EncodeOptions],
    ) -> Result | LayertapError: ...
    @overload
    def encode(
        self,
        inputs: Iterable[Input],
        *,
        on_error: Literal["return"],
        timeout: Timeout = CLIENT_TIMEOUT,
        **options: Unpack[EncodeOptions],
    ) -> list[Result | LayertapError]: ...
    def encode(
        self,
        inputs: Input | Iterable[Input],
        *,
        on_error: OnError = "raise",
        timeout: Timeout = CLIENT_TIMEOUT,
        **options: Unpack[EncodeOptions],
    ) -> Any:
        """The outputs of one input, or of any number of them in the order given.

        See `EncodeOptions` for the options. Results too large for one message, and inputs too many
        for one, are streamed.

        `on_error="return"` answers the inputs that can be answered: a `LayertapError` stands in the place
        of each of the others. With "raise" one such input fails the call; what had come by then is in the
        error's `results`. Errors that are not of one input (no such model, no server) are always raised.
        `timeout` is the seconds for all of the call (None: no limit); left out, the client's.

        Example:
            >>> results = client.encode(texts, embeddings=True, on_error="return")
            >>> failed = [result for result in results if isinstance(result, layertap.LayertapError)]

        Raises:
            LayertapError: as the server answers; `input_index` is the number of the input at fault.
            ValueError, TypeError: an argument is not understood; it is named.
        """
        template = _codec.encode_request(**options)
        on_error = _arguments.on_error(on_error)
        limit = self._time_limit(timeout)
        if _codec.is_single(inputs):
            return self._encode(template, [inputs], on_error, limit)[0]
        _arguments.check_inputs(inputs)
        return self._encode(template, list(inputs), on_error, limit)

    def _encode(
        self, template: pb.EncodeRequest, inputs: Sequence[Input], on_error: OnError, limit: TimeLimit
    ) -> list[Result | LayertapError]:
        if not inputs:
            return []
        request = unary_request(template, inputs, on_error)
        if request is not None:
            try:
                return _codec.decode_reply(self._call(self._stub.Encode, request, limit))
            except LayertapError as error:
                if is_of_the_only_input(error, len(inputs)) and on_error == "return":
                    return [error]
                ask = isinstance(error, errors.InvalidArgument) and len(inputs) > 1
                limits = self._limits_of(template.model, limit) if ask else None
                if not may_be_streamed(error, len(inputs), limits, on_error):
                    raise
        outcomes: dict[int, Result | LayertapError] = {}
        try:
            stream = self._stream(template, inputs, ordered=False, on_error=on_error, limit=limit)
            outcomes.update(stream)  # keeps what came before an error
        except LayertapError as error:
            error.results = results_among(outcomes)
            raise
        return [outcomes[index] for index in range(len(inputs))]

    @overload
    def stream(
        self,
        inputs: Iterable[Input],
        *,
        ordered: bool = True,
        on_error: Literal["raise"] = "raise",
        timeout: Timeout = None,
        **options: Unpack[EncodeOptions],
    ) -> Iterator[tuple[int, Result]]: ...
    @overload
    def stream(
        self,
        inputs: Iterable[Input],
        *,
        ordered: bool = True,
        on_error: Literal["return"],
        timeout: Timeout = None,
        **options: Unpack[EncodeOptions],
    ) -> Iterator[tuple[int, Result | LayertapError]]: ...
    def stream(
        self,
        inputs: Iterable[Input],
        *,
        ordered: bool = True,
        on_error: OnError = "raise",
        timeout: Timeout = None,
        **options: Unpack[EncodeOptions],
    ) -> Iterator[tuple[int, Any]]:
        """Pairs of an input's index and its result, for any number of inputs, while they come.

        Keeps some requests in flight on one stream, and in memory no more than what is in flight.
        `inputs` is read ahead by that much. `ordered=False` gives each result as soon as it is
        complete. Dropping the iterator cancels what is not done. `timeout` is the seconds for all of the
        stream; None, the default, is no limit. A request that the server is too busy for is sent again
        when the server says so, up to a minute; fewer are then in flight.

        Each input fails alone. With `on_error="return"` a `LayertapError` comes in the place of its
        result, and the stream goes on. With "raise" the results of all inputs before it are given first,
        then its error is raised, and the stream is over; the same goes for an error that `inputs` itself
        raises. What is not of one input (no such model, no server) is always raised.

        Example:
            >>> for index, result in client.stream(texts, embeddings=True, on_error="return"):
            ...     print(index, result if isinstance(result, layertap.LayertapError) else result.embedding)

        Raises:
            LayertapError: as the server answers; `input_index` is the number of the input at fault, in
                `inputs` as a whole.
            ValueError, TypeError: an argument, or an input, is not understood; it is named.
        """
        template = _codec.encode_request(**options)
        _arguments.check_inputs(inputs)
        return self._stream(
            template,
            inputs,
            ordered=_arguments.flag("ordered", ordered),
            on_error=_arguments.on_error(on_error),
            limit=self._time_limit(timeout),
        )

    def _stream(
        self,
        template: pb.EncodeRequest,
        inputs: Iterable[Input],
        *,
        ordered: bool,
        on_error: OnError,
        limit: TimeLimit,
    ) -> Iterator[tuple[int, Any]]:
        limits = self._limits_of(template.model, limit)
        locate = partial(errors.locate, address=self._address, seconds=limit.seconds)
        pipeline = Pipeline(template, ordered=ordered, on_error=on_error, locate=locate, **limits._asdict())
        outbox = _Outbox()
        source: Iterator[Input] | None = iter(inputs)
        call = None
        try:
            while True:
                source = _fill(pipeline, source, outbox)
                yield from pipeline.ready()
                if pipeline.is_idle:
                    if source is None:
                        break
                    continue
                try:
                    if call is None:
                        self._check_open()
                        call = self._stub.EncodeStream(
                            iter(outbox), timeout=limit.left_s, metadata=self._metadata
                        )
                    message = next(call, None)
                except grpc.RpcError as error:
                    raise self._located(error, limit) from error
                if message is None:
                    break
                yield from pipeline.receive(message)
            pipeline.finish()
            outbox.end()
            if call is not None:
                with suppress(grpc.RpcError):  # all is answered: how the stream ends changes nothing
                    next(call, None)
        finally:
            if call is not None:
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
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> Tokens: ...
    @overload
    def tokenize(
        self,
        inputs: Iterable[Input],
        *,
        model: str = "",
        truncation: Literal["end", "start"] | None = None,
        prompt_name: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> list[Tokens]: ...
    def tokenize(
        self,
        inputs: Input | Iterable[Input],
        *,
        model: str = "",
        truncation: Literal["end", "start"] | None = None,
        prompt_name: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> Tokens | list[Tokens]:
        """The tokens of one input, or of each of several, without running the model.

        `timeout` is the seconds for all of the call (None: no limit); left out, the client's. Several
        messages are sent for many inputs.
        """
        template = _codec.tokenize_request(model=model, truncation=truncation, prompt_name=prompt_name)
        limit = self._time_limit(timeout)
        if _codec.is_single(inputs):
            return self._tokenize(template, [inputs], limit)[0]
        _arguments.check_inputs(inputs)
        return self._tokenize(template, list(inputs), limit)

    def _tokenize(
        self, template: pb.TokenizeRequest, inputs: Sequence[Input], limit: TimeLimit
    ) -> list[Tokens]:
        request = _codec.filled(template, inputs)
        requests: Iterable[tuple[int, pb.TokenizeRequest]] = [(0, request)]
        if len(inputs) != 1 or request.ByteSize() > MAX_UNARY_BYTES:
            requests = tokenize_requests(request, self._limits_of(template.model, limit)) if inputs else ()
        tokens: list[Tokens] = []
        for first, part in requests:
            reply = self._call(self._stub.Tokenize, part, limit, first)
            tokens += map(_codec.decode_tokens, reply.results)
        return tokens

    def models(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> list[Model]:
        """The served models."""
        reply = self._call(self._stub.ListModels, pb.ListModelsRequest(), self._time_limit(timeout))
        return [_codec.decode_model(model) for model in reply.models]

    def model(self, name: str = "", *, timeout: Timeout = CLIENT_TIMEOUT) -> Model:
        """One served model; the default one without a name."""
        return self._model(name, self._time_limit(timeout))

    def _model(self, name: str, limit: TimeLimit) -> Model:
        reply = self._call(self._stub.GetModel, _codec.model_request(name), limit)
        return _codec.decode_model(reply.model)

    def _limits_of(self, model: str, limit: TimeLimit) -> Limits:
        if model not in self._limits:
            self._limits[model] = limits_of(self._model(model, limit))
        return self._limits[model]

    def _time_limit(self, timeout: Timeout) -> TimeLimit:
        if isinstance(timeout, _arguments.ClientDefault):
            return TimeLimit(self._timeout)
        return TimeLimit(_arguments.seconds("timeout", timeout))

    def _call(self, rpc: Any, request: Any, limit: TimeLimit, first_input: int = 0) -> Any:
        self._check_open()
        try:
            return rpc(request, timeout=limit.left_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._located(error, limit, first_input) from error

    def _located(self, error: grpc.RpcError, limit: TimeLimit, first_input: int = 0) -> LayertapError:
        """The LayertapError for gRPC's, which says where the call went, and for how long."""
        own = errors.from_rpc_error(error, first_input)
        connection = connection_failure(self._channel) if errors.is_without_cause(own) else ""
        errors.locate(own, self._address, limit.seconds, connection)
        return own

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this Client is closed: make another")


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
        group: list[Input] = []
        failure: Exception | None = None
        try:
            for value in source:
                group.append(value)
                if len(group) == count:
                    break
        except Exception as error:  # the caller's own: it comes after the results of what it gave before
            failure = error
        for request in pipeline.submit(group):
            outbox.put(request)
        if failure is not None:
            pipeline.fail(failure)
        if len(group) < count:
            source = None
    return source

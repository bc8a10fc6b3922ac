"""The synchronous client."""

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
    """A connection to a Layertap server. It is thread-safe, and a context manager.

    `address` is "host:port" or "unix:/path". `token` is sent with every call as a bearer token.
    `tls` is True to trust gRPC's default root certificates, a `TLS` for your own files, or gRPC channel
    credentials. `timeout` is the default time limit of a call in seconds (None: no limit).
    `max_message_bytes` is the size of the largest reply that is accepted; with None, only the server
    limits it.

    Every method that calls the server raises a subclass of `LayertapError` if the call fails. A call that
    fails because the server is unavailable is first repeated a few times.

    Example:
        >>> with Client("127.0.0.1:50051") as client:
        ...     result = client.encode("a text", last_hidden_state=True)

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
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
        """Closes the connection, and cancels every call on it."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def encode(  # type: ignore[overload-overlap]  # a str is an iterable of str; the first applies
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
        """Returns the outputs of one input, or a list of the outputs of several inputs, in their order.

        See `EncodeOptions` for the options. If the inputs or the results are too large for one message,
        they are streamed.

        With `on_error="return"`, the list has a `LayertapError` in the place of each input that failed.
        With "raise", the first failed input fails the call; the results that were received before it are in
        the error's `results`. Errors that do not belong to one input, such as an unknown model or an
        unavailable server, are always raised. `timeout` is the time limit of the whole call in seconds
        (None: no limit; default: the client's `timeout`).

        Example:
            >>> results = client.encode(texts, embeddings=True, on_error="return")
            >>> failed = [result for result in results if isinstance(result, layertap.LayertapError)]

        Raises:
            LayertapError: the call failed. `input_index` is the index of the input that caused it, or None.
            ValueError, TypeError: an argument is invalid; the message names it.
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
            outcomes.update(stream)  # keeps the results received before an error
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
        """Yields (index, result) for any number of inputs, as the results arrive.

        A limited number of requests is in flight on one stream, and `inputs` is read only that far ahead,
        so memory use does not depend on the number of inputs. With `ordered=False`, each result is yielded
        as soon as it is complete. Closing or dropping the iterator cancels the rest. `timeout` is the time
        limit of the whole stream in seconds; the default, None, is no limit. A request that the server
        rejects because it is busy is sent again after the delay that the server asks for, for up to a
        minute in total; fewer requests are then kept in flight.

        If an input fails, the others do not. With `on_error="return"`, a `LayertapError` is yielded in the
        place of its result, and the stream continues. With "raise", the results of all earlier inputs are
        yielded first; then the error is raised, and the stream ends. The same is true of an exception that
        `inputs` raises. Errors that do not belong to one input, such as an unknown model or an unavailable
        server, are always raised.

        Example:
            >>> for index, result in client.stream(texts, embeddings=True, on_error="return"):
            ...     print(index, result if isinstance(result, layertap.LayertapError) else result.embedding)

        Raises:
            LayertapError: the call failed; `input_index` is the index in `inputs` of the input that caused
                it, if one did.
            ValueError, TypeError: an argument or an input is invalid; the message names it.
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
                with suppress(grpc.RpcError):  # all results are here: errors at the end do not matter
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
        """Returns the tokens of one input, or a list for several inputs, without running the model.

        `timeout` is the time limit of the whole call in seconds (None: no limit; default: the client's
        `timeout`). Many inputs are sent in several messages.
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
        """Returns all served models."""
        reply = self._call(self._stub.ListModels, pb.ListModelsRequest(), self._time_limit(timeout))
        return [_codec.decode_model(model) for model in reply.models]

    def model(self, name: str = "", *, timeout: Timeout = CLIENT_TIMEOUT) -> Model:
        """Returns the served model of this name; without a name, the server's default model."""
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
        """The LayertapError for an error of gRPC, with the address and the time limit of the call."""
        own = errors.from_rpc_error(error, first_input)
        connection = connection_failure(self._channel) if errors.is_without_cause(own) else ""
        errors.locate(own, self._address, limit.seconds, connection)
        return own

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this Client is closed: make another")


class _Outbox:
    """The queue of messages to send. gRPC's own thread iterates over it until `end` is called."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[tuple[float, pb.EncodeStreamRequest] | None] = SimpleQueue()
        self._ended = Event()

    def put(self, message: pb.EncodeStreamRequest, delay_s: float = 0.0) -> None:
        """Queues a message. It and all later messages are sent no earlier than in `delay_s` seconds."""
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
    """Queues the messages that may be sent now. Returns the source, or None if it has no more inputs."""
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
        except Exception as error:  # raised by the caller's iterable: reported after the earlier results
            failure = error
        for request in pipeline.submit(group):
            outbox.put(request)
        if failure is not None:
            pipeline.fail(failure)
        if len(group) < count:
            source = None
    return source

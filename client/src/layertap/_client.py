"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import grpc

from layertap import _arguments, _replies, _requests, _rerank, errors
from layertap._arguments import CLIENT_TIMEOUT, OnError, Timeout
from layertap._calls import Calls
from layertap._embed import ArrayKind, EmbedCall, EmbedOptions, Rows, embed_request
from layertap._pipeline import Pipeline
from layertap._progress import progress
from layertap._results import Model, Ranked, Result, Tokens
from layertap._signatures import shows_options
from layertap._streams import Inputs, Streams, fill
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

DEFAULT_ADDRESS = "127.0.0.1:50051"
# How long `wait_ready` waits for one answer, and between two questions.
WAIT_STEP_S, WAIT_DELAY_S = 5.0, 0.1


class Client:
    """A client of a Layertap server. It is thread-safe, and a context manager.

    `address` is "host:port" or "unix:/path". `token` is sent with every call as a bearer token.
    `tls` is True to trust gRPC's default root certificates, a `TLS` for your own files, or gRPC channel
    credentials. `timeout` is the default time limit of a call in seconds (None: no limit).
    `max_message_bytes` is the size of the largest reply that is accepted; with None, only the server
    limits it.

    The client opens one connection, and another one whenever 16 calls are open on each: up to `connections`,
    or, with None, up to the number that the server advises, and no more than 8. A call goes to the connection
    with the fewest open calls.

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
        connections: int | None = None,
    ) -> None:
        self._calls = Calls(address, token, tls, timeout, max_message_bytes, connections)
        self._models: dict[str, Model] = {}

    def __repr__(self) -> str:
        return f"Client({self._calls.address!r})"

    def close(self) -> None:
        """Closes the connections, and cancels every call on them."""
        self._calls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and issubclass(error, KeyboardInterrupt):
            self._calls.close_after_interrupt()
        else:
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
    @shows_options(EncodeOptions, _requests.encode_request)
    def encode(
        self,
        inputs: Input | Iterable[Input],
        *,
        on_error: OnError = "raise",
        timeout: Timeout = CLIENT_TIMEOUT,
        **options: Unpack[EncodeOptions],
    ) -> Any:
        """Returns the outputs of one input, or a list of the outputs of several inputs, in their order.

        If the inputs or the results are too large for one message,
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
        template = _requests.encode_request(**options)
        on_error = _arguments.on_error(on_error)
        limit = self._calls.time_limit(timeout)
        if _requests.is_single(inputs):
            return self._encode(template, [inputs], on_error, limit)[0]
        _arguments.check_inputs(inputs)
        return self._encode(template, list(inputs), on_error, limit)

    def _encode(
        self, template: pb.EncodeRequest, inputs: Sequence[Input], on_error: OnError, limit: TimeLimit
    ) -> list[Result | LayertapError]:
        outcomes: dict[int, Result | LayertapError] = {}
        try:
            for index, outcome in self._outcomes(template, inputs, on_error, limit):
                outcomes[index] = outcome  # noqa: PERF403  (keeps the results received before an error)
        except LayertapError as error:
            error.results = results_among(outcomes)
            raise
        return [outcomes[index] for index in range(len(inputs))]

    def _outcomes(
        self, template: pb.EncodeRequest, inputs: Sequence[Input], on_error: OnError, limit: TimeLimit
    ) -> Iterator[tuple[int, Result | LayertapError]]:
        """Yields (index, outcome) of each input, in any order: from one message if that is enough, otherwise
        from a stream."""
        if not inputs:
            return
        request = unary_request(template, inputs, on_error)
        if request is not None:
            outcomes: list[Result | LayertapError] | None = None
            try:
                outcomes = _replies.decode_reply(self._calls.call("Encode", request, limit), template)
            except LayertapError as error:
                if is_of_the_only_input(error, len(inputs)) and on_error == "return":
                    outcomes = [error]
                else:
                    ask = isinstance(error, errors.InvalidArgument) and len(inputs) > 1
                    limits = self._limits_of(template.model, limit) if ask else None
                    if not may_be_streamed(error, len(inputs), limits, on_error):
                        raise
            if outcomes is not None:
                yield from enumerate(outcomes)
                return
        yield from self._stream(template, inputs, ordered=False, on_error=on_error, limit=limit)

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
    @shows_options(EncodeOptions, _requests.encode_request)
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
        template = _requests.encode_request(**options)
        _arguments.check_inputs(inputs)
        return self._stream(
            template,
            inputs,
            ordered=_arguments.flag("ordered", ordered),
            on_error=_arguments.on_error(on_error),
            limit=self._calls.time_limit(timeout),
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
        locate = partial(errors.locate, address=self._calls.address, seconds=limit.seconds)
        pipeline = Pipeline(
            template,
            ordered=ordered,
            on_error=on_error,
            locate=locate,
            max_lanes=self._calls.connections.limit,
            **limits._asdict(),
        )
        streams = Streams(
            self._calls.connections, self._calls.metadata, limit, partial(self._calls.located, limit)
        )
        source, has_ended = Inputs(inputs), False
        try:
            while not has_ended:
                messages = fill(pipeline, source, streams)
                yield from pipeline.ready()
                if pipeline.is_idle:
                    if not source.has_more:
                        break
                    continue
                for message in messages:
                    if message is None:
                        has_ended = True
                        break
                    yield from pipeline.receive(message)
            pipeline.finish()
            streams.finish()
        finally:
            streams.close()

    @overload
    def embed(
        self,
        inputs: Input | Iterable[Input],
        *,
        convert_to: Literal["numpy"] = "numpy",
        show_progress_bar: bool | None = False,
        timeout: Timeout = None,
        **options: Unpack[EmbedOptions],
    ) -> Array: ...
    @overload
    def embed(
        self,
        inputs: Input | Iterable[Input],
        *,
        convert_to: Literal["torch"],
        show_progress_bar: bool | None = False,
        timeout: Timeout = None,
        **options: Unpack[EmbedOptions],
    ) -> Any: ...
    @shows_options(EmbedOptions, embed_request)
    def embed(
        self,
        inputs: Input | Iterable[Input],
        *,
        convert_to: ArrayKind = "numpy",
        show_progress_bar: bool | None = False,
        timeout: Timeout = None,
        **options: Unpack[EmbedOptions],
    ) -> Any:
        """Returns one array of the embeddings of all inputs: (D,) for one input, (N, D) for N inputs.

        The array is float32, except for some `encoding`s. With
        `convert_to="torch"`, it is a torch tensor on the CPU. Any number of inputs is possible: they are
        streamed, and only the array is kept. `show_progress_bar` shows a bar (tqdm). `timeout` is the time
        limit of the whole call in seconds; the default, None, is no limit. For no inputs, D is the size of
        the configured embedding if that is what is requested, otherwise 0.

        Example:
            >>> vectors = client.embed(texts, normalize=True)
            >>> scores = vectors @ client.embed("a query", normalize=True)

        Raises:
            LayertapError: the call failed; `input_index` is the index of the input that caused it, or None.
            ValueError, TypeError: an argument is invalid; the message names it.
            ModuleNotFoundError: an argument needs torch or tqdm, which is not installed.
        """
        call = EmbedCall(convert_to, **options)
        limit = self._calls.time_limit(timeout)
        if _requests.is_single(inputs):
            rows = self._embed(call, [inputs], False, limit)
            return call.converted(rows[0])
        _arguments.check_inputs(inputs)
        values = list(inputs)
        if not values:
            return call.of_nothing(self._facts_of(call.template.model, limit))
        return call.converted(self._embed(call, values, show_progress_bar, limit))

    def _embed(
        self, call: EmbedCall, inputs: Sequence[Input], show_progress_bar: object, limit: TimeLimit
    ) -> Array:
        rows = Rows(len(inputs))
        with progress(len(inputs), show_progress_bar) as advance:
            for index, result in self._outcomes(call.template, inputs, "raise", limit):
                rows.put(index, result.embeddings[0])  # type: ignore[union-attr]  # errors are raised
                advance()
        return rows.array()

    @overload
    def tokenize(  # type: ignore[overload-overlap]
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
    def tokenize(
        self,
        inputs: Iterable[Input],
        *,
        model: str = "",
        truncation: TruncationName | None = None,
        prompt_name: str = "",
        without_special_tokens: bool = False,
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> list[Tokens]: ...
    def tokenize(
        self,
        inputs: Input | Iterable[Input],
        *,
        model: str = "",
        truncation: TruncationName | None = None,
        prompt_name: str = "",
        without_special_tokens: bool = False,
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> Tokens | list[Tokens]:
        """Returns the tokens of one input, or a list for several inputs, without running the model.

        `without_special_tokens` returns only the tokens of the input itself, as to build `TokenIds` of your
        own.
        `timeout` is the time limit of the whole call in seconds (None: no limit; default: the client's
        `timeout`). Many inputs are sent in several messages.
        """
        template = _requests.tokenize_request(
            model=model,
            truncation=truncation,
            prompt_name=prompt_name,
            without_special_tokens=without_special_tokens,
        )
        limit = self._calls.time_limit(timeout)
        if _requests.is_single(inputs):
            return self._tokenize(template, [inputs], limit)[0]
        _arguments.check_inputs(inputs)
        return self._tokenize(template, list(inputs), limit)

    def _tokenize(
        self, template: pb.TokenizeRequest, inputs: Sequence[Input], limit: TimeLimit
    ) -> list[Tokens]:
        request = _requests.filled(template, inputs)
        requests: Iterable[tuple[int, pb.TokenizeRequest]] = [(0, request)]
        if len(inputs) != 1 or request.ByteSize() > MAX_UNARY_BYTES:
            requests = tokenize_requests(request, self._limits_of(template.model, limit)) if inputs else ()
        tokens: list[Tokens] = []
        for first, part in requests:
            reply = self._calls.call("Tokenize", part, limit, first)
            tokens += map(_replies.decode_tokens, reply.results)
        return tokens

    def rerank(
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
        """Returns the texts in the order of their scores for the query, highest first, as a cross-encoder
        scores each pair (query, text).

        The model must have a sequence-classification head with one label. A score is its logit; with
        `activation="sigmoid"`, a number from 0 to 1. `top_k` is the number of texts to return (None: all).
        Texts with equal scores keep their order. Many texts are streamed. The other options are those of
        `encode`; pairs over the limit of tokens are rejected unless `truncation` is set.

        Example:
            >>> for one in client.rerank("how do bees fly", texts, top_k=3):
            ...     print(one.score, one.index, one.text)

        Raises:
            FailedPrecondition: the model has no such head.
            LayertapError: the call failed; `input_index` is the index of the text that caused it, or None.
            ValueError, TypeError: an argument is invalid; the message names it.
        """
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
        if not _rerank.can_rerank(self._facts_of(template.model, limit)):
            # The facts may be from before the server's last start.
            _rerank.check_head(self._model(template.model, limit))
        return _rerank.ranked(pairs, self._encode(template, pairs, "raise", limit), top_k)

    def wait_ready(self, timeout: float | None = None, *, model: str = "") -> Model:
        """Waits until the server answers for this model (empty: the default model), and returns its description.

        `timeout` is the time limit in seconds (None: no limit). A server that is not there yet, loads its
        models or restarts is asked again.

        Raises:
            Unavailable, DeadlineExceeded: the time passed; the error says why the server was not ready.
            LayertapError: waiting does not help, as for an unknown model or wrong credentials.
        """
        limit = self._calls.time_limit(timeout)
        while True:
            left_s = limit.left_s
            try:
                step = TimeLimit(WAIT_STEP_S if left_s is None else min(left_s, WAIT_STEP_S))
                found = self._model(model, step)
                self._check_serving(step)
                return found
            except (errors.Unavailable, errors.DeadlineExceeded):
                left_s = limit.left_s
                if left_s is not None and left_s <= WAIT_DELAY_S:
                    raise
            time.sleep(WAIT_DELAY_S)

    def _check_serving(self, limit: TimeLimit) -> None:
        """Raises `Unavailable` if the health service says that the server does not serve, such as while its
        engine restarts: the models are described then too. A server without the service is taken to serve."""
        try:
            status = self._calls.health(limit)
        except LayertapError as error:
            if error.code is grpc.StatusCode.UNIMPLEMENTED:
                return
            raise
        if status == "NOT_SERVING":
            raise errors.Unavailable(f"{self._calls.address}: the server is not serving yet; try again")

    def health(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> HealthStatus:
        """Returns the status in the server's health service: "SERVING" if all models are ready, "NOT_SERVING"
        while it loads, restarts or shuts down, or "UNKNOWN".

        The server answers without credentials. `timeout` is as in `tokenize`.

        Raises:
            Unavailable: no server answers.
        """
        return self._calls.health(self._calls.time_limit(timeout))

    def models(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> list[Model]:
        """Returns all served models."""
        reply = self._calls.call("ListModels", pb.ListModelsRequest(), self._calls.time_limit(timeout))
        self._calls.connections.learn(reply.models)
        return [_replies.decode_model(model) for model in reply.models]

    def model(self, name: str = "", *, timeout: Timeout = CLIENT_TIMEOUT) -> Model:
        """Returns the served model of this name; without a name, the server's default model."""
        return self._model(name, self._calls.time_limit(timeout))

    def _model(self, name: str, limit: TimeLimit) -> Model:
        reply = self._calls.call("GetModel", _requests.model_request(name), limit)
        self._calls.connections.learn([reply.model])
        self._models[name] = _replies.decode_model(reply.model)
        return self._models[name]

    def _facts_of(self, model: str, limit: TimeLimit) -> Model:
        """The served model of this name; the server is asked once."""
        return self._models.get(model) or self._model(model, limit)

    def _limits_of(self, model: str, limit: TimeLimit) -> Limits:
        return limits_of(self._facts_of(model, limit))

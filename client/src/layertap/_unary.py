"""Decides what is sent in one message, in several, or on a stream. No I/O; shared by both clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from layertap._arguments import OnError
from layertap._requests import filled
from layertap._results import Model, Result
from layertap._types import Input
from layertap.errors import (
    InvalidArgument,
    LayertapError,
    OutOfRange,
    ResourceExhausted,
    is_of_one_input,
)
from layertap.v1 import encoder_pb2 as pb

# A request with more inputs or bytes is streamed. The number of inputs is also the assumed limit of a server
# that does not report one.
MAX_UNARY_INPUTS = 256
MAX_UNARY_BYTES = 1 << 20
# Inputs of one Tokenize call, which has no stream: more are sent in several calls, to keep replies small.
MAX_TOKENIZE_INPUTS = 64
# An upper bound of what a message adds to its inputs and the request without inputs.
_ENVELOPE_BYTES = 64
# A server's reported limit on messages is taken to be no smaller than this.
_LEAST_LIMIT_BYTES = 1 << 10
# The tag and the length of a field, which are added to each input.
_FIELD_BYTES = 6


class Limits(NamedTuple):
    """The limits of one request to a model. 0 bytes or tokens: the server reports no limit."""

    max_inputs: int
    max_message_bytes: int
    max_tokens: int

    def check_size(self, index: int, message: pb.Input, template_bytes: int) -> int:
        """The bytes that an input adds to a request.

        Raises:
            ValueError: the input is too large for a message to the server.
        """
        size = message.ByteSize() + _FIELD_BYTES
        if self.max_message_bytes and size + template_bytes + _ENVELOPE_BYTES > self.max_message_bytes:
            tokens = f"the first {self.max_tokens} tokens" if self.max_tokens else "its first tokens"
            raise ValueError(
                f"inputs[{index}] has {size} bytes, and the server accepts messages of up to "
                f"{self.max_message_bytes} (max_message_bytes): cut it before sending, as in text[:100_000]; "
                f'with truncation="end" the model reads only {tokens} of it'
            )
        return size


def limits_of(model: Model) -> Limits:
    """The limits that the server reports for a model."""
    limits = model.limits
    max_message_bytes = limits.max_message_bytes and max(limits.max_message_bytes, _LEAST_LIMIT_BYTES)
    return Limits(limits.max_inputs_per_request or MAX_UNARY_INPUTS, max_message_bytes, model.max_tokens)


def unary_request(
    template: pb.EncodeRequest, inputs: Sequence[Input], on_error: OnError
) -> pb.EncodeRequest | None:
    """The request for all inputs; None if they must be streamed.

    Raises:
        TypeError, ValueError: an input is invalid, and `on_error` is "raise".
    """
    try:
        request = filled(template, inputs)
    except (TypeError, ValueError):
        if on_error == "raise":
            raise
        return None
    request.fail_each_alone = on_error == "return"
    fits = len(inputs) <= MAX_UNARY_INPUTS and request.ByteSize() <= MAX_UNARY_BYTES
    return request if fits else None


def is_of_the_only_input(error: LayertapError, num_inputs: int) -> bool:
    """Whether the error belongs to the request's only input; if so, sets its `input_index`."""
    if num_inputs > 1 or isinstance(error, OutOfRange) or not is_of_one_input(error):
        return False
    error.input_index = 0
    return True


def may_be_streamed(error: LayertapError, num_inputs: int, limits: Limits | None, on_error: OnError) -> bool:
    """Whether a request that failed as one message may succeed as a stream. `limits` is None if unknown."""
    match error:
        case OutOfRange():  # refused before any computation
            return True
        case ResourceExhausted(reason=""):  # from gRPC: the message exceeds the server's limit
            return "larger than max" in error.message and "CLIENT" not in error.message
        case InvalidArgument() if limits is not None and num_inputs > limits.max_inputs:
            return True
    # The server does not support `fail_each_alone`: the stream sends the inputs one by one.
    return on_error == "return" and is_of_one_input(error)


def tokenize_requests(
    request: pb.TokenizeRequest, limits: Limits
) -> Iterator[tuple[int, pb.TokenizeRequest]]:
    """Splits the request into parts that fit one message each. Yields each part with the index of its first
    input, as (index, part).

    Raises:
        ValueError: an input is too large for one message.
    """
    template = pb.TokenizeRequest()
    template.CopyFrom(request)
    template.ClearField("inputs")
    max_inputs = min(limits.max_inputs, MAX_TOKENIZE_INPUTS)
    max_bytes = min(limits.max_message_bytes or MAX_UNARY_BYTES, MAX_UNARY_BYTES)
    first, size, part = 0, 0, _copy(template)
    for index, message in enumerate(request.inputs):
        added = limits.check_size(index, message, template.ByteSize())
        if part.inputs and (len(part.inputs) == max_inputs or size + added > max_bytes - _ENVELOPE_BYTES):
            yield first, part
            first, size, part = index, 0, _copy(template)
        part.inputs.append(message)
        size += added
    if part.inputs:
        yield first, part


def _copy(template: pb.TokenizeRequest) -> pb.TokenizeRequest:
    part = pb.TokenizeRequest()
    part.CopyFrom(template)
    return part


def results_among(outcomes: Mapping[int, Result | LayertapError]) -> dict[int, Result]:
    """The outcomes that are results, not errors."""
    return {index: outcome for index, outcome in outcomes.items() if isinstance(outcome, Result)}

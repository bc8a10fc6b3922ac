"""What is asked for in one message, and what needs a stream or more messages. No I/O: both clients share it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from layertap._arguments import OnError
from layertap._codec import filled
from layertap._types import Input, Model, Result
from layertap.errors import (
    InvalidArgument,
    LayertapError,
    OutOfRange,
    ResourceExhausted,
    is_of_one_input,
)
from layertap.v1 import encoder_pb2 as pb

# What is asked for in one message, where the server does not say otherwise; more is streamed.
MAX_UNARY_INPUTS = 256
MAX_UNARY_BYTES = 1 << 20
# The Tokenize RPC has no stream: this many inputs a call keep its replies small.
MAX_TOKENIZE_INPUTS = 64
# A message is larger than its inputs, and the request without them, by no more than this.
_ENVELOPE_BYTES = 64
# No server has a smaller limit on messages.
_LEAST_LIMIT_BYTES = 1 << 10
# What a message's field adds to an input: its tag and its length.
_FIELD_BYTES = 6


class Limits(NamedTuple):
    """What one request to a model may hold. 0 bytes or tokens: the server does not say."""

    max_inputs: int
    max_message_bytes: int
    max_tokens: int

    def check_size(self, index: int, message: pb.Input, template_bytes: int) -> int:
        """How many bytes an input adds to a request.

        Raises:
            ValueError: no message to the server can hold it.
        """
        size = message.ByteSize() + _FIELD_BYTES
        if self.max_message_bytes and size + template_bytes + _ENVELOPE_BYTES > self.max_message_bytes:
            tokens = f"the first {self.max_tokens} tokens" if self.max_tokens else "its first tokens"
            raise ValueError(
                f"inputs[{index}] has {size} bytes, and a message to the server may have "
                f"{self.max_message_bytes} (max_message_bytes): cut it before sending, as in text[:100_000]; "
                f'with truncation="end" the model reads {tokens} of it'
            )
        return size


def limits_of(model: Model) -> Limits:
    """What the server says about a model."""
    limits = model.limits
    max_message_bytes = limits.max_message_bytes and max(limits.max_message_bytes, _LEAST_LIMIT_BYTES)
    return Limits(limits.max_inputs_per_request or MAX_UNARY_INPUTS, max_message_bytes, model.max_tokens)


def unary_request(
    template: pb.EncodeRequest, inputs: Sequence[Input], on_error: OnError
) -> pb.EncodeRequest | None:
    """The request for all of the inputs; None where they are to be streamed.

    Raises:
        TypeError, ValueError: with "raise", an input is not understood.
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
    """Whether a request of one input failed for that input. Marks the error as its own."""
    if num_inputs > 1 or isinstance(error, OutOfRange) or not is_of_one_input(error):
        return False
    error.input_index = 0
    return True


def may_be_streamed(error: LayertapError, num_inputs: int, limits: Limits | None, on_error: OnError) -> bool:
    """Whether what one message could not answer may be answered on a stream. `limits`: where known."""
    match error:
        case OutOfRange():  # refused before any computation
            return True
        case ResourceExhausted(reason=""):  # gRPC's own words: the server has a small limit on messages
            return "larger than max" in error.message and "CLIENT" not in error.message
        case InvalidArgument() if limits is not None and num_inputs > limits.max_inputs:
            return True
    # The server does not know `fail_each_alone`: the stream finds out which inputs fail.
    return on_error == "return" and is_of_one_input(error)


def tokenize_requests(
    request: pb.TokenizeRequest, limits: Limits
) -> Iterator[tuple[int, pb.TokenizeRequest]]:
    """The request in parts that one message each can hold, with the number of each one's first input.

    Raises:
        ValueError: no message can hold one of the inputs.
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
    """Those that are no errors."""
    return {index: outcome for index, outcome in outcomes.items() if isinstance(outcome, Result)}

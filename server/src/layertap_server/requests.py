"""Requests from bytes: a small one at once, a large one input by input, in turns.

protobuf parses a message in one go, up to 60 ms for 4 MiB of small fields. So the outer fields of a large
one are walked here, by the protobuf encoding reference; what they hold is parsed each for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors
from layertap_server.turns import in_turns

# Up to here protobuf takes a millisecond, whatever the message holds.
LARGE_REQUEST_BYTES = 1 << 16
# The same for what is parsed in one go of a large request, text aside: that costs nothing.
MAX_PART_BYTES = 1 << 16

LENGTH_DELIMITED = 2
INPUTS_TAG = 2 << 3 | LENGTH_DELIMITED  # EncodeRequest.inputs and TokenizeRequest.inputs
REQUEST_TAG = 2 << 3 | LENGTH_DELIMITED  # EncodeStreamRequest.request
TEXTS = ("text", "pair")

MessageT = TypeVar("MessageT", bound=Message)
RequestT = TypeVar("RequestT", pb.EncodeRequest, pb.TokenizeRequest)


@dataclass(slots=True)
class StreamRequest:
    """An EncodeStreamRequest; the inputs of a large one stand beside its message."""

    request_id: int
    accepts_whole: bool
    accepts_grouped: bool
    request: pb.EncodeRequest
    inputs: Sequence[pb.Input]


def parse(kind: type[MessageT], data: bytes | memoryview) -> MessageT:
    message = kind()
    try:
        message.ParseFromString(data)  # type: ignore[arg-type]  # any buffer will do
    except DecodeError:
        raise malformed(kind, len(data)) from None
    return message


def malformed(kind: type[Message], num_bytes: int) -> errors.RequestError:
    return errors.malformed(f"these {num_bytes} bytes are no {kind.DESCRIPTOR.full_name}")


async def read_request(
    kind: type[RequestT], data: bytes | memoryview, max_inputs: int
) -> tuple[RequestT, Sequence[pb.Input]]:
    """The request and its inputs, which a large one does not hold itself."""
    if len(data) <= LARGE_REQUEST_BYTES:
        request = parse(kind, data)
        return request, request.inputs
    inputs: list[pb.Input] = []
    rest: list[memoryview] = []
    async for tag, field, content in in_turns(fields(kind, memoryview(data))):
        if tag != INPUTS_TAG:
            rest.append(field)
            continue
        if len(inputs) == max_inputs:
            raise errors.too_many_inputs(max_inputs)
        inputs.append(parse_input(content, f"inputs[{len(inputs)}]"))
    return parse(kind, joined(kind, rest)), inputs


async def read_stream_request(data: bytes, max_inputs: int) -> StreamRequest:
    """Raises a `RequestError` that ends the stream: of such bytes no request can be told."""
    kind = pb.EncodeStreamRequest
    if len(data) <= LARGE_REQUEST_BYTES:
        message = parse(kind, data)
        request = message.request
        return StreamRequest(
            message.request_id, message.accepts_whole, message.accepts_grouped, request, request.inputs
        )
    rest: list[memoryview] = []
    contents: list[memoryview] = []
    async for tag, field, content in in_turns(fields(kind, memoryview(data))):
        if tag == REQUEST_TAG:
            contents.append(content)
        else:
            rest.append(field)
    message = parse(kind, joined(kind, rest))
    # A field that comes in several parts is what they are end to end.
    whole = contents[0] if len(contents) == 1 else b"".join(contents)
    request, inputs = await read_request(pb.EncodeRequest, whole, max_inputs)
    return StreamRequest(message.request_id, message.accepts_whole, message.accepts_grouped, request, inputs)


def joined(kind: type[Message], parts: Sequence[memoryview]) -> bytes:
    """What is left of a message beside its inputs."""
    if (num_bytes := sum(map(len, parts))) > MAX_PART_BYTES:
        raise errors.malformed(
            f"{num_bytes} bytes of a {kind.DESCRIPTOR.full_name} are no inputs; at most {MAX_PART_BYTES} may be"
        )
    return b"".join(parts)


def parse_input(content: memoryview, field: str) -> pb.Input:
    if len(content) > MAX_PART_BYTES:
        tag, whole, _ = next(fields(pb.Input, content))
        known = pb.Input.DESCRIPTOR.fields_by_number.get(tag >> 3)
        name = known.name if known is not None else "unknown"
        if name not in TEXTS or len(whole) < len(content):
            raise errors.invalid_argument(
                f"{field}.{name}",
                f"{len(content)} bytes are more than the {MAX_PART_BYTES} that an input may have which is no text",
                reason="INPUT_TOO_LARGE",
            )
    return parse(pb.Input, content)


# ----------------------------------------------------------------------------------- the walk


def fields(kind: type[Message], message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """The tag of each field, the field as a whole, and its content. Raises a `RequestError`."""
    at, size = 0, len(message)
    try:
        while at < size:
            begin = at
            tag, content = varint(message, at)
            match tag & 7:
                case 0:  # a varint
                    at = varint(message, content)[1]
                case 1:  # 64 bits
                    at = content + 8
                case 2:  # length-delimited
                    length, content = varint(message, content)
                    at = content + length
                case 5:  # 32 bits
                    at = content + 4
                case _:  # a group: there is none in the contract
                    raise malformed(kind, size)
            if at > size:
                raise malformed(kind, size)
            yield tag, message[begin:at], message[content:at]
    except IndexError:
        raise malformed(kind, size) from None


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """A base-128 number, least significant group first, and where it ends. Raises IndexError."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError

"""Parses requests from bytes: small ones in one call, large ones input by input, yielding to the event loop.

protobuf parses a message in one call, which takes up to 60 ms for 4 MiB of small fields, and many times their
size in memory. So this module walks over the outer fields of a large message, as the protobuf encoding
reference describes them, counts the inputs on the way, and has protobuf parse each input by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors
from layertap_server.api.cooperative import yield_between
from layertap_server.errors import RequestError

# Up to this size protobuf takes at most a millisecond, whatever the message contains.
LARGE_REQUEST_BYTES = 1 << 16
# The same limit for each part of a large request that protobuf parses in one call. Text is cheap, and exempt.
MAX_PART_BYTES = 1 << 16
# The most parts that a message field may come in, and fields of a pair. Protobuf allows more; clients need
# one or two.
MAX_PARTS = 16

VARINT, LENGTH_DELIMITED = 0, 2
INPUTS_TAG = 2 << 3 | LENGTH_DELIMITED  # EncodeRequest.inputs and TokenizeRequest.inputs
ID_TAG = 1 << 3 | VARINT  # EncodeStreamRequest.request_id
REQUEST_TAG = 2 << 3 | LENGTH_DELIMITED  # EncodeStreamRequest.request
TEXT_TAG = 1 << 3 | LENGTH_DELIMITED  # Input.text
PAIR_TAG = 2 << 3 | LENGTH_DELIMITED  # Input.pair

MessageT = TypeVar("MessageT", bound=Message)
RequestT = TypeVar("RequestT", pb.EncodeRequest, pb.TokenizeRequest)
# Each input, or the error of one that cannot be parsed, which is reported by itself with `fail_each_alone`.
Inputs = Sequence[pb.Input | RequestError]


@dataclass(slots=True)
class StreamRequest:
    """An EncodeStreamRequest; if only its envelope could be parsed, `error` says why."""

    request_id: int
    accepts_whole: bool
    accepts_grouped: bool
    error: RequestError | None = None
    request: pb.EncodeRequest | None = None
    inputs: Inputs = ()

    def take(self) -> tuple[pb.EncodeRequest, Inputs]:
        """The request and its inputs, to which this object keeps no reference. Raises `error` if set."""
        if self.error is not None:
            raise self.error
        assert self.request is not None
        taken = self.request, self.inputs
        self.request, self.inputs = None, ()
        return taken


def parse(kind: type[MessageT], data: bytes | memoryview) -> MessageT:
    message = kind()
    try:
        message.ParseFromString(data)  # type: ignore[arg-type]  # any buffer will do
    except DecodeError:
        raise malformed(kind, len(data)) from None
    return message


def malformed(kind: type[Message], num_bytes: int) -> RequestError:
    return errors.malformed(f"these {num_bytes} bytes are not a valid {kind.DESCRIPTOR.full_name}")


async def read_request(
    kind: type[RequestT], data: bytes | memoryview, max_inputs: int
) -> tuple[RequestT, Inputs]:
    """The request and its inputs; the `inputs` field of a large request is left empty.

    Raises a `RequestError`. Only with `fail_each_alone` are there errors among the inputs.
    """
    if len(data) <= LARGE_REQUEST_BYTES:
        try:
            request = parse(kind, data)
        except RequestError:
            request, inputs = await walk_request(kind, data, max_inputs)
            if not fails_each_alone(request):
                raise
            return request, inputs
        if len(request.inputs) > max_inputs:
            raise errors.too_many_inputs(max_inputs)
        return request, request.inputs
    request, inputs = await walk_request(kind, data, max_inputs)
    if not fails_each_alone(request):
        for one in inputs:
            if isinstance(one, RequestError):
                raise one
    return request, inputs


def fails_each_alone(request: pb.EncodeRequest | pb.TokenizeRequest) -> bool:
    return isinstance(request, pb.EncodeRequest) and request.fail_each_alone


async def walk_request(
    kind: type[RequestT], data: bytes | memoryview, max_inputs: int
) -> tuple[RequestT, Inputs]:
    message = memoryview(data)
    inputs: list[pb.Input | RequestError] = []
    rest = bytearray()
    async for tag, begin, content, end in yield_between(fields(kind, message)):
        if tag != INPUTS_TAG:
            add_part(kind, rest, message[begin:end])
            continue
        if len(inputs) == max_inputs:
            raise errors.too_many_inputs(max_inputs)
        inputs.append(read_input(message[content:end], f"inputs[{len(inputs)}]"))
    return parse(kind, bytes(rest)), inputs


async def read_stream_request(data: bytes, max_inputs: int) -> StreamRequest:
    """Parses one message of a stream. Raises a `RequestError` only where the request's id cannot be read."""
    kind = pb.EncodeStreamRequest
    if len(data) <= LARGE_REQUEST_BYTES:
        try:
            message = parse(kind, data)
        except RequestError:
            pass  # the code below finds out what is wrong with it
        else:
            asked = stream_request(message)
            if len(message.request.inputs) > max_inputs:
                asked.error = errors.too_many_inputs(max_inputs)
            else:
                asked.request, asked.inputs = message.request, message.request.inputs
            return asked
    envelope = bytearray()
    contents: list[memoryview] = []
    error = None
    has_id = False
    whole = memoryview(data)
    try:
        async for tag, begin, content, end in yield_between(fields(kind, whole)):
            if tag != REQUEST_TAG:
                has_id |= tag == ID_TAG
                add_part(kind, envelope, whole[begin:end])
            elif len(contents) == MAX_PARTS:
                raise errors.malformed(f"the request is encoded in more than {MAX_PARTS} parts")
            else:
                contents.append(whole[content:end])
    except RequestError as found:
        if not has_id:
            raise
        error = found
    asked = stream_request(parse(kind, bytes(envelope)))
    try:
        if error is not None:
            raise error
        # The parts of a message field, concatenated, are the serialized message.
        body = contents[0] if len(contents) == 1 else b"".join(contents)
        asked.request, asked.inputs = await read_request(pb.EncodeRequest, body, max_inputs)
    except RequestError as found:
        asked.error = found.with_traceback(None)  # the traceback would keep the bytes alive
    return asked


def stream_request(envelope: pb.EncodeStreamRequest) -> StreamRequest:
    return StreamRequest(envelope.request_id, envelope.accepts_whole, envelope.accepts_grouped)


def add_part(kind: type[Message], parts: bytearray, part: memoryview) -> None:
    """Appends a field other than the inputs. Raises a `RequestError` when these have too many bytes."""
    if len(parts) + len(part) > MAX_PART_BYTES:
        raise errors.malformed(
            f"the fields of a {kind.DESCRIPTOR.full_name} other than inputs exceed {MAX_PART_BYTES} bytes"
        )
    parts += part


def read_input(content: memoryview, field: str) -> pb.Input | RequestError:
    try:
        if len(content) > MAX_PART_BYTES and not is_text(content):
            tag = next(fields(pb.Input, content))[0]
            known = pb.Input.DESCRIPTOR.fields_by_number.get(tag >> 3)
            return errors.invalid_argument(
                f"{field}.{known.name if known is not None else 'unknown'}",
                f"{len(content)} bytes exceed {MAX_PART_BYTES}, the limit for an input other than text; shorten it",
                reason="INPUT_TOO_LARGE",
            )
        return parse(pb.Input, content)
    except RequestError as error:
        return errors.malformed(f"{field}: {error.message}")


def is_text(content: memoryview) -> bool:
    """Whether an input is one text, or one pair of a few fields, and nothing else."""
    tag, _, begin, end = next(fields(pb.Input, content))
    if end < len(content):
        return False
    if tag == PAIR_TAG:
        some = list(islice(fields(pb.TextPair, content[begin:end]), MAX_PARTS + 1))
        return len(some) <= MAX_PARTS
    return tag == TEXT_TAG


# ----------------------------------------------------------------------------------- the walk


def fields(kind: type[Message], message: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """The tag of each field, and the offsets of its start, content and end. Raises a `RequestError`."""
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
                case _:  # a group, which the contract does not use
                    raise malformed(kind, size)
            if at > size:
                raise malformed(kind, size)
            yield tag, begin, content, at
    except IndexError:
        raise malformed(kind, size) from None


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """The base-128 number at this offset, least significant group first, and the offset of its end.

    Raises IndexError if it is incomplete or too long.
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError

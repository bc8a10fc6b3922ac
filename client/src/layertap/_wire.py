"""Parses replies without copying the data of large tensors, which are slices of the message.

With protobuf, a parsed `bytes` field is a copy, and every access to it from Python is another. So in large
messages, the fields that contain tensor data are parsed here, following the protobuf encoding. All other
fields are merged by protobuf in their order, which is equivalent to parsing: fields may be in any order,
split, repeated or unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message

from layertap.errors import InternalError
from layertap.v1 import encoder_pb2 as pb

Buffer: TypeAlias = bytes | memoryview
_Parsed = TypeVar("_Parsed", bound=Message)

# Smaller messages are parsed by protobuf: parsing the fields in Python takes about 20 µs, more than copying
# this much data.
SLICED_BYTES = 64 << 10

_LENGTH_DELIMITED = 2
_DATA = 15 << 3 | _LENGTH_DELIMITED  # Tensor.data and TensorChunk.data
_RESULTS = 1 << 3 | _LENGTH_DELIMITED  # EncodeResponse.results
_CHUNK = 3 << 3 | _LENGTH_DELIMITED  # EncodeStreamResponse.chunk
# The tensors of an EncodeResult by their tags, in the order of their fields. `embeddings` may be several.
_TENSORS = {
    number << 3 | _LENGTH_DELIMITED: name
    for number, name in (
        (4, "last_hidden_state"),
        (5, "pooler_output"),
        (6, "hidden_states"),
        (7, "attentions"),
        (8, "embeddings"),
        (9, "logits"),
        (10, "logit_ids"),
        (11, "sparse_ids"),
        (12, "sparse_weights"),
        (14, "contacts"),
    )
}


def parse_reply(message: bytes) -> tuple[pb.EncodeResponse, list[list[Buffer]]]:
    """A unary reply and, for each result, the data of its tensors in field order.

    The data may be slices of `message`; the parsed tensors then have no data.

    Raises:
        InternalError: `message` is not an EncodeResponse.
    """
    if len(message) >= SLICED_BYTES:
        try:
            return _sliced_reply(memoryview(message))
        except _NotPlainError:
            pass
    reply = _parsed(pb.EncodeResponse, message)
    return reply, [[tensor.data for tensor in tensors(result)] for result in reply.results]


def parse_frame(message: bytes) -> tuple[pb.EncodeStreamResponse, Buffer]:
    """A frame and, if it is a chunk, its data, which may be a slice of `message`.

    Raises:
        InternalError: `message` is not an EncodeStreamResponse.
    """
    if len(message) >= SLICED_BYTES:
        try:
            return _sliced_frame(memoryview(message))
        except _NotPlainError:
            pass
    frame = _parsed(pb.EncodeStreamResponse, message)
    return frame, frame.chunk.data


def tensors(result: pb.EncodeResult) -> list[pb.Tensor]:
    """The tensors of a result in field order; `TensorChunk.tensor` is an index into this list."""
    found: list[pb.Tensor] = []
    for name in _TENSORS.values():
        if name == "embeddings":
            found += result.embeddings
        elif result.HasField(name):
            found.append(getattr(result, name))
    return found


def _parsed(kind: type[_Parsed], message: bytes) -> _Parsed:
    try:
        return kind.FromString(message)
    except DecodeError as error:
        text = f"the server sent {len(message)} bytes that are not a valid {kind.DESCRIPTOR.full_name}"
        raise InternalError(text) from error


# ------------------------------------------------------- parsing without copies


class _NotPlainError(Exception):
    """The message has something that is left to protobuf to parse or to reject."""


def _sliced_reply(message: memoryview) -> tuple[pb.EncodeResponse, list[list[Buffer]]]:
    reply = pb.EncodeResponse()
    buffers = []
    for tag, field, content in _fields(message):
        if tag == _RESULTS:
            buffers.append(_merge_result(reply.results.add(), content))
        else:
            _merge(reply, field)
    return reply, buffers


def _merge_result(result: pb.EncodeResult, content: memoryview) -> list[Buffer]:
    rest: list[Buffer] = []
    found: dict[str, list[Buffer]] = {name: [] for name in _TENSORS.values()}
    for tag, field, part in _fields(content):
        name = _TENSORS.get(tag)
        if name is None:
            rest.append(field)
        elif name == "embeddings":
            found[name].append(_merge_without_data(result.embeddings.add(), part, b""))
        else:  # if the field is there several times, protobuf merges them
            tensor = getattr(result, name)
            tensor.SetInParent()
            found[name] = [_merge_without_data(tensor, part, *found[name] or [b""])]
    _merge(result, *rest)
    return [data for buffers in found.values() for data in buffers]


def _sliced_frame(message: memoryview) -> tuple[pb.EncodeStreamResponse, Buffer]:
    frame = pb.EncodeStreamResponse()
    data: Buffer = b""
    for tag, field, content in _fields(message):
        if tag == _CHUNK:
            if not frame.HasField("chunk"):  # in a oneof, the last member wins, and it starts empty
                data = b""
                frame.chunk.SetInParent()
            data = _merge_without_data(frame.chunk, content, data)
        else:
            _merge(frame, field)
    return frame, data if frame.HasField("chunk") else b""


def _merge_without_data(message: Message, content: memoryview, data: Buffer) -> Buffer:
    """Merges all fields except the tensor data. Returns the last data in `content`; without any, `data`."""
    rest: list[Buffer] = []
    for tag, field, part in _fields(content):
        if tag == _DATA:
            data = part
        else:
            rest.append(field)
    _merge(message, *rest)
    return data


def _merge(message: Message, *fields: Buffer) -> None:
    try:
        message.MergeFromString(b"".join(fields))
    except DecodeError:
        raise _NotPlainError from None


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """The tag of each field, the whole field, and its content."""
    at = 0
    while at < len(message):
        begin = at
        tag, content = _varint(message, at)
        match tag & 7:
            case 0:  # a varint
                _, at = _varint(message, content)
            case 1:  # 64 bits
                at = content + 8
            case 2:  # length-delimited
                size, content = _varint(message, content)
                at = content + size
            case 5:  # 32 bits
                at = content + 4
            case _:  # a group
                raise _NotPlainError
        if at > len(message):
            raise _NotPlainError
        yield tag, message[begin:at], message[content:at]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The varint (base 128, least significant group first) at this position, and the position after it."""
    value = 0
    for shift, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise _NotPlainError

"""Serializes tensors without protobuf's copies: a small header, then the tensor's own buffer.

A protobuf `bytes` field is copied when it is set and again when it is serialized. Here protobuf serializes
only the small fields, and the tensors' buffers are placed after them. The bytes on the wire are the same: a
length-delimited field is a tag, a length and the data, and for this purpose `data` has the highest field
number of its message in the contract. Source of the format: the protobuf encoding reference,
"Length-delimited records".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import cast

from google.rpc import status_pb2

from layertap.v1 import encoder_pb2 as pb
from layertap_server.plan import Outputs, TensorData, TensorSpec

Buffer = bytes | memoryview

LENGTH_DELIMITED = 2
DATA_TAG = bytes([15 << 3 | LENGTH_DELIMITED])  # Tensor.data and TensorChunk.data
RESULTS_TAG = bytes([1 << 3 | LENGTH_DELIMITED])  # EncodeResponse.results and TokenizeResponse.results
TIMING_TAG = bytes([2 << 3 | LENGTH_DELIMITED])  # EncodeResponse.timing
WHOLE_TAG = bytes([5 << 3 | LENGTH_DELIMITED])  # EncodeStreamResponse.whole
GROUPED_TAG = bytes([6 << 3 | LENGTH_DELIMITED])  # EncodeStreamResponse.grouped
FRAMES_TAG = bytes([1 << 3 | LENGTH_DELIMITED])  # FrameGroup.frames
CHUNK_TAG = bytes([3 << 3 | LENGTH_DELIMITED])  # EncodeStreamResponse.chunk

# An answer up to this size is sent as one frame if the client accepts that (`accepts_whole`): one frame costs
# less than three. A group of frames takes no further frame once it is larger than this.
WHOLE_BYTES = 1 << 16

# The most bytes that a Timing can take: six varints with their tags, its own tag and its length.
MAX_TIMING_BYTES = 2 + 4 * 11 + 2 * 6


@dataclass(slots=True)
class InputResult:
    """The answer to one input: `head` holds all but the tensors."""

    head: pb.EncodeResult
    specs: Sequence[TensorSpec]
    outputs: Outputs


@lru_cache(maxsize=4096)
def varint(value: int) -> bytes:
    """Base-128, least significant group first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def varint_size(value: int) -> int:
    return max(1, (value.bit_length() + 6) // 7)


def tensor_header(spec: TensorSpec, data: TensorData | None) -> pb.Tensor:
    """The Tensor message without its data. If `data` is None, all scales are 1: the size is the same."""
    header = pb.Tensor(dtype=cast("pb.DataType", spec.dtype.value), shape=spec.shape)
    if spec.num_scales:
        scales = data.scales if data is not None else None
        header.scale.extend([1.0] * spec.num_scales if scales is None else scales.tolist())
    return header


def as_buffer(data: TensorData) -> memoryview:
    """The tensor's bytes, as a view without a copy."""
    if not data.data.size:  # which memoryview cannot cast
        return memoryview(b"")
    return memoryview(cast("Buffer", data.data.reshape(-1).view("u1"))).cast("B")


def tensor_prefix(spec: TensorSpec, data: TensorData | None) -> bytes:
    """The part of a serialized Tensor field that precedes its data."""
    if spec.num_scales and data is not None:
        return make_tensor_prefix(spec, data)
    return usual_tensor_prefix(spec)


def make_tensor_prefix(spec: TensorSpec, data: TensorData | None) -> bytes:
    before_data = tensor_header(spec, data).SerializeToString()
    if spec.nbytes:  # protobuf leaves out empty bytes
        before_data += DATA_TAG + varint(spec.nbytes)
    tag = bytes([spec.field << 3 | LENGTH_DELIMITED])
    return tag + varint(len(before_data) + spec.nbytes) + before_data


@lru_cache(maxsize=4096)
def usual_tensor_prefix(spec: TensorSpec) -> bytes:
    """The prefix without scales, or with scales of 1. Cached: it depends on the spec alone."""
    return make_tensor_prefix(spec, None)


def response_parts(results: Iterable[InputResult], timing: pb.Timing) -> Iterator[list[Buffer]]:
    """The parts of a serialized EncodeResponse, one list for each result and one for the Timing."""
    for result in results:
        head = result.head.SerializeToString()
        size = len(head)
        tensors: list[Buffer] = []
        for spec, data in zip(result.specs, result.outputs, strict=True):
            prefix = tensor_prefix(spec, data)
            tensors += (prefix, data.data.data)
            size += len(prefix) + spec.nbytes
        yield [RESULTS_TAG, varint(size), head, *tensors]
    last = timing.SerializeToString()
    yield [TIMING_TAG, varint(len(last)), last]


def message_parts(results: Iterable[InputResult], timing: pb.Timing) -> Iterator[Buffer]:
    """As `response_parts`, in one sequence."""
    return chain.from_iterable(response_parts(results, timing))


def result_size(head: pb.EncodeResult, specs: Sequence[TensorSpec]) -> int:
    """The bytes that this result will take in an EncodeResponse; known before it is computed. Of a tensor
    whose shape is only bound, the most."""
    size = head.ByteSize()
    for spec in specs:
        size += len(tensor_prefix(spec, None)) + spec.nbytes
    return len(RESULTS_TAG) + varint_size(size) + size


def header_frame(request_id: int, input_index: int, result: InputResult) -> bytes:
    """The EncodeStreamResponse that begins an input's result."""
    head = pb.EncodeResult()
    head.CopyFrom(result.head)
    for spec, data in zip(result.specs, result.outputs, strict=True):
        header = tensor_header(spec, data)
        name = spec.field.name.lower()
        if name == "embeddings":
            head.embeddings.append(header)
        else:
            getattr(head, name).CopyFrom(header)
    return pb.EncodeStreamResponse(
        request_id=request_id, header=pb.ResultHeader(input_index=input_index, result=head)
    ).SerializeToString()


def end_frame(
    request_id: int, status: status_pb2.Status | None = None, timing: pb.Timing | None = None
) -> bytes:
    """The last frame of a request; without `status` the request succeeded."""
    end = pb.RequestEnd(status=status or status_pb2.Status(), timing=timing)
    return pb.EncodeStreamResponse(request_id=request_id, end=end).SerializeToString()


def input_frames(
    request_id: int, input_index: int, result: InputResult, frame_bytes: Callable[[], int]
) -> Iterator[bytes]:
    """The frames of one input's result: a header, then its tensors in chunks.

    `frame_bytes` is called for each chunk, and gives the most tensor bytes of that chunk.
    """
    yield header_frame(request_id, input_index, result)
    envelope = pb.EncodeStreamResponse(request_id=request_id).SerializeToString()
    for number, data in enumerate(result.outputs):
        buffer = as_buffer(data)
        offset = 0
        while offset < len(buffer):
            piece = buffer[offset : offset + frame_bytes()]
            chunk = pb.TensorChunk(input_index=input_index, tensor=number, offset=offset).SerializeToString()
            before_data = chunk + DATA_TAG + varint(len(piece))
            size = varint(len(before_data) + len(piece))
            yield b"".join((envelope, CHUNK_TAG, size, before_data, piece))
            offset += len(piece)


def result_frames(
    request_id: int, results: Iterable[InputResult], frame_bytes: Callable[[], int]
) -> Iterator[bytes]:
    """The frames of a request that succeeded, without its end frame."""
    for index, result in enumerate(results):
        yield from input_frames(request_id, index, result, frame_bytes)


def grouped_frame(frames: Sequence[bytes]) -> bytes:
    """Several frames in one message."""
    parts = [part for frame in frames for part in (FRAMES_TAG, varint(len(frame)), frame)]
    return b"".join((GROUPED_TAG, varint(sum(map(len, parts))), *parts))


def whole_frame(request_id: int, results: Iterable[InputResult], timing: pb.Timing) -> Iterator[bytes]:
    """The one frame of a small answer that is sent whole."""
    envelope = pb.EncodeStreamResponse(request_id=request_id).SerializeToString()
    message = b"".join(message_parts(results, timing))
    yield b"".join((envelope, WHOLE_TAG, varint(len(message)), message))

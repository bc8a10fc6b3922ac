"""Slicing tensors off a message gives what protobuf's own parser gives, whoever wrote the message."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, example, given, settings

from drawings import drawings
from layertap import InternalError, _replies, _wire
from layertap.v1 import encoder_pb2 as pb

LENGTH_DELIMITED = 2
UNKNOWN = [
    b"\xa0\x06\x07",  # field 100, a varint
    b"\xa1\x06" + bytes(8),
    b"\xa2\x06\x03new",
    b"\xa5\x06" + bytes(4),
    b"\xa3\x06\x08\x01\xa4\x06",  # a group
]
# Sub-messages whose fields are shuffled too, by message and field number.
NESTED = {
    (pb.EncodeResponse.DESCRIPTOR.name, 1): pb.EncodeResult.DESCRIPTOR.name,
    **{(pb.EncodeResult.DESCRIPTOR.name, number): pb.Tensor.DESCRIPTOR.name for number in range(4, 9)},
    (pb.EncodeStreamResponse.DESCRIPTOR.name, 3): pb.TensorChunk.DESCRIPTOR.name,
}


@pytest.fixture(autouse=True)
def sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the message."""
    monkeypatch.setattr(_wire, "SLICED_BYTES", 0)


def varint(value: int, padding: int = 0) -> bytes:
    """With padding it is longer than it need be, which is legal."""
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)] + [0] * padding
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def scrambled(draw: st.DrawFn, name: str, message: bytes) -> bytes:
    """The fields in any order, some more than once, some unknown, lengths in more bytes than needed."""
    fields = []
    for tag, field, content in _wire._fields(memoryview(message)):
        nested = NESTED.get((name, tag >> 3))
        for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
            if nested is not None:
                inner = scrambled(draw, nested, bytes(content))
                fields.append(
                    varint(tag, draw(st.integers(0, 1))) + varint(len(inner), draw(st.integers(0, 2))) + inner
                )
            else:
                fields.append(bytes(field))
    fields += draw(st.lists(st.sampled_from(UNKNOWN), max_size=1))
    return b"".join(draw(st.permutations(fields)))


tensors = st.builds(
    pb.Tensor,
    dtype=st.integers(0, 5),
    shape=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    scale=st.lists(st.floats(width=32, allow_nan=False), max_size=2),
    data=st.binary(max_size=300),
)
results = st.builds(
    pb.EncodeResult,
    token_count=st.integers(0, 600),
    tokens=st.none() | st.builds(pb.Tokens, ids=st.lists(st.integers(0, 2**32 - 1), max_size=3)),
    last_hidden_state=st.none() | tensors,
    pooler_output=st.none() | tensors,
    hidden_states=st.none() | tensors,
    attentions=st.none() | tensors,
    embeddings=st.lists(tensors, max_size=3),
)
replies = st.builds(
    pb.EncodeResponse,
    results=st.lists(results, max_size=3),
    timing=st.builds(pb.Timing, total_ns=st.integers(0, 99)),
)
chunks = st.builds(
    pb.TensorChunk,
    input_index=st.integers(0, 9),
    offset=st.integers(0, 2**64 - 1),
    data=st.binary(max_size=300),
)
frames = st.one_of(
    st.builds(pb.EncodeStreamResponse, request_id=st.integers(0, 2**64 - 1), chunk=chunks),
    st.builds(
        pb.EncodeStreamResponse,
        request_id=st.integers(0, 9),
        header=st.builds(pb.ResultHeader, result=results),
    ),
    st.builds(pb.EncodeStreamResponse, request_id=st.integers(0, 9), end=st.builds(pb.RequestEnd)),
)


@st.composite
def foreign(
    draw: st.DrawFn, messages: st.SearchStrategy[pb.EncodeResponse | pb.EncodeStreamResponse]
) -> bytes:
    message = draw(messages)
    written = scrambled(draw, message.DESCRIPTOR.name, message.SerializeToString())
    if message.DESCRIPTOR.name == pb.EncodeStreamResponse.DESCRIPTOR.name and draw(st.booleans()):
        # Another kind of frame before it or after it: the last one counts.
        other = scrambled(draw, message.DESCRIPTOR.name, draw(messages).SerializeToString())
        written = draw(st.permutations([written, other, written]))[0] + other
    return written


def assert_same_tensors(result: pb.EncodeResult, sliced: pb.EncodeResult, data: list[_wire.Buffer]) -> None:
    expected = _wire.tensors(result)
    assert [bytes(one) for one in data] == [tensor.data for tensor in expected]
    for tensor in (*expected, *_wire.tensors(sliced)):
        tensor.ClearField("data")
    assert result == sliced


@settings(
    max_examples=drawings(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(foreign(replies))
def test_a_reply(message: bytes) -> None:
    expected = pb.EncodeResponse.FromString(message)
    reply, buffers = _wire.parse_reply(message)
    assert reply.timing == expected.timing
    assert len(reply.results) == len(expected.results)
    for one, other, data in zip(expected.results, reply.results, buffers, strict=True):
        assert_same_tensors(one, other, data)


@settings(
    max_examples=drawings(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(foreign(frames))
def test_a_frame(message: bytes) -> None:
    expected = pb.EncodeStreamResponse.FromString(message)
    frame, data = _wire.parse_frame(message)
    assert bytes(data) == expected.chunk.data
    for one in (frame, expected):
        if one.HasField("chunk"):
            one.chunk.ClearField("data")
    assert frame == expected


@settings(
    max_examples=drawings(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=40), replies.map(pb.EncodeResponse.SerializeToString), st.integers(0, 300))
@example(b"\x0a", b"", 0)
@example(b"\xff" * 20, b"", 0)
@example(b"\x0a\x02\x22\x05", b"", 0)
def test_garbage_is_refused_where_protobuf_refuses_it(garbage: bytes, message: bytes, cut: int) -> None:
    written = message[:cut] + garbage
    try:
        pb.EncodeResponse.FromString(written)
    except DecodeError:
        with pytest.raises(InternalError, match="are not a valid layertap"):
            _wire.parse_reply(written)
    else:
        _wire.parse_reply(written)


def test_data_is_a_slice_of_the_message() -> None:
    values = np.arange(1000, dtype=np.float32)
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[1000], data=values.tobytes())
    message = pb.EncodeResponse(results=[pb.EncodeResult(pooler_output=tensor)]).SerializeToString()
    _, [[data]] = _wire.parse_reply(message)
    assert np.shares_memory(np.frombuffer(data, np.uint8), np.frombuffer(message, np.uint8))
    chunk = pb.EncodeStreamResponse(chunk=pb.TensorChunk(data=values.tobytes())).SerializeToString()
    _, piece = _wire.parse_frame(chunk)
    assert np.shares_memory(np.frombuffer(piece, np.uint8), np.frombuffer(chunk, np.uint8))


@pytest.mark.parametrize("offset", range(4))
def test_arrays_are_aligned_wherever_the_data_lies(offset: int) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=values.shape)
    buffer = memoryview(bytes(offset) + values.tobytes())[offset:]
    array = _replies.decode_tensor(tensor, buffer)
    assert array.flags.aligned
    np.testing.assert_array_equal(array, values)
    is_view = np.shares_memory(array, np.frombuffer(buffer, np.uint8))
    assert is_view == (np.frombuffer(buffer, np.uint8).ctypes.data % 4 == 0)

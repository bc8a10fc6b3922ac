"""Large requests are read field by field as protobuf reads them at once, and in turns."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from typing import Any

import grpc
import hypothesis.strategies as st
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings

from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.api import parsing as requests
from layertap_server.api.parsing import MAX_PART_BYTES, read_request, read_stream_request
from layertap_server.api.serialization import varint
from layertap_server.errors import RequestError
from server.support import CLS, SEP, WAIT_S, refusal_of, texts, tokens

MAX_INPUTS = 2000

words = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=4)
numbers = st.lists(st.integers(0, 2**32 - 1), max_size=4)
inputs = st.one_of(
    st.builds(pb.Input, text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
    st.builds(pb.Input, token_ids=st.builds(pb.TokenIds, ids=numbers, type_ids=numbers)),
    st.builds(pb.Input, words=st.builds(pb.Words, words=words)),
    st.just(pb.Input()),
)
encode_requests = st.builds(
    pb.EncodeRequest,
    model=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    inputs=st.lists(inputs, max_size=6),
    outputs=st.builds(pb.OutputSelection, tokens=st.booleans()),
    priority=st.integers(0, 3),
)


@pytest.fixture
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "LARGE_REQUEST_BYTES", -1)


def together(request: Any, inputs: Any) -> pb.EncodeRequest:
    whole = pb.EncodeRequest()
    whole.CopyFrom(request)
    if not whole.inputs:
        whole.inputs.extend(inputs)
    return whole


def nested(content: bytes, *fields: int) -> bytes:
    """A message with the first of the fields, which holds the second, and so on to the content."""
    for number in reversed(fields):
        content = bytes([number << 3 | 2]) + varint(len(content)) + content
    return content


@pytest.mark.usefixtures("all_are_large")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(encode_requests, st.integers(0, 2**64 - 1), st.booleans())
def test_read_as_protobuf_reads_it(request: pb.EncodeRequest, request_id: int, whole: bool) -> None:
    data = request.SerializeToString()
    assert together(*asyncio.run(read_request(pb.EncodeRequest, data, MAX_INPUTS))) == request
    streamed = pb.EncodeStreamRequest(
        request_id=request_id, request=request, accepts_whole=whole, accepts_grouped=not whole
    )
    # In two parts, which protobuf merges, and with an unknown field.
    parts = streamed.SerializeToString() + b"\xfa\x01\x01x" + streamed.SerializeToString()
    read = asyncio.run(read_stream_request(parts, MAX_INPUTS))
    expected = pb.EncodeStreamRequest.FromString(parts)
    assert together(read.request, read.inputs) == expected.request
    assert (read.request_id, read.accepts_whole, read.accepts_grouped) == (request_id, whole, not whole)


@pytest.mark.usefixtures("all_are_large")
def test_what_is_no_message_is_refused() -> None:
    good = texts("some", "words").SerializeToString()
    chance = random.Random(1)
    bad = [good[:end] for end in range(1, len(good))]
    bad += [chance.randbytes(chance.randint(1, 40)) for _ in range(300)]
    bad = [data for data in bad if not is_message(data)]
    assert len(bad) > 100
    for data in bad:
        with pytest.raises(RequestError, match=r"are not a valid layertap\.v1\.EncodeRequest"):
            asyncio.run(read_request(pb.EncodeRequest, data, MAX_INPUTS))


def is_message(data: bytes) -> bool:
    try:
        pb.EncodeRequest.FromString(data)
    except DecodeError:
        return False
    return True


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (pb.EncodeRequest(inputs=[pb.Input()] * 500_000), "TOO_MANY_INPUTS"),
        (tokens([CLS, *[5] * MAX_PART_BYTES, SEP]), "INPUT_TOO_LARGE"),
        (pb.EncodeRequest(inputs=[pb.Input(words=pb.Words(words=["a"] * 50_000))]), "INPUT_TOO_LARGE"),
        (
            texts("a", outputs=pb.OutputSelection(embeddings=[pb.EmbeddingSpec()] * 50_000)),
            "MALFORMED_REQUEST",
        ),
        (texts("a", outputs=pb.OutputSelection(embeddings=[pb.EmbeddingSpec()] * 300)), "TOO_MANY"),
        (
            texts(
                "a",
                outputs=pb.OutputSelection(
                    embeddings=[pb.EmbeddingSpec(spans=[pb.Span(start=0, end=1)] * 300)] * 2
                ),
            ),
            "TOO_MANY",
        ),
        (
            texts(*[""] * 300, outputs=pb.OutputSelection(embeddings=[pb.EmbeddingSpec(dimensions=1)] * 250)),
            "TOO_MANY",
        ),
        (
            texts("a", outputs=pb.OutputSelection(embeddings=[pb.EmbeddingSpec(layers=[0] * 65_000)] * 2)),
            "MALFORMED_REQUEST",
        ),
    ],
    ids=["inputs", "ids", "words", "other fields", "embeddings", "spans", "vectors", "layers"],
)
def test_what_would_take_the_loop_for_long_is_refused(
    stub: EncoderServiceStub, asked: pb.EncodeRequest, reason: str
) -> None:
    refusal = refusal_of(stub.Encode, asked, timeout=WAIT_S)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


MILLIONS = 2 * 2**20 - 100  # of two bytes: as many as fit into the largest message
MANY_FIELDS = {
    "unknown": (pb.EncodeRequest, b"\x40\x01" * MILLIONS),
    "unknown, of Tokenize": (pb.TokenizeRequest, b"\x40\x01" * MILLIONS),
    "empty inputs": (pb.EncodeRequest, b"\x12\x00" * MILLIONS),
    "empty inputs of Tokenize": (pb.TokenizeRequest, b"\x12\x00" * MILLIONS),
    "empty outputs": (pb.EncodeRequest, b"\x1a\x00" * MILLIONS),
    "layers, packed": (
        pb.EncodeRequest,
        texts(
            "a", outputs=pb.OutputSelection(hidden_states={"layers": [1] * 2 * MILLIONS})
        ).SerializeToString(),
    ),
    "layers, each a field": (pb.EncodeRequest, nested(b"\x08\x01" * MILLIONS, 3, 3)),
    "unknown, in an input": (pb.EncodeRequest, nested(b"\x40\x01" * MILLIONS, 2)),
    "texts of an input": (pb.EncodeRequest, nested(b"\x0a\x00" * MILLIONS, 2)),
    "texts of a pair": (pb.EncodeRequest, nested(b"\x0a\x00" * MILLIONS, 2, 2)),
    "words": (pb.EncodeRequest, nested(b"\x0a\x00" * MILLIONS, 2, 4)),
    "ids": (pb.EncodeRequest, nested(b"\x08\x01" * MILLIONS, 2, 3)),
    "ids of a stream": (pb.EncodeStreamRequest, b"\x08\x01" * MILLIONS),
    "requests of a stream": (pb.EncodeStreamRequest, b"\x08\x01" + b"\x12\x00" * MILLIONS),
    "unknown, in one of a stream": (pb.EncodeStreamRequest, nested(b"\x40\x01" * MILLIONS, 2)),
    "empty inputs in one of a stream": (pb.EncodeStreamRequest, nested(b"\x12\x00" * MILLIONS, 2)),
}


@pytest.mark.parametrize("name", MANY_FIELDS)
def test_a_message_of_millions_of_fields_takes_no_memory_for_each(name: str) -> None:
    """It is refused on the way, once there are more than may be."""
    kind, data = MANY_FIELDS[name]
    tracemalloc.start()
    try:
        if kind is pb.EncodeStreamRequest:
            error = asyncio.run(read_stream_request(data, MAX_INPUTS)).error
        else:
            with pytest.raises(RequestError) as caught:
                asyncio.run(read_request(kind, data, MAX_INPUTS))
            error = caught.value
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error is not None
    assert error.reason in ("MALFORMED_REQUEST", "TOO_MANY_INPUTS", "INPUT_TOO_LARGE")
    assert peak < len(data) / 4


def test_a_text_of_any_length_is_read() -> None:
    asked = texts("x" * 3_000_000, "y")
    assert together(*asyncio.run(read_request(pb.EncodeRequest, asked.SerializeToString(), 2))) == asked

"""Messages and frames written by hand are, byte for byte, what stock protobuf would write."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, cycle

import hypothesis.strategies as st
import numpy as np
import pytest
from google.rpc import status_pb2
from hypothesis import given, settings

from drawings import drawings
from layertap.v1 import encoder_pb2 as pb
from layertap_server.api import serialization as wire
from layertap_server.enums import DType, OutputField
from layertap_server.plan import TensorData, TensorSpec
from server.support import assemble

NUMPY = {
    DType.FLOAT32: np.float32,
    DType.FLOAT16: np.float16,
    DType.BFLOAT16: np.uint16,  # its bits
    DType.INT8: np.int8,
    DType.UINT8: np.uint8,
    DType.INT32: np.int32,
}
MAX_UINT64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Case:
    """A reply, as the service hands it over and as stock protobuf builds it."""

    results: list[wire.InputResult]
    timing: pb.Timing
    expected: pb.EncodeResponse


def make_tensor(spec: TensorSpec, seed: int) -> TensorData:
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, spec.nbytes, np.uint8).view(NUMPY[spec.dtype])
    scales = generator.random(spec.num_scales, np.float32) if spec.num_scales else None
    return TensorData(raw.reshape(spec.shape), scales)


def stock(spec: TensorSpec, data: TensorData) -> pb.Tensor:
    return pb.Tensor(
        dtype=spec.dtype.value,
        shape=spec.shape,
        scale=None if data.scales is None else data.scales.tolist(),
        data=data.data.tobytes(),
    )


def build(heads: list[pb.EncodeResult], specs: list[list[TensorSpec]], timing: pb.Timing) -> Case:
    results, expected = [], pb.EncodeResponse(timing=timing)
    for number, (head, own) in enumerate(zip(heads, specs, strict=True)):
        data = [make_tensor(spec, 100 * number + slot) for slot, spec in enumerate(own)]
        results.append(wire.InputResult(head, own, data))
        result = expected.results.add()
        result.CopyFrom(head)
        for spec, one in zip(own, data, strict=True):
            if spec.field is OutputField.EMBEDDINGS:
                result.embeddings.append(stock(spec, one))
            else:
                getattr(result, spec.field.name.lower()).CopyFrom(stock(spec, one))
    return Case(results, timing, expected)


def written_message(results: list[wire.InputResult], timing: pb.Timing) -> bytes:
    return b"".join(chain.from_iterable(wire.response_parts(results, timing)))


sizes = st.integers(1, 6)
shapes = {
    OutputField.LAST_HIDDEN_STATE: st.tuples(sizes, sizes),
    OutputField.POOLER_OUTPUT: st.tuples(sizes),
    OutputField.HIDDEN_STATES: st.tuples(sizes, sizes, sizes),
    OutputField.ATTENTIONS: st.tuples(sizes, sizes, sizes, sizes),
}
shapes_after_embeddings = {
    OutputField.LOGITS: st.tuples(sizes, sizes),
    OutputField.LOGIT_IDS: st.tuples(sizes, sizes),
    OutputField.SPARSE_IDS: st.tuples(st.integers(0, 6)),
    OutputField.SPARSE_WEIGHTS: st.tuples(st.integers(0, 6)),
    OutputField.CONTACTS: st.tuples(sizes, sizes),
}
IDS = (OutputField.LOGIT_IDS, OutputField.SPARSE_IDS)
float_types = st.sampled_from([DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])


@st.composite
def embeddings(draw: st.DrawFn) -> TensorSpec:
    dtype = draw(st.sampled_from(DType))
    shape = draw(st.tuples(st.integers(1, 300)) | st.tuples(sizes, sizes))
    num_vectors = math.prod(shape[:-1])
    return TensorSpec(OutputField.EMBEDDINGS, dtype, shape, num_vectors if dtype is DType.INT8 else 0)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokens = st.builds(
        pb.Tokens,
        ids=st.lists(st.integers(0, 2**32 - 1), max_size=3),
        tokens=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=3),
        word_ids=st.lists(st.integers(-1, 200), max_size=3),
    )
    heads, specs = [], []
    for _ in range(draw(st.integers(0, 4))):
        heads.append(
            pb.EncodeResult(
                token_count=draw(st.integers(1, 9000)),
                truncated_tokens=draw(st.integers(0, 9000)),
                tokens=draw(st.none() | tokens),
            )
        )
        dtype = draw(float_types)
        chosen = [field for field in shapes if draw(st.booleans())]
        own = [TensorSpec(field, dtype, draw(shapes[field])) for field in chosen]
        own += draw(st.lists(embeddings(), max_size=3))
        for field, shape in shapes_after_embeddings.items():
            if draw(st.booleans()):
                own.append(TensorSpec(field, DType.INT32 if field in IDS else dtype, draw(shape)))
        specs.append(own)
    times = st.integers(0, MAX_UINT64)
    counts = st.integers(0, 2**32 - 1)
    timing = pb.Timing(
        tokenize_ns=draw(times),
        queue_ns=draw(times),
        compute_ns=draw(times),
        total_ns=draw(times),
        batch_inputs=draw(counts),
        batch_tokens=draw(counts),
    )
    return build(heads, specs, timing)


@settings(max_examples=drawings(150), deadline=None)
@given(cases())
def test_a_message_is_what_protobuf_writes(case: Case) -> None:
    written = written_message(case.results, case.timing)
    assert pb.EncodeResponse.FromString(written) == case.expected
    assert written == case.expected.SerializeToString(deterministic=True)


@settings(max_examples=drawings(150), deadline=None)
@given(cases())
def test_its_size_is_known_before(case: Case) -> None:
    promised = wire.MAX_TIMING_BYTES
    promised += sum(wire.result_size(result.head, result.specs) for result in case.results)
    assert 0 <= promised - case.expected.ByteSize() <= wire.MAX_TIMING_BYTES <= 64


def test_the_longest_timing_fits() -> None:
    longest = pb.Timing(
        **{
            field.name: MAX_UINT64 if field.name.endswith("_ns") else 2**32 - 1
            for field in pb.Timing.DESCRIPTOR.fields
        }
    )
    assert pb.EncodeResponse(timing=longest).ByteSize() == wire.MAX_TIMING_BYTES


@settings(max_examples=drawings(100), deadline=None)
@given(cases(), st.integers(0, MAX_UINT64), st.lists(st.integers(1, 200), min_size=1, max_size=3))
def test_frames_carry_the_same(case: Case, request_id: int, sizes: list[int]) -> None:
    """Of whatever size each of them is."""
    written = [
        *wire.result_frames(request_id, case.results, cycle(sizes).__next__),
        wire.end_frame(request_id, timing=case.timing),
    ]
    frames = [pb.EncodeStreamResponse.FromString(frame) for frame in written]
    assert [frame.SerializeToString(deterministic=True) for frame in frames] == written
    [(answered, reply)] = assemble(frames).items()
    assert answered == request_id
    assert reply.results == list(case.expected.results)
    assert reply.timing == case.timing
    assert reply.status == status_pb2.Status()
    assert all(len(frame.chunk.data) <= max(sizes) for frame in frames if frame.HasField("chunk"))


@pytest.mark.parametrize("num_bytes", [1, 127, 128, 16383, 16384, 2**21 - 1, 2**21])
def test_lengths_around_a_varint_s_edges(num_bytes: int) -> None:
    spec = TensorSpec(OutputField.EMBEDDINGS, DType.UINT8, (num_bytes,))
    case = build([pb.EncodeResult(token_count=1)], [[spec]], pb.Timing())
    assert written_message(case.results, case.timing) == case.expected.SerializeToString()
    for value in (num_bytes, num_bytes - 1):
        assert len(wire.varint(value)) == wire.varint_size(value)


def test_a_tensor_is_written_from_where_it_lies() -> None:
    """By reference until the one join: the buffer is the engine's own memory."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    buffer = wire.as_buffer(TensorData(values))
    assert np.shares_memory(np.asarray(buffer), values)


def test_a_slice_of_a_larger_buffer_is_written_right() -> None:
    """From a device the results of a batch are slices of one buffer, at any offset."""
    raw = np.arange(40, dtype=np.uint8)
    spec = TensorSpec(OutputField.LAST_HIDDEN_STATE, DType.FLOAT32, (2, 3))
    data = TensorData(raw[5:29].view(np.float32).reshape(2, 3))
    result = wire.InputResult(pb.EncodeResult(), [spec], [data])
    answer = pb.EncodeResponse.FromString(written_message([result], pb.Timing()))
    assert answer.results[0].last_hidden_state.data == raw[5:29].tobytes()

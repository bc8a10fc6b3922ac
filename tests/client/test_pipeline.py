"""The pipeline alone: how much it lets out, in which order it hands back, and what it refuses."""

from __future__ import annotations

import random

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from layertap import InternalError, ResourceExhausted
from layertap._pipeline import (
    MAX_BUSY_S,
    MAX_BYTES_IN_FLIGHT,
    MAX_GROUP_INPUTS,
    MAX_INPUTS_IN_FLIGHT,
    Pipeline,
)
from layertap._requests import encode_request
from layertap.v1 import encoder_pb2 as pb

Frame = pb.EncodeStreamResponse


def pipeline(*, ordered: bool = False, max_inputs: int = 1024, max_lanes: int = 1) -> Pipeline:
    template = encode_request(pooler_output=True)
    return Pipeline(template, ordered=ordered, max_inputs=max_inputs, max_lanes=max_lanes)


def frames(request: pb.EncodeStreamRequest, size: int = 4) -> list[Frame]:
    """The answer to a request: for each input a vector of `size` float32."""
    request_id = request.request_id
    answer = []
    for index in range(len(request.request.inputs)):
        tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[size])
        header = pb.ResultHeader(input_index=index, result=pb.EncodeResult(pooler_output=tensor))
        chunk = pb.TensorChunk(input_index=index, data=np.full(size, index, np.float32).tobytes())
        answer += [Frame(request_id=request_id, header=header), Frame(request_id=request_id, chunk=chunk)]
    return [*answer, Frame(request_id=request_id, end=pb.RequestEnd())]


def receive(pipeline: Pipeline, frames: list[Frame]) -> list[int]:
    return [index for frame in frames for index, _ in pipeline.receive(frame.SerializeToString())]


def fill(pipeline: Pipeline) -> list[pb.EncodeStreamRequest]:
    requests = []
    while count := pipeline.num_wanted:
        requests += pipeline.submit(["text"] * count)
    return requests


def test_what_is_in_flight_is_bounded_by_inputs() -> None:
    line = pipeline()
    waiting, sizes = fill(line), []
    for _ in range(200):
        receive(line, frames(waiting.pop(0)))
        fresh = fill(line)
        sizes += [len(one.request.inputs) for one in fresh]
        waiting += fresh
        in_flight = sum(len(one.request.inputs) for one in waiting)
        assert in_flight < MAX_INPUTS_IN_FLIGHT + MAX_GROUP_INPUTS
    assert in_flight >= MAX_INPUTS_IN_FLIGHT
    assert sizes[-1] == MAX_GROUP_INPUTS


def test_what_is_in_flight_is_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, large = 1 << 16, 10_000
    monkeypatch.setattr("layertap._pipeline.MAX_BYTES_IN_FLIGHT", limit)
    line = pipeline()
    line._expected_bytes = 1
    waiting = fill(line)
    assert sum(len(one.request.inputs) for one in waiting) == MAX_INPUTS_IN_FLIGHT
    for _ in range(50):
        receive(line, frames(waiting.pop(0), large // 4))
        waiting += fill(line)
    in_flight = sum(len(one.request.inputs) for one in waiting)
    assert limit // large <= in_flight <= limit // large + MAX_GROUP_INPUTS


def test_one_input_is_always_wanted_however_large() -> None:
    line = pipeline()
    line._expected_bytes = 2 * MAX_BYTES_IN_FLIGHT
    (request,) = fill(line)
    assert receive(line, frames(request)) == [0]
    assert line.num_wanted == 1


def test_ordered_results_wait_for_their_turn_and_count_until_then() -> None:
    line = pipeline(ordered=True)
    requests = fill(line)
    first = requests.pop(0)
    held = 0
    while requests:
        for request in requests[::-1]:
            assert receive(line, frames(request)) == []
            held += len(request.request.inputs)
        requests = fill(line)
    assert MAX_INPUTS_IN_FLIGHT <= held + 1 < MAX_INPUTS_IN_FLIGHT + MAX_GROUP_INPUTS
    assert receive(line, frames(first)) == list(range(held + 1))
    assert line.is_idle
    assert line.num_wanted > 0


def whole(request: pb.EncodeStreamRequest, size: int = 4) -> Frame:
    """The same answer in one frame."""
    results = []
    for index in range(len(request.request.inputs)):
        data = np.full(size, index, np.float32).tobytes()
        tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[size], data=data)
        results.append(pb.EncodeResult(pooler_output=tensor))
    return Frame(request_id=request.request_id, whole=pb.EncodeResponse(results=results))


def test_an_answer_in_one_frame_is_that_of_many() -> None:
    for answer in (frames, lambda request: [whole(request)]):
        line = pipeline()
        (request,) = line.submit(["text"] * 3)
        assert request.accepts_whole
        got = [pair for frame in answer(request) for pair in line.receive(frame.SerializeToString())]
        assert [index for index, _ in got] == [0, 1, 2]
        for index, result in got:
            np.testing.assert_array_equal(result.pooler_output, np.full(4, index, np.float32))
        assert line.is_idle
        line._expected_bytes = 1
        assert line.num_wanted == MAX_GROUP_INPUTS


def test_frames_in_one_message_are_those_that_come_by_themselves() -> None:
    line = pipeline()
    line._expected_bytes = 1 << 20
    small, large = line.submit(["text"]), line.submit(["another"])
    answers = [whole(next(small)), *frames(next(large))]
    assert receive(line, [Frame(grouped=pb.FrameGroup(frames=answers))]) == [0, 1]
    assert line.is_idle


def refusal(request: pb.EncodeStreamRequest, delay_s: float = 2.0) -> Frame:
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromNanoseconds(int(delay_s * 1e9))
    status.details.add().Pack(retry)
    return Frame(request_id=request.request_id, end=pb.RequestEnd(status=status))


def test_a_busy_server_gets_the_request_again_and_less_of_others() -> None:
    line = pipeline()
    line._expected_bytes = 1 << 20  # one a request
    sent = fill(line)
    accepted, refused = sent[:10], sent[10:]
    assert receive(line, [*frames(refused[0])[:1], *map(refusal, refused)]) == []
    again = line.take_refused()
    assert [request for _, request in again] == refused
    assert all(2.0 <= delay_s <= 2.5 for delay_s, _ in again)
    assert line.take_refused() == []
    # The server's capacity is what it has accepted: nothing new is sent until that much is answered.
    assert line.num_wanted == 0
    for request in refused:
        assert receive(line, frames(request)) == [request.request_id]
    for request in accepted[1:]:
        receive(line, frames(request))
    grown = fill(line)
    assert 0 < sum(len(one.request.inputs) for one in grown) < MAX_INPUTS_IN_FLIGHT + MAX_GROUP_INPUTS


def test_nothing_is_asked_again_for_ever() -> None:
    line = pipeline()
    (request,) = line.submit(["text"])
    receive(line, [refusal(request, 0.4 * MAX_BUSY_S)])
    receive(line, [refusal(request, 0.4 * MAX_BUSY_S)])
    with pytest.raises(ResourceExhausted):
        receive(line, [refusal(request, 0.4 * MAX_BUSY_S)])


def test_requests_hold_no_more_than_the_servers_limit() -> None:
    line = pipeline(max_inputs=3)
    line._expected_bytes = 1
    assert line.num_wanted == 3


@pytest.mark.parametrize(
    "wrong",
    [
        Frame(request_id=9, end=pb.RequestEnd()),
        Frame(request_id=0),
        Frame(grouped=pb.FrameGroup(frames=[Frame(grouped=pb.FrameGroup())])),
        Frame(request_id=0, end=pb.RequestEnd()),
        Frame(request_id=0, whole=pb.EncodeResponse()),
        Frame(request_id=0, chunk=pb.TensorChunk(input_index=1, data=b"1")),
        Frame(request_id=0, chunk=pb.TensorChunk(offset=4, data=b"1234")),
        Frame(request_id=0, chunk=pb.TensorChunk(data=bytes(17))),
        Frame(request_id=0, chunk=pb.TensorChunk(tensor=1, data=b"1")),
        Frame(
            request_id=0,
            header=pb.ResultHeader(result=pb.EncodeResult(pooler_output=pb.Tensor(dtype=99, shape=[1]))),
        ),
    ],
    ids=lambda frame: str(frame).replace("\n", " "),
)
def test_a_frame_against_the_contract_is_an_error(wrong: Frame) -> None:
    line = pipeline()
    (request,) = line.submit(["text"])
    receive(line, frames(request)[:1])
    with pytest.raises(InternalError):
        receive(line, [wrong])


def test_a_stream_that_ends_early_is_an_error() -> None:
    line = pipeline()
    line.finish()
    (request,) = line.submit(["text"])
    with pytest.raises(InternalError, match="unanswered"):
        line.finish()
    receive(line, frames(request))
    line.finish()


def num_by_lane(line: Pipeline, requests: list[pb.EncodeStreamRequest]) -> list[int]:
    """The number of inputs on each lane."""
    counts = [0] * len(line._lanes)
    for request in requests:
        counts[line.lane_of(request)] += len(request.request.inputs)
    return counts


def test_requests_are_dealt_to_lanes_within_the_same_limits() -> None:
    rng = random.Random(0)
    line = pipeline(max_lanes=3)
    waiting = fill(line)
    assert num_by_lane(line, waiting) == [4]
    num_dealt = 0
    for _ in range(200):
        # The last lane is slow.
        fast = [request for request in waiting if line.lane_of(request) < 2]
        answered = rng.choice(fast or waiting)
        waiting.remove(answered)
        receive(line, frames(answered))
        while count := line.num_wanted:
            before = num_by_lane(line, waiting)
            (request,) = line.submit(["text"] * count)
            waiting.append(request)
            if len(before) == 3:
                assert before[line.lane_of(request)] == min(before)
                num_dealt += 1
        assert sum(num_by_lane(line, waiting)) < MAX_INPUTS_IN_FLIGHT + MAX_GROUP_INPUTS
    assert num_dealt > 150
    assert num_by_lane(line, waiting) == line._lanes


def test_a_refused_request_keeps_its_lane_and_its_parts_are_dealt() -> None:
    line = pipeline(max_lanes=2)
    line._expected_bytes = 1 << 16
    waiting = fill(line)
    assert len(num_by_lane(line, waiting)) == 2
    before = line.lane_of(waiting[1])
    receive(line, [refusal(waiting[1])])
    ((_, again),) = line.take_refused()
    assert line.lane_of(again) == before
    too_large = status_pb2.Status(code=grpc.StatusCode.OUT_OF_RANGE.value[0])
    receive(line, [Frame(request_id=waiting[1].request_id, end=pb.RequestEnd(status=too_large))])
    parts = [part for _, part in line.take_refused()]
    assert len(parts) == MAX_GROUP_INPUTS
    for request in [*parts, *waiting]:
        if request is not waiting[1]:
            receive(line, frames(request))
    assert line.is_idle
    assert line._lanes == [0, 0]

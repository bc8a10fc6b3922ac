"""A small answer comes in one frame to a caller who reads that, and in many to one who does not."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest

from harness import Running
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.wire import WHOLE_BYTES

LAYER_BYTES = 16 * 768 * 4


@pytest.mark.parametrize(
    ("accepts_whole", "num_layers", "kinds"),
    [
        (True, 1, ["whole"]),
        (False, 1, ["header", "chunk", "end"]),
        (True, 2, ["header", "chunk", "end"]),
    ],
)
def test_a_small_answer(
    precomputed: Callable[..., Running], accepts_whole: bool, num_layers: int, kinds: list[str]
) -> None:
    assert LAYER_BYTES < WHOLE_BYTES < 2 * LAYER_BYTES
    request = pb.EncodeRequest(
        inputs=[pb.Input(token_ids=pb.TokenIds(ids=range(16)))],
        outputs=pb.OutputSelection(hidden_states=pb.HiddenStateSelection(layers=range(num_layers))),
    )
    with grpc.insecure_channel(precomputed().address) as channel:
        stub = EncoderServiceStub(channel)
        asked = pb.EncodeStreamRequest(request_id=5, request=request, accepts_whole=accepts_whole)
        frames = list(stub.EncodeStream(iter([asked])))
        expected = stub.Encode(request)
    assert [frame.WhichOneof("frame") for frame in frames] == kinds
    assert {frame.request_id for frame in frames} == {5}
    if kinds == ["whole"]:
        assert frames[0].whole.results == expected.results
        assert frames[0].whole.timing.batch_inputs == 1
    else:
        assert frames[1].chunk.data == expected.results[0].hidden_states.data

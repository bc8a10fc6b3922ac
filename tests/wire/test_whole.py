"""A small answer comes in one frame to a caller who reads that, and in many to one who does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import pytest

from harness import Running
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.api.serialization import WHOLE_BYTES

LAYER_BYTES = 16 * 768 * 4
NUM_SMALL = 400


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


def test_answers_that_share_a_message(precomputed: Callable[..., Running]) -> None:
    """Only of callers who read that; each is answered once, whichever way."""

    def asked() -> Iterator[pb.EncodeStreamRequest]:
        for number in range(NUM_SMALL):
            # Every fifth request fails; every seventh is from a client that reads one frame per message.
            outputs = pb.OutputSelection(embeddings=[pb.EmbeddingSpec(dimensions=1 + number % 700)])
            ids = pb.TokenIds(ids=[] if number % 5 == 0 else range(16))
            yield pb.EncodeStreamRequest(
                request_id=number,
                request=pb.EncodeRequest(inputs=[pb.Input(token_ids=ids)], outputs=outputs),
                accepts_whole=True,
                accepts_grouped=number % 7 != 0,
            )

    with grpc.insecure_channel(precomputed().address) as channel:
        messages = list(EncoderServiceStub(channel).EncodeStream(asked()))
    answered: dict[int, pb.EncodeStreamResponse] = {}
    for message in messages:
        frames = message.grouped.frames or [message]
        assert len(frames) == 1 or all(frame.request_id % 7 for frame in frames)
        assert not answered.keys() & {frame.request_id for frame in frames}
        answered.update((frame.request_id, frame) for frame in frames)
    assert sorted(answered) == list(range(NUM_SMALL))
    assert len(messages) < NUM_SMALL, "those of one batch are ready together"
    for number, frame in answered.items():
        if number % 5 == 0:
            assert "inputs[0].token_ids.ids" in frame.end.status.message
        else:
            [embedding] = frame.whole.results[0].embeddings
            assert list(embedding.shape) == [1 + number % 700]

"""Out of memory at each step of a pass: every request that was in it is answered, and rightly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grpc
import pytest

from families import build
from faults import OutOfMemoryAt
from harness import Running, serve
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.plan import Outputs, Work
from layertap_server.scheduling.scheduler import Engine
from server.support import CLS, SEP, WAIT_S, array, at_rest, eventually, gated, served, tensors_of, tokens

FAMILIES = ("bert", "mpnet")
# Not a multiple of the number of operations in a layer, so that all kinds of operations fail at some time.
STRIDE = 7


class ShortOfMemory:
    """An engine that runs out of memory at one operation of a batch, once."""

    def __init__(self, engine: Engine, number: int) -> None:
        self.engine = engine
        self.fault = OutOfMemoryAt(number)

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        if len(works) == 1:
            return self.engine.run(works)
        with self.fault:
            return self.engine.run(works)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        build(name, root / name)
    with serve({name: root / name for name in FAMILIES}) as running:
        yield running


def requests(model: str) -> list[pb.EncodeRequest]:
    """Neighbours in one batch, with every kind of output among them."""
    maps = pb.AttentionSelection(layers=[0, 3], mean_over_heads=True)
    selections = [
        pb.OutputSelection(embeddings=[pb.EmbeddingSpec(pooling=pb.POOLING_MEAN, layers=[1, 4])]),
        pb.OutputSelection(attentions=maps, hidden_states=pb.HiddenStateSelection(layers=[2])),
        pb.OutputSelection(pooler_output=True, last_hidden_state=True),
    ]
    return [
        tokens([CLS, *range(10, 12 + 3 * number), SEP], outputs=selection, model=model)
        for number, selection in enumerate(selections)
    ]


def assert_same(answer: pb.EncodeResponse, expected: pb.EncodeResponse) -> None:
    for mine, wanted in zip(tensors_of(answer.results[0]), tensors_of(expected.results[0]), strict=True):
        assert array(mine) == pytest.approx(array(wanted), abs=2e-5)


@pytest.mark.parametrize("model", FAMILIES, ids=["packed", "padded"])
def test_no_request_is_lost_and_no_neighbour_harmed(running: Running, model: str) -> None:
    """On a core that takes its own batches nothing else happens: the engine's own test has passes of one thread."""
    scheduler = served(running, model).scheduler
    with grpc.insecure_channel(running.address) as channel:
        stub = EncoderServiceStub(channel)
        expected = [stub.Encode(request, timeout=WAIT_S) for request in requests(model)]
        number, failed = 0, True
        while failed:
            with gated(running, model) as gate:
                engine = gate.engine
                first = stub.Encode.future(requests(model)[0], timeout=WAIT_S)
                gate.wait_for_batch()  # the others are queued together behind it
                calls = [stub.Encode.future(request, timeout=WAIT_S) for request in requests(model)]
                eventually(running, lambda: scheduler.waiting()[0] == len(expected))
                # Limits that earlier failures have set would put them into separate batches.
                scheduler.memory_limit = type(scheduler.memory_limit)()
                gate.engine = short = ShortOfMemory(engine, number)
                gate.open()
                assert_same(first.result(), expected[0])
                for call, wanted in zip(calls, expected, strict=True):
                    assert_same(call.result(), wanted)
                gate.engine = engine
            failed = short.fault.failed
            number += STRIDE
        assert number > 10 * STRIDE
        eventually(running, lambda: at_rest(running))

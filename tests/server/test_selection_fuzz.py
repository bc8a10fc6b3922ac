"""Selections of every kind against a real server process: memory stays within what is promised, and it stays up."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from bench.selections import described, random_request
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.config import Config
from scheduling.fake_engine import facts as bert_facts
from server.process import process
from server.support import streaming

MIB = 2**20
LARGEST_REPLY_MIB = 16
NUM_RANDOM = 30
# In addition to twice the largest reply.
ALLOWED_MIB = 200
ALLOWED_CODES = (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)
ANSWERED_WITHIN_S = 120

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much memory a process had"
    ),
]


def vectors(num_inputs: int, *specs: pb.EmbeddingSpec) -> pb.EncodeRequest:
    return pb.EncodeRequest(
        inputs=[pb.Input(text="")] * num_inputs, outputs=pb.OutputSelection(embeddings=specs)
    )


def maps(num_tokens: int, **fields: object) -> pb.EncodeRequest:
    return pb.EncodeRequest(
        inputs=[pb.Input(token_ids=pb.TokenIds(ids=[1000] * num_tokens))],
        outputs=pb.OutputSelection(attentions=pb.AttentionSelection(**fields)),  # type: ignore[arg-type]
    )


# Messages of up to 60 KB, which took gigabytes or minutes when each repeated index was computed separately.
CHOSEN = {
    "a mean of 59,500 layers": vectors(
        512, pb.EmbeddingSpec(layers=list(range(7)) * 8500, layer_merge=pb.LAYER_MERGE_MEAN)
    ),
    "maxima of 59,500 layers": vectors(
        64,
        pb.EmbeddingSpec(
            layers=list(range(7)) * 8500, layer_merge=pb.LAYER_MERGE_SUM, pooling=pb.POOLING_MEAN_MAX
        ),
    ),
    "one dimension of 4,000 layers": vectors(1, pb.EmbeddingSpec(layers=[3] * 4000, dimensions=1)),
    "bits of 8,000 layers": vectors(
        1, pb.EmbeddingSpec(layers=[3] * 8000, encoding=pb.EMBEDDING_ENCODING_BINARY)
    ),
    "many small vectors": vectors(256, *[pb.EmbeddingSpec(dimensions=i + 1) for i in range(16)]),
    "a mean of 60,000 heads": maps(250, layers=[0], heads=[1] * 60000, mean_over_heads=True),
    "a row of 60,000": maps(2, layers=[0], heads=[1], query_positions=[1] * 60000),
}


class Memory:
    """Of a process, in MiB."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self.idle = self._status("VmRSS")

    def _status(self, name: str) -> int:
        for line in (self._folder / "status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) // 1024
        raise AssertionError(name)

    def forget_peak(self) -> None:
        (self._folder / "clear_refs").write_text("5")

    @property
    def peak(self) -> int:
        return self._status("VmHWM")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[EncoderServiceStub, Memory]]:
    """The default model, whose sizes are real, in a process of its own."""
    [folder] = Config().models().values()
    limits = (
        f"--max-result-bytes={LARGEST_REPLY_MIB * MIB}",
        "--engine-timeout-s=20",
        "--max-batch-tokens=512",
    )
    with (
        process("--port=0", f"--model={folder}", *limits) as server,
        grpc.insecure_channel(server.wait_until_serving()) as channel,
    ):
        stub = EncoderServiceStub(channel)
        stub.Encode(vectors(1, pb.EmbeddingSpec()), timeout=ANSWERED_WITHIN_S)
        yield stub, Memory(server.pid)
        stub.Encode(vectors(1, pb.EmbeddingSpec()), timeout=ANSWERED_WITHIN_S)


def check(
    served: tuple[EncoderServiceStub, Memory], request: pb.EncodeRequest, said: str, *, streamed: bool = True
) -> grpc.StatusCode:
    stub, memory = served
    memory.forget_peak()
    if streamed:
        with streaming(stub, ANSWERED_WITHIN_S) as stream:
            stream.send(1, request)
            number = stream.reply().status.code
        code = next(one for one in grpc.StatusCode if one.value[0] == number)
    else:
        code = stub.Encode.with_call(request, timeout=ANSWERED_WITHIN_S)[1].code()
    assert memory.peak <= memory.idle + 2 * LARGEST_REPLY_MIB + ALLOWED_MIB, said
    assert code in ALLOWED_CODES, (said, code)
    return code


@pytest.mark.parametrize("name", CHOSEN)
def test_repeats_take_no_memory(served: tuple[EncoderServiceStub, Memory], name: str) -> None:
    assert check(served, CHOSEN[name], name, streamed=False) is grpc.StatusCode.OK


def test_random_selections_stay_within_memory(served: tuple[EncoderServiceStub, Memory]) -> None:
    model = served[0].GetModel(pb.GetModelRequest()).model
    facts = replace(
        bert_facts(),
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        max_tokens=model.max_tokens,
    )
    chance = random.Random(20)
    codes = []
    for _ in range(NUM_RANDOM):
        request = random_request(chance, facts, max_tokens=256)
        codes.append(check(served, request, described(request)))
    assert codes.count(grpc.StatusCode.OK) >= NUM_RANDOM // 2

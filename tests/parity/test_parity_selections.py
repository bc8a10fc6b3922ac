"""Selections of rows, columns and single heads, and every way to make vectors: as numpy makes them of what
transformers gives, alone and in mixed batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference import Input, Reference
from selections import NONE, POOLER, REDUCING, assert_reply, encode_requests, input_message
from strategies import inputs

import layertap
from families import FAMILIES, MAX_TOKENS, sentences
from harness import Running
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from server.support import WAIT_S

NUM_THREADS = 12
# Packed, with a tokenizer in Python, with windows, and two that run padded.
VARIED = ("bert", "esm", "modernbert", "deberta_v2", "t5")

MIXES = settings(
    max_examples=8,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(
    params=[name if name in VARIED else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
)
def reference(request: pytest.FixtureRequest, references: dict[str, Reference]) -> Reference:
    return references[request.param]


@pytest.fixture(scope="module")
def stub(running: Running) -> Iterator[EncoderServiceStub]:
    with grpc.insecure_channel(running.address) as channel:
        yield EncoderServiceStub(channel)


def sample(reference: Reference) -> str:
    """A text of some twenty tokens."""
    is_protein = reference.family.model_type == "esm"
    return "MKTAYIAKQRQISFVKSHFSRQ" if is_protein else " ".join(sentences()[7].split()[:12])


def check(
    stub: EncoderServiceStub, reference: Reference, items: Sequence[Input], outputs: pb.OutputSelection
) -> None:
    asked = pb.EncodeRequest(
        model=reference.name,
        inputs=[input_message(item) for item in items],
        outputs=outputs,
        truncation=pb.TRUNCATION_END,
    )
    reply = stub.Encode(asked, timeout=WAIT_S)
    for item, result in zip(items, reply.results, strict=True):
        assert_reply(result, reference, item, asked)


@pytest.mark.parametrize("positions", [[0], [-1], [1, 2, 3], [3, 0, -1, 3, -4], list(range(-4, 4)) * 10])
def test_rows(stub: EncoderServiceStub, reference: Reference, positions: list[int]) -> None:
    states = pb.HiddenStateSelection(layers=[2, 0, 2, -1], positions=positions)
    outputs = pb.OutputSelection(
        last_hidden_state=True, last_hidden_state_positions=positions, hidden_states=states
    )
    check(stub, reference, [sample(reference)], outputs)


@pytest.mark.parametrize("keys", [[], [0], [2, -1, 2, 0]])
@pytest.mark.parametrize("queries", [[], [1], [3, -2, 3]])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"layers": [1, 0, 1], "heads": [2, 2, 0]},
        {"layers": [2, -1], "heads": [1, 1, 3], "mean_over_heads": True},
        {"pairs": [(0, 0)]},
        {"pairs": [(-1, -1), (1, 2), (1, 0), (-1, -1), (3, 3), (0, 1)]},
    ],
    ids=["all", "some", "mean", "pair", "pairs"],
)
def test_maps(
    stub: EncoderServiceStub, reference: Reference, asked: dict[str, Any], queries: list[int], keys: list[int]
) -> None:
    fields = dict(asked)
    pairs = [pb.HeadRef(layer=layer, head=head) for layer, head in fields.pop("pairs", ())]
    maps = pb.AttentionSelection(**fields, pairs=pairs, query_positions=queries, key_positions=keys)
    check(stub, reference, [sample(reference)], pb.OutputSelection(attentions=maps))


@pytest.mark.parametrize("excludes", [False, True])
def test_vectors_of_every_kind(stub: EncoderServiceStub, reference: Reference, excludes: bool) -> None:
    """Each pooling with each merge, cut and normalizing; for a text, and for a pair, which has a special token in
    its middle."""
    poolings: list[dict[str, Any]] = [{"pooling": pooling} for pooling in (*REDUCING, NONE)]
    poolings += [{"poolings": [NONE]}, {"poolings": REDUCING}, {"poolings": [3, 8, 3]}, {"poolings": [9]}]
    layers: list[dict[str, Any]] = [{}, {"layers": [2, -1, 2]}]
    layers += [{"layers": [1, 0, 1], "layer_merge": merge} for merge in pb.LayerMerge.values()[1:]]
    finishes: list[dict[str, Any]] = [{}, {"normalize": True}, {"dimensions": 9, "normalize": True}]
    specs = [
        pb.EmbeddingSpec(**pooling, **of_layers, **finish, exclude_special_tokens=excludes)
        for pooling, of_layers, finish in product(poolings, layers, finishes)
    ]
    text = sample(reference)
    half = len(text) // 2
    items = [text, layertap.Pair(text[:half], text[half:])]
    check(stub, reference, items, pb.OutputSelection(embeddings=specs))


def test_token_vectors_in_every_encoding(stub: EncoderServiceStub, reference: Reference) -> None:
    specs = [
        pb.EmbeddingSpec(
            pooling=NONE, encoding=encoding, dimensions=dimensions, exclude_special_tokens=excludes
        )
        for encoding in pb.EmbeddingEncoding.values()
        for dimensions in (0, 21)
        for excludes in (False, True)
    ]
    check(stub, reference, [sample(reference), sample(reference)[:9]], pb.OutputSelection(embeddings=specs))


def test_spans_in_words(stub: EncoderServiceStub, reference: Reference) -> None:
    if not reference.tokenizer.is_fast:
        pytest.skip("its tokenizer has no words")
    words = sample(reference).split()
    spec = pb.EmbeddingSpec(poolings=[pb.POOLING_MEAN, pb.POOLING_WEIGHTED_MEAN])
    for first, last in [(0, 1), (2, 5), (0, len(words)), (1, 2), (0, 1)]:
        spec.spans.add(start=first, end=last, unit=pb.Span.UNIT_WORD)
    other = pb.EmbeddingSpec(spans=spec.spans, pooling=pb.POOLING_MAX, exclude_special_tokens=True)
    outputs = pb.OutputSelection(embeddings=[spec, other])
    check(stub, reference, [" ".join(words), layertap.Words(words)], outputs)


def test_special_tokens_between_ready_ids(stub: EncoderServiceStub, reference: Reference) -> None:
    special = sorted({*reference.tokenizer.all_special_ids} - {reference.tokenizer.mask_token_id})
    ids = [20, 21, special[0], 22, special[-1], special[-1], 23, 24]
    specs = [pb.EmbeddingSpec(pooling=pooling, exclude_special_tokens=True) for pooling in (*REDUCING, NONE)]
    specs.append(pb.EmbeddingSpec(exclude_special_tokens=True))
    for first, last in [(0, 3), (2, 7), (6, 8)]:
        specs[-1].spans.add(start=first, end=last, unit=pb.Span.UNIT_TOKEN)
    items: list[Input] = [layertap.TokenIds(ids), layertap.TokenIds(ids[::-1]), layertap.TokenIds([20] * 8)]
    check(stub, reference, items, pb.OutputSelection(embeddings=specs))


def test_the_longest_text(stub: EncoderServiceStub, reference: Reference) -> None:
    longest = layertap.TokenIds([5 + position % 20 for position in range(MAX_TOKENS)])
    specs = [pb.EmbeddingSpec(pooling=one) for one in (NONE, pb.POOLING_WEIGHTED_MEAN)]
    specs += [pb.EmbeddingSpec(pooling=POOLER)] * reference.family.has_pooler
    check(stub, reference, [longest], pb.OutputSelection(embeddings=specs))


@MIXES
@given(data=st.data())
def test_any_mix(stub: EncoderServiceStub, reference: Reference, data: st.DataObject) -> None:
    calls = []
    for _ in range(data.draw(st.integers(4, NUM_THREADS))):
        items = data.draw(st.lists(inputs(reference), min_size=1, max_size=3))
        calls.append((items, data.draw(encode_requests(reference, items))))
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        replies = list(pool.map(lambda call: stub.Encode(call[1], timeout=WAIT_S), calls))
    for (items, asked), reply in zip(calls, replies, strict=True):
        for item, result in zip(items, reply.results, strict=True):
            assert_reply(result, reference, item, asked)

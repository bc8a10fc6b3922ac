"""What heads and chosen positions give: every new shape, one message each way and streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import layertap
from layertap import (
    AsyncClient,
    Attentions,
    Client,
    Embedding,
    HiddenStates,
    Logits,
    Ranked,
    Result,
    Span,
    Sparse,
    TokenIds,
)
from layertap._wire import SLICED_BYTES, tensors
from layertap.v1 import encoder_pb2 as pb

from . import fake_heads, fake_server
from .fake_server import HIDDEN_SIZE, FakeEncoder, token_ids

TEXT = "abcdef"
IDS = token_ids(TEXT)
HIDDEN = fake_server.hidden_states(IDS)
MAPS = fake_server.attentions(IDS)


# ------------------------------------------------------------------- positions and vectors


def test_chosen_positions(client: Client) -> None:
    result = client.encode(
        TEXT,
        last_hidden_state=True,
        last_hidden_state_positions=[0, -1],
        hidden_states=HiddenStates(layers=[1, -1], positions=[2, 2, -3]),
        attentions=Attentions(layers=[-1], query_positions=[0], key_positions=[1, -1, 1]),
    )
    np.testing.assert_array_equal(result.last_hidden_state, HIDDEN[-1][[0, -1]])
    np.testing.assert_array_equal(result.hidden_states, HIDDEN[[1, -1]][:, [2, 2, -3]])
    np.testing.assert_array_equal(result.attentions, MAPS[[-1]][:, :, [0]][..., [1, -1, 1]])
    positions = np.array([1, 3])
    all_layers = client.encode(TEXT, hidden_states=HiddenStates(positions=positions)).hidden_states
    np.testing.assert_array_equal(all_layers, HIDDEN[:, positions])


@pytest.mark.parametrize("pairs", [[(0, 1), (2, 0)], np.array([[0, 1], [2, 0]]), ([0, 1], [2, 0])])
def test_single_heads(client: Client, pairs: Any) -> None:
    maps = client.encode(TEXT, attentions=Attentions(pairs=pairs, query_positions=[0])).attentions
    np.testing.assert_array_equal(maps, np.stack([MAPS[0, 1], MAPS[2, 0]])[:, None, [0]])


def embedding(client: Client, **options: Any) -> Any:
    return client.encode(TEXT, embeddings=Embedding(normalize=False, **options)).embedding


def test_poolings(client: Client) -> None:
    last = HIDDEN[-1]
    np.testing.assert_array_equal(embedding(client, pooling="none"), last)
    cut = embedding(client, pooling="none", dimensions=2, encoding="float16", exclude_special_tokens=True)
    np.testing.assert_array_equal(cut, last[1:-1, :2].astype(np.float16))
    weights = np.arange(1, len(IDS) + 1)[:, None]
    weighted = embedding(client, pooling="weighted_mean")
    np.testing.assert_allclose(weighted, (last * weights).sum(0) / weights.sum(), rtol=1e-5)
    by_root = embedding(client, pooling="mean_sqrt_len")
    np.testing.assert_allclose(by_root, last.sum(0) / np.sqrt(len(IDS)), rtol=1e-5)
    several = embedding(client, pooling=["max", "mean"], exclude_special_tokens=True)
    expected = np.concatenate([last[1:-1].max(0), last[1:-1].mean(0)])
    np.testing.assert_allclose(several, expected, rtol=1e-5)
    np.testing.assert_array_equal(embedding(client, pooling=("max",)), last.max(0))
    np.testing.assert_allclose(embedding(client, without_projection=True), last.mean(0) * 2, rtol=1e-5)
    words = embedding(client, spans=[Span(0, 2, "word"), (3, 4, "word")])
    np.testing.assert_allclose(words, [last[1:3].mean(0), last[4]], rtol=1e-5)


def test_late_interaction_in_eight_bits(client: Client) -> None:
    vectors = client.encode(TEXT, embeddings=Embedding(pooling="none", encoding="int8")).embedding
    assert isinstance(vectors, layertap.Quantized)
    assert (vectors.values.shape, vectors.scale.shape) == ((len(IDS), HIDDEN_SIZE), (len(IDS),))


# --------------------------------------------------------------------------------- heads


def test_logits_of_a_text(client: Client) -> None:
    result = client.encode(TEXT, model="classifier", logits=True)
    np.testing.assert_array_equal(result.logits, fake_heads.scores("classifier", IDS))
    assert result.logits.shape == (3,)
    assert result.logit_ids is None
    best = client.encode(TEXT, model="classifier", logits=Logits(top_k=2, activation="softmax"))
    assert (best.logits.shape, best.logit_ids.dtype) == ((2,), np.int32)
    order = np.argsort(-result.logits)
    np.testing.assert_array_equal(best.logit_ids, order[:2])
    powers = np.exp(result.logits)
    np.testing.assert_allclose(best.logits, (powers / powers.sum())[order[:2]], rtol=1e-6)
    plain = client.encode(TEXT, model="classifier", logits=Logits(activation="none")).logits
    np.testing.assert_array_equal(plain, result.logits)
    half = client.encode(TEXT, model="classifier", logits=True, dtype="bfloat16").logits
    np.testing.assert_array_equal(half, result.logits.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_logits_of_tokens_at_positions(client: Client) -> None:
    expected = fake_heads.scores("tagger", IDS)
    np.testing.assert_array_equal(client.encode(TEXT, model="tagger", logits=True).logits, expected)
    model = client.model("tagger")
    best = client.encode(TEXT, model="tagger", logits=Logits(positions=[1, -2], top_k=1))
    assert best.logits.shape == best.logit_ids.shape == (2, 1)
    labels = np.array(model.labels)[best.logit_ids]
    assert labels[:, 0].tolist() == [model.labels[row.argmax()] for row in expected[[1, -2]]]
    sigmoid = client.encode(TEXT, model="tagger", logits=Logits(activation="sigmoid")).logits
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-expected)), rtol=1e-6)


def test_sparse_vectors(client: Client) -> None:
    expected_ids, expected_weights = fake_heads.sparse("splade", IDS)
    for options in ({}, {"dtype": "float16"}):
        result = client.encode(TEXT, model="splade", sparse=True, **options)
        assert result.sparse_ids.dtype == np.int32
        np.testing.assert_array_equal(result.sparse_ids, expected_ids)
        np.testing.assert_array_equal(
            result.sparse_weights, expected_weights.astype(options.get("dtype", "float32"))
        )
    best = client.encode(TEXT, model="splade", sparse=Sparse(top_k=5))
    np.testing.assert_array_equal(best.sparse_ids, fake_heads.sparse("splade", IDS, 5)[0])
    assert (np.diff(best.sparse_weights) <= 0).all()


def test_a_sparse_vector_without_entries(client: Client) -> None:
    alone = client.encode(TokenIds([1]), model="splade", sparse=True)
    ((_, streamed),) = client.stream([TokenIds([1])], model="splade", sparse=True)
    for result in (alone, streamed):
        assert (result.sparse_ids.shape, result.sparse_weights.shape) == ((0,), (0,))
        assert (result.sparse_ids.dtype, result.sparse_weights.dtype) == (np.int32, np.float32)


def test_contacts(client: Client) -> None:
    result = client.encode(TEXT, model="protein", contacts=True)
    assert result.contacts.shape == (len(TEXT), len(TEXT))
    np.testing.assert_array_equal(result.contacts, fake_heads.contacts(IDS))


def test_what_a_model_does_not_have_is_the_servers_to_refuse(client: Client) -> None:
    for options in ({"logits": True}, {"sparse": True}, {"contacts": True}):
        with pytest.raises(layertap.FailedPrecondition):
            client.encode(TEXT, **options)
        assert client.encode(TEXT, tokens=True, **dict.fromkeys(options, False)).logits is None


EVERYTHING: dict[str, Any] = {
    "model": "splade",
    "tokens": True,
    "last_hidden_state": True,
    "pooler_output": True,
    "hidden_states": True,
    "attentions": True,
    "embeddings": [Embedding(), Embedding(pooling="none")],
    "logits": Logits(top_k=20),
    "sparse": True,
}
INPUTS = ["a", TEXT, TokenIds([1]), "long " * 40]


def assert_all_there(results: list[Result]) -> None:
    for value, result in zip(INPUTS, results, strict=True):
        ids = token_ids(value) if isinstance(value, str) else list(value.ids)
        values, labels = fake_heads.logits("splade", ids, pb.LogitsSelection(top_k=20))
        entries, weights = fake_heads.sparse("splade", ids)
        np.testing.assert_array_equal(result.last_hidden_state, fake_server.hidden_states(ids)[-1])
        np.testing.assert_array_equal(result.attentions, fake_server.attentions(ids))
        assert [vector.shape for vector in result.embeddings] == [(HIDDEN_SIZE,), (len(ids), HIDDEN_SIZE)]
        np.testing.assert_array_equal(result.logits, values)
        np.testing.assert_array_equal(result.logit_ids, labels)
        np.testing.assert_array_equal(result.sparse_ids, entries)
        np.testing.assert_array_equal(result.sparse_weights, weights)
        names = [name for name in result.arrays() if not name.startswith("tokens.")]
        assert names == [
            *("last_hidden_state", "pooler_output", "hidden_states", "attentions"),
            *("embeddings.0", "embeddings.1", "logits", "logit_ids", "sparse_ids", "sparse_weights"),
        ]


def test_all_outputs_in_one_message(client: Client) -> None:
    small = [client.encode(value, **EVERYTHING) for value in INPUTS]
    assert_all_there(small)
    large = client.encode(INPUTS, **EVERYTHING)
    # The message is so large that its tensors are sliced off it.
    assert sum(array.nbytes for result in large for array in result.arrays().values()) > SLICED_BYTES
    assert_all_there(large)


@pytest.mark.parametrize("whole", [True, False])
def test_all_outputs_on_a_stream(client: Client, fake: FakeEncoder, whole: bool) -> None:
    fake.frame_bytes, fake.sends_whole = 1000, whole
    assert_all_there([result for _, result in client.stream(INPUTS, **EVERYTHING)])


async def test_all_outputs_of_the_other_client(async_client: AsyncClient) -> None:
    assert_all_there(await async_client.encode(INPUTS, **EVERYTHING))


def test_tensors_are_in_the_order_of_their_fields() -> None:
    result = pb.EncodeResult()
    fields = [one for one in result.DESCRIPTOR.fields if one.message_type is pb.Tensor.DESCRIPTOR]
    for field in fields:
        tensor = pb.Tensor(shape=[field.number])
        if field.name == "embeddings":
            result.embeddings.extend([tensor, tensor])
        else:
            getattr(result, field.name).CopyFrom(tensor)
    numbers = sorted([field.number for field in fields] + [pb.EncodeResult.EMBEDDINGS_FIELD_NUMBER])
    assert [tensor.shape[0] for tensor in tensors(result)] == numbers


# ------------------------------------------------------------------- preparation and models


def test_a_prompt_of_the_callers_own(client: Client) -> None:
    result = client.encode("ab", tokens=True, prompt="query: ")
    assert result.tokens.ids.tolist() == token_ids("query: ab")
    (streamed,) = (result for _, result in client.stream(["ab"], tokens=True, prompt="query: "))
    assert streamed.tokens.ids.tolist() == token_ids("query: ab")
    assert client.encode("ab", tokens=True, prompt="", prompt_name="query").token_count == 4


async def test_tokens_without_special_ones(client: Client, async_client: AsyncClient) -> None:
    assert client.tokenize("ab", without_special_tokens=True).ids.tolist() == token_ids("ab")[1:-1]
    many = client.tokenize(["ab", "c"], without_special_tokens=True)
    assert [len(one) for one in many] == [2, 1]
    assert len(await async_client.tokenize("ab", without_special_tokens=True)) == 2


def test_models_say_what_their_heads_are(client: Client) -> None:
    facts = {name: client.model(name) for name in ("fake", *fake_heads.MODELS)}
    assert {name: model.head for name, model in facts.items()} == {
        "fake": "",
        "classifier": "sequence_classification",
        "reranker": "sequence_classification",
        "tagger": "token_classification",
        "splade": "masked_language",
        "masked": "masked_language",
        "protein": "",
    }
    assert facts["classifier"].labels == ("no", "maybe", "yes")
    assert facts["splade"].labels == ()
    assert [name for name, model in facts.items() if model.has_sparse] == ["splade"]
    assert [name for name, model in facts.items() if model.has_contacts] == ["protein"]
    assert (facts["protein"].embedding_size, facts["fake"].embedding_size) == (4, 0)


# ----------------------------------------------------------------------------- re-ranking


def score_of(text: str) -> float:
    ids = [*token_ids("q"), *token_ids(text)[1:]]
    return float(fake_heads.scores("reranker", ids)[0])


def in_order(texts: list[str]) -> list[Ranked]:
    scores = [score_of(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda index: -scores[index])
    return [Ranked(index, pytest.approx(scores[index]), texts[index]) for index in order]


async def test_rerank(client: Client, async_client: AsyncClient) -> None:
    texts = ["a", "bc", "a", "zebra", "", "a"]
    expected = in_order(texts)
    assert [one.index for one in expected if one.text == "a"] == [0, 2, 5], "equal scores keep their order"
    assert client.rerank("q", texts, model="reranker") == expected
    assert client.rerank("q", iter(texts), model="reranker", top_k=2) == expected[:2]
    assert client.rerank("q", tuple(texts), model="reranker", top_k=100) == expected
    assert await async_client.rerank("q", np.array(texts), model="reranker", top_k=2) == expected[:2]
    scores = [one.score for one in client.rerank("q", texts, model="reranker", activation="sigmoid")]
    np.testing.assert_allclose(scores, [1 / (1 + np.exp(-score_of(one.text))) for one in expected], rtol=1e-6)
    assert isinstance(scores[0], float)


async def test_rerank_of_many_texts_is_streamed(
    client: Client, async_client: AsyncClient, fake: FakeEncoder
) -> None:
    texts = [f"{number:03}" for number in range(700)]
    assert client.rerank("q", texts, model="reranker") == in_order(texts)
    assert "EncodeStream" in [rpc for rpc, _ in fake.calls]
    assert await async_client.rerank("q", texts, model="reranker", top_k=3) == in_order(texts)[:3]


def test_rerank_sends_its_options(client: Client, fake: FakeEncoder) -> None:
    with pytest.raises(layertap.InvalidArgument, match="max_tokens 7"):
        client.rerank("q", ["a"], model="reranker", max_tokens=7)
    options: dict[str, Any] = {"truncation": "end", "priority": "low", "prompt_name": "query", "timeout": 30}
    assert len(client.rerank("q", ["a"], model="reranker", **options)) == 1


async def test_rerank_of_nothing_needs_no_server() -> None:
    with Client("127.0.0.1:1") as client:
        assert client.rerank("q", []) == []
    async with AsyncClient("127.0.0.1:1") as client:
        assert await client.rerank("q", []) == []


@pytest.mark.parametrize(
    ("model", "has"),
    [
        ("classifier", "has a head with 3 labels"),
        ("tagger", "has a head that scores tokens"),
        ("splade", "has a head for masked words"),
        ("", "'fake' has no head"),
    ],
)
async def test_rerank_needs_one_label(
    client: Client, async_client: AsyncClient, fake: FakeEncoder, model: str, has: str
) -> None:
    for _ in range(2):
        with pytest.raises(layertap.FailedPrecondition, match=f"one score for each pair .*{has}"):
            client.rerank("q", ["a"], model=model)
    with pytest.raises(layertap.FailedPrecondition, match=has):
        await async_client.rerank("q", ["a"], model=model)
    assert {rpc for rpc, _ in fake.calls} == {"GetModel"}


@pytest.fixture
def with_models(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def change(**models: Any) -> None:
        monkeypatch.setattr(fake_heads, "MODELS", {**fake_heads.MODELS, **models})

    return change


def test_a_model_that_changes_below_its_name(client: Client, with_models: Callable[..., None]) -> None:
    one, three = fake_heads.MODELS["reranker"], fake_heads.MODELS["classifier"]
    with_models(changing=three)
    with pytest.raises(layertap.FailedPrecondition, match="3 labels"):
        client.rerank("q", ["a"], model="changing")
    with_models(changing=one)
    assert len(client.rerank("q", ["a"], model="changing")) == 1
    with_models(changing=three)
    with pytest.raises(layertap.FailedPrecondition, match=r"logits of shape \(3,\)"):
        client.rerank("q", ["a"], model="changing")


def test_scores_that_are_no_numbers_come_last(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(model: str, ids: list[int]) -> np.ndarray:
        return np.full(1, np.nan if len(ids) == 5 else len(ids), np.float32)

    monkeypatch.setattr(fake_heads, "scores", scores)
    found = client.rerank("q", ["a", "bb", "ccc"], model="reranker")
    assert [one.index for one in found] == [2, 1, 0]
    assert np.isnan(found[-1].score)


async def test_a_text_that_fails_is_named(client: Client, async_client: AsyncClient) -> None:
    texts = ["a", "b", "poison"]
    with pytest.raises(layertap.InvalidArgument, match=r"inputs\[2\].pair: is poison") as caught:
        client.rerank("q", texts, model="reranker")
    assert caught.value.input_index == 2
    with pytest.raises(layertap.InvalidArgument) as caught:
        await async_client.rerank("q", [*map(str, range(300)), *texts], model="reranker")
    assert caught.value.input_index == 302

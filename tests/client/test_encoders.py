"""`SentenceEncoder`, `CrossEncoder` and `SparseEncoder` over the fake server: calls, shapes, types, refusals.
Their values are compared with the real classes in tests/parity."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import layertap
from layertap import Client, CrossEncoder, FailedPrecondition, InvalidArgument, SentenceEncoder, SparseEncoder

from . import fake_heads
from .fake_server import FakeEncoder, token_ids

TEXTS = ["ab", "abcdef", "a"]


@pytest.fixture
def encoder(client: Client) -> Iterator[SentenceEncoder]:
    with SentenceEncoder(client) as encoder:
        yield encoder


@pytest.fixture
def reranker(client: Client) -> CrossEncoder:
    return CrossEncoder(client, "reranker")


@pytest.fixture
def splade(client: Client) -> SparseEncoder:
    return SparseEncoder(client, "splade")


# ------------------------------------------------------------------------------ SentenceEncoder


def test_shapes_and_types(encoder: SentenceEncoder) -> None:
    one, several = encoder.encode("ab"), encoder.encode(TEXTS)
    assert (one.shape, one.dtype, several.shape) == ((4,), np.float32, (3, 4))
    np.testing.assert_array_equal(one, several[0])
    tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    assert (type(tensor), tensor.shape, tensor.dtype) == (torch.Tensor, (3, 4), torch.float32)
    assert encoder.encode("a", convert_to_tensor=True).shape == (4,)
    listed = encoder.encode(TEXTS, convert_to_numpy=False)
    assert [type(listed), len(listed), type(listed[0])] == [list, 3, torch.Tensor]
    assert encoder.encode(np.array(TEXTS)).shape == (3, 4)
    assert encoder.encode([("a", "b"), ["c", "d"]]).shape == (2, 4)
    assert encoder.encode([]).shape == (0,)
    assert encoder.encode([], convert_to_tensor=True).shape == (0,)
    assert encoder.encode([], convert_to_numpy=False) == []


def test_a_vector_is_cut_after_it_is_normalized(encoder: SentenceEncoder) -> None:
    whole = encoder.encode(TEXTS)
    np.testing.assert_array_equal(encoder.encode(TEXTS, truncate_dim=3), whole[:, :3])
    cut = encoder.encode(TEXTS, truncate_dim=3, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        cut, whole[:, :3] / np.linalg.norm(whole[:, :3], axis=1, keepdims=True), atol=1e-6
    )


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precisions_are_those_of_sentence_transformers(encoder: SentenceEncoder, precision: Any) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    expected = quantize_embeddings(encoder.encode(TEXTS), precision)
    given = encoder.encode(TEXTS, precision=precision)
    assert given.dtype == expected.dtype
    np.testing.assert_array_equal(given, expected)
    if precision.endswith("int8"):
        with pytest.raises(ValueError, match="give several texts"):
            encoder.encode("a", precision=precision)


def test_token_embeddings(encoder: SentenceEncoder, client: Client) -> None:
    states = encoder.encode(TEXTS, output_value="token_embeddings")
    assert [tuple(one.shape) for one in states] == [(4, 4), (8, 4), (3, 4)]
    np.testing.assert_array_equal(
        states[1].numpy(), client.encode("abcdef", last_hidden_state=True).last_hidden_state
    )
    one = encoder.encode("ab", output_value="token_embeddings")
    assert (type(one), one.shape) == (torch.Tensor, (4, 4))


def test_prompts(encoder: SentenceEncoder, client: Client) -> None:
    np.testing.assert_array_equal(encoder.encode("a", prompt="to: "), client.embed("a", prompt="to: "))
    np.testing.assert_array_equal(
        encoder.encode("a", prompt="to: ", prompt_name="query"), client.embed("a", prompt="to: ")
    )
    np.testing.assert_array_equal(encoder.encode("a", prompt=""), client.embed("a"))
    with pytest.raises(ValueError, match=r"prompt_name='no': the model has the prompts \['query'\]"):
        encoder.encode("a", prompt_name="no")
    assert encoder.prompts == {"query": "query: "}


def test_queries_and_documents(
    encoder: SentenceEncoder, fake: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, str]] = []
    inner = fake._results

    def spy(request: Any, context: Any) -> Any:
        sent.append((request.prompt_name, request.prompt))
        return inner(request, context)

    monkeypatch.setattr(fake, "_results", spy)
    encoder.encode_query("a")
    encoder.encode_query("a", prompt="p")
    encoder.encode_document(["a"], convert_to_tensor=True)
    assert sent == [("query", ""), ("", "p"), ("", "")]


def test_an_empty_prompt_leaves_the_default_out(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SentenceEncoder(client)
    assert encoder._prompt("", None) == ("", "")  # no default: as many tokens with and without
    encoder = SentenceEncoder(client)
    monkeypatch.setattr(type(client), "tokenize", lambda *_, **__: "fewer"[:2])
    with pytest.raises(ValueError, match="the model has a default prompt and no empty one"):
        encoder.encode("a", prompt="")
    monkeypatch.setattr(SentenceEncoder, "facts", _Facts({"query": "q: ", "document": ""}))
    assert SentenceEncoder(client)._prompt("", None) == ("", "document")


class _Facts:
    def __init__(self, prompts: dict[str, str]) -> None:
        self.prompts = prompts


def test_texts_are_cut(encoder: SentenceEncoder, fake: FakeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    inner = fake._results

    def spy(request: Any, context: Any) -> Any:
        sent.append((request.truncation, request.max_tokens))
        request.max_tokens = 0
        return inner(request, context)

    monkeypatch.setattr(fake, "_results", spy)
    monkeypatch.setattr(fake, "_check", lambda request: None)
    encoder.encode("a")
    encoder.max_seq_length = 100
    assert encoder.max_seq_length == 100
    encoder.encode("a")
    assert sent == [(2, 0), (2, 100)]
    with pytest.raises(ValueError, match="max_seq_length=1000: give a whole number from 1 to 512"):
        encoder.max_seq_length = 1000


def test_the_configured_length_is_found(encoder: SentenceEncoder) -> None:
    # The fake reports one dropped token, and counts all.
    assert encoder.max_seq_length > 0
    assert encoder.get_sentence_embedding_dimension() == encoder.get_embedding_dimension() == 4
    encoder.truncate_dim = 3
    assert encoder.get_embedding_dimension() == 3


def test_similarity(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers.util import similarity as real

    one, other = encoder.encode(TEXTS), encoder.encode(["x", "yz", "ü"])
    for name, ours in (("cosine", "cos_sim"), ("dot", "dot_score"), ("euclidean", None), ("manhattan", None)):
        encoder.similarity_fn_name = name  # type: ignore[assignment]
        matrix = getattr(real, ours or f"{name}_sim")
        pairwise = getattr(real, f"pairwise_{ours or f'{name}_sim'}")
        for a, b in ((one, other), (torch.from_numpy(one), list(other)), (one[0], other)):
            given = encoder.similarity(a, b)
            assert isinstance(given, torch.Tensor)
            torch.testing.assert_close(given, matrix(a, b), rtol=1e-4, atol=1e-5)
        given = encoder.similarity_pairwise(one, other)
        torch.testing.assert_close(given, pairwise(one, other), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="similarity_fn_name='maxsim': give one of"):
        encoder.similarity_fn_name = "maxsim"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="give as many on both sides"):
        encoder.similarity_pairwise(one, other[:2])
    monkeypatch.setattr("layertap._encoders.similarity.has_torch", lambda: False)
    assert isinstance(encoder.similarity(one, other), np.ndarray)


def test_tokenize(encoder: SentenceEncoder, fake: FakeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.pad_token = "[PAD]"
    encoder.max_seq_length = 512
    monkeypatch.setattr(fake, "_check", lambda request: None)
    features = encoder.tokenize(["ab", "abcd"])
    assert {name: type(value) for name, value in features.items()} == dict.fromkeys(
        ("input_ids", "token_type_ids", "attention_mask"), torch.Tensor
    )
    assert features["input_ids"].tolist() == [[*token_ids("ab"), 3, 3], token_ids("abcd")]
    assert features["attention_mask"].tolist() == [[1] * 4 + [0] * 2, [1] * 6]


def test_refusals(encoder: SentenceEncoder, client: Client) -> None:
    for options, message in (
        ({"batch_size": 0}, "batch_size=0: give a whole number from 1"),
        ({"precision": "int4"}, "precision='int4': give one of"),
        ({"output_value": None}, "output_value=None: give 'sentence_embedding' or 'token_embeddings'"),
        ({"output_value": "token_embeddings", "precision": "int8"}, "precision='int8' is not available"),
        ({"truncate_dim": 0}, "truncate_dim=0: give a whole number from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.encode(["a"], **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as raised:
        encoder.encode(["a", "poison"])
    assert raised.value.input_index == 1
    with pytest.raises(ValueError, match="leave them out"):
        SentenceEncoder(client, token="t")


def test_closing(address: str, client: Client) -> None:
    with SentenceEncoder(address) as own:
        assert own.encode("a").shape == (4,)
    with pytest.raises(RuntimeError):
        own.encode("a")
    with SentenceEncoder(client):
        pass
    client.models()  # a client that was given stays open


def test_without_torch(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert encoder.encode(TEXTS).shape == (3, 4)
    with pytest.raises(ModuleNotFoundError, match="convert_to_tensor needs torch: pip install torch"):
        encoder.encode(TEXTS, convert_to_tensor=True)


# --------------------------------------------------------------------------------- CrossEncoder


def logit(query: str, text: str) -> float:
    ids = [*token_ids(query), *token_ids(text)[1:]]
    return float(fake_heads.scores("reranker", ids)[0])


def test_predict(reranker: CrossEncoder, client: Client) -> None:
    pairs = [("q", "a"), ("q", "bc")]
    expected = np.array([logit(*pair) for pair in pairs])
    scores = reranker.predict(pairs)
    assert (scores.shape, scores.dtype) == ((2,), np.float32)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-expected)), rtol=1e-6)
    one = reranker.predict(["q", "a"])
    assert (one.shape, one) == ((), scores[0])
    assert reranker.predict(("q", "a")) == scores[0]
    assert reranker.predict(np.array(["q", "a"])) == scores[0]
    np.testing.assert_array_equal(reranker.predict(np.array(pairs)), scores)
    np.testing.assert_allclose(reranker.predict(pairs, activation_fn="none"), expected, rtol=1e-6)
    np.testing.assert_allclose(
        reranker.predict(pairs, activation_fn=torch.nn.Identity()), expected, rtol=1e-6
    )
    tensor = reranker.predict(pairs, convert_to_tensor=True)
    assert (type(tensor), tensor.shape) == (torch.Tensor, (2,))
    assert [type(one) for one in reranker.predict(pairs, convert_to_numpy=False)] == [torch.Tensor] * 2
    assert reranker.predict([]).shape == (0,)
    raw = CrossEncoder(client, "reranker", activation_fn="none")
    np.testing.assert_allclose(raw.predict(pairs), expected, rtol=1e-6)


def test_several_labels(client: Client) -> None:
    classifier = CrossEncoder(client, "classifier")
    assert classifier.num_labels == 3
    logits = classifier.predict([("q", "a"), ("q", "bc")])
    assert logits.shape == (2, 3)
    shares = classifier.predict([("q", "a")], apply_softmax=True)
    np.testing.assert_allclose(shares[0], np.exp(logits[0]) / np.exp(logits[0]).sum(), rtol=1e-5)
    assert classifier.predict(("q", "a")).shape == (3,)
    with pytest.raises(ValueError, match="rank needs a head with one label, and this one has 3"):
        classifier.rank("q", ["a"])


def test_rank(reranker: CrossEncoder) -> None:
    texts = ["a", "bc", "zebra"]
    scores = reranker.predict([("q", text) for text in texts])
    ranked = reranker.rank("q", texts, return_documents=True)
    order = np.argsort(-scores, kind="stable")
    assert ranked == [
        {"corpus_id": index, "score": float(scores[index]), "text": texts[index]} for index in order
    ]
    assert reranker.rank("q", texts, top_k=1) == [
        {"corpus_id": ranked[0]["corpus_id"], "score": ranked[0]["score"]}
    ]
    assert reranker.rank("q", []) == []


def test_a_cross_encoder_needs_a_head(client: Client) -> None:
    for model, kind in (("plain", "no head"), ("tagger", "a head for token_classification")):
        with pytest.raises(FailedPrecondition, match=f"'{model}' has {kind}"):
            CrossEncoder(client, model).predict([("a", "b")])
    with pytest.raises(ValueError, match="activation_fn='tanh': give"):
        CrossEncoder(client, "reranker", activation_fn="tanh")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- SparseEncoder


def test_sparse_vectors(splade: SparseEncoder) -> None:
    vectors = splade.encode(TEXTS)
    assert vectors.is_sparse
    assert tuple(vectors.shape) == (3, fake_heads.VOCABULARY) == (3, splade.get_embedding_dimension())
    dense = vectors.to_dense()
    for index, text in enumerate(TEXTS):
        ids, weights = fake_heads.sparse("splade", token_ids(text))
        np.testing.assert_array_equal(dense[index].nonzero()[:, 0].numpy(), ids)
        np.testing.assert_allclose(dense[index][ids].numpy(), weights)
    one = splade.encode("ab")
    assert one.is_sparse
    assert torch.equal(one.to_dense(), dense[0])
    assert torch.equal(splade.encode(TEXTS, convert_to_sparse_tensor=False), dense)
    assert [tuple(one.shape) for one in splade.encode(TEXTS, convert_to_tensor=False)] == [
        (fake_heads.VOCABULARY,)
    ] * 3
    limited = splade.encode(TEXTS, max_active_dims=5)
    assert (limited.to_dense() > 0).sum(1).tolist() == [5, 5, 5]
    assert tuple(splade.encode([]).shape) == (0, fake_heads.VOCABULARY)


def test_what_sparse_vectors_are_used_for(splade: SparseEncoder, client: Client) -> None:
    vectors = splade.encode(TEXTS, max_active_dims=20)
    dense = vectors.to_dense()
    torch.testing.assert_close(splade.similarity(vectors, vectors), dense @ dense.T)
    torch.testing.assert_close(splade.similarity_pairwise(vectors, vectors), (dense * dense).sum(1))
    torch.testing.assert_close(splade.similarity(vectors[0], list(vectors)), dense[:1] @ dense.T)
    assert splade.sparsity(vectors) == {"active_dims": 20.0, "sparsity_ratio": 1 - 20 / 1010}
    assert splade.sparsity(dense[0])["active_dims"] == 20
    both = splade.intersection(vectors[0], vectors)
    torch.testing.assert_close(both.to_dense(), dense[0] * dense)
    best = splade.decode(vectors[0], top_k=3)
    order = dense[0].argsort(descending=True)[:3]
    assert [name for name, _ in best] == [f"t{index}" for index in order.tolist()]
    assert [weight for _, weight in best] == dense[0][order].tolist()
    assert [len(one) for one in splade.decode(vectors)] == [20, 20, 20]
    with pytest.raises(FailedPrecondition, match="'plain' gives none"):
        SparseEncoder(client, "plain").encode("a")


def test_names_are_short(client: Client) -> None:
    assert repr(layertap.SparseEncoder(client, "splade")).startswith("SparseEncoder(")

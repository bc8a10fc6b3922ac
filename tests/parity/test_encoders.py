"""`SentenceEncoder`, `CrossEncoder` and `SparseEncoder` do what the classes of sentence-transformers do: the same
calls give the same shapes and types, and the same numbers but for rounding."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import harness
import layertap
from families import HIDDEN_SIZE, build, sentences
from harness import Running
from layertap_server.engine.loading import load as loading
from layertap_server.engine.loading import ways
from layertap_server.engine_host import EngineHost

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

TOLERANCE = 2e-5
TEXTS = ["Short.", "", *(" ".join(sentences()[40 + i : 42 + i * 2]) for i in range(5))]
PAIRS = [(TEXTS[0], TEXTS[2]), (TEXTS[3], TEXTS[0]), ("one text", "and another"), (TEXTS[4], TEXTS[5])]


def save_sentence_models(root: Path) -> None:
    build("bert", root / "base")
    cases: dict[str, tuple[list[torch.nn.Module], int | None, dict[str, Any]]] = {
        "mean": ([Pooling(HIDDEN_SIZE, "mean")], None, {}),
        "cut": (
            [Pooling(HIDDEN_SIZE, "cls"), Normalize()],
            12,
            {"prompts": {"query": "find: ", "passage": "p "}},
        ),
        "dense": (
            [Pooling(HIDDEN_SIZE, "mean"), Dense(HIDDEN_SIZE, 20), Normalize()],
            None,
            {"prompts": {"query": "query: ", "other": "to "}, "default_prompt_name": "other"},
        ),
    }
    for name, (modules, length, options) in cases.items():
        torch.manual_seed(7)
        model = SentenceTransformer(
            modules=[Transformer(str(root / "base")), *modules], device="cpu", **options
        )
        model.max_seq_length = length or model.max_seq_length
        model.save(str(root / name), create_model_card=False)


# How a checkpoint names what is applied to its scores, now and before version 4.
CONFIGURED: dict[str, dict[str, Any]] = {
    "identity": {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
    "identity-of-old": {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    "sigmoid": {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}},
}


def save_heads(root: Path) -> None:
    for name, kind, options in (
        ("one", AutoModelForSequenceClassification, {"num_labels": 1}),
        ("three", AutoModelForSequenceClassification, {"num_labels": 3}),
        ("masked", AutoModelForMaskedLM, {}),
    ):
        torch.manual_seed(7)
        kind.from_pretrained(root / "base", **options).save_pretrained(root / name)
        AutoTokenizer.from_pretrained(root / "base").save_pretrained(root / name)
    unknown = {"unknown": {"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}}
    for name, settings in (CONFIGURED | unknown).items():
        shutil.copytree(root / "one", root / name)
        path = root / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    # A masked-language model of transformers is a SPLADE model where it is loaded as a SparseEncoder.
    SparseEncoder(str(root / "masked"), device="cpu").save(str(root / "splade"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_sentence_models(root)
        save_heads(root)
    return root


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[Running]:
    names = ("mean", "cut", "dense", "one", "three", "splade", "unknown", *CONFIGURED)
    with pytest.MonkeyPatch.context() as patched:
        # Other tests check models at load; here it would take most of the time.
        patched.setattr(EngineHost, "warm_up", lambda _: None)
        patched.setattr(ways, "device_modules", lambda *_: {})
        patched.setattr(loading, "verify", lambda *_: None)
        patched.setattr(ways, "prepare_linears", lambda *_, **__: {})
        with harness.serve({name: root / name for name in names}, threads=1) as running:
            yield running


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[layertap.Client]:
    with layertap.Client(running.address) as client:
        yield client


def same(got: Any, expected: Any) -> None:
    """The same types, shapes and numbers, in lists and dicts too."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for name in expected:
            same(got[name], expected[name])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert (got.dtype, got.shape, got.layout) == (expected.dtype, expected.shape, expected.layout)
        dense = expected.to_dense() if expected.is_sparse else expected
        got = got.to_dense() if got.is_sparse else got
        torch.testing.assert_close(got, dense, rtol=1e-4, atol=TOLERANCE)
    elif isinstance(expected, np.ndarray | np.generic):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=TOLERANCE)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, abs=TOLERANCE)
    else:
        assert got == expected


# ------------------------------------------------------------------------------ SentenceTransformer

CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one text": (TEXTS[2], {}),
    "texts": (TEXTS, {}),
    "no texts": ([], {}),
    "an array of texts": (np.array(TEXTS), {}),
    "pairs": ([list(pair) for pair in PAIRS], {}),
    "batches": (TEXTS, {"batch_size": 2, "show_progress_bar": False}),
    "a prompt": (TEXTS, {"prompt": "a prompt of its own: "}),
    "no prompt": (TEXTS, {"prompt": ""}),
    "a named prompt": (TEXTS, {"prompt_name": "query"}),
    "normalized": (TEXTS, {"normalize_embeddings": True}),
    "cut": (TEXTS, {"truncate_dim": 7}),
    "cut and normalized": (TEXTS, {"truncate_dim": 7, "normalize_embeddings": True}),
    "a tensor": (TEXTS, {"convert_to_tensor": True}),
    "a tensor of one text": (TEXTS[2], {"convert_to_tensor": True}),
    "a tensor of no texts": ([], {"convert_to_tensor": True}),
    "tensors": (TEXTS, {"convert_to_numpy": False}),
    "tokens": (TEXTS, {"output_value": "token_embeddings"}),
    "tokens of one text": (TEXTS[2], {"output_value": "token_embeddings"}),
    "bits": (TEXTS, {"precision": "binary"}),
    "unsigned bits": (TEXTS[2], {"precision": "ubinary"}),
}


@pytest.fixture(scope="module", params=["mean", "cut", "dense"])
def both(
    request: pytest.FixtureRequest, root: Path, client: layertap.Client
) -> tuple[layertap.SentenceEncoder, SentenceTransformer]:
    return (
        layertap.SentenceEncoder(client, request.param),
        SentenceTransformer(str(root / request.param), device="cpu"),
    )


@pytest.mark.parametrize("name", CALLS)
def test_encode(both: tuple[layertap.SentenceEncoder, SentenceTransformer], name: str) -> None:
    ours, theirs = both
    inputs, options = CALLS[name]
    if options.get("prompt_name") and "query" not in ours.prompts:
        with pytest.raises(ValueError, match="prompt"):
            ours.encode(inputs, **options)
        return
    same(ours.encode(inputs, **options), theirs.encode(inputs, **options))


def test_integers(both: tuple[layertap.SentenceEncoder, SentenceTransformer]) -> None:
    """Rounding may move a number to the next level."""
    ours, theirs = both
    for precision in ("int8", "uint8"):
        got, expected = (one.encode(TEXTS, precision=precision) for one in (ours, theirs))  # type: ignore[arg-type]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


def test_queries_and_documents(both: tuple[layertap.SentenceEncoder, SentenceTransformer]) -> None:
    ours, theirs = both
    same(ours.encode_query(TEXTS), theirs.encode_query(TEXTS))
    same(ours.encode_query("a", prompt="b "), theirs.encode_query("a", prompt="b "))
    same(ours.encode_document(TEXTS), theirs.encode_document(TEXTS))
    same(
        ours.encode_document(TEXTS, convert_to_tensor=True),
        theirs.encode_document(TEXTS, convert_to_tensor=True),
    )


def test_facts(both: tuple[layertap.SentenceEncoder, SentenceTransformer]) -> None:
    ours, theirs = both
    assert ours.max_seq_length == theirs.max_seq_length
    assert ours.get_embedding_dimension() == theirs.get_embedding_dimension()
    ours.max_seq_length = theirs.max_seq_length = 6
    try:
        same(ours.encode(TEXTS), theirs.encode(TEXTS))
        same(
            ours.encode(TEXTS, output_value="token_embeddings"),
            theirs.encode(TEXTS, output_value="token_embeddings"),
        )
    finally:
        ours._max_tokens = 0
        theirs.max_seq_length = ours.max_seq_length


def test_similarities(both: tuple[layertap.SentenceEncoder, SentenceTransformer]) -> None:
    ours, theirs = both
    vectors = theirs.encode(TEXTS)
    same(ours.similarity(vectors, vectors[:3]), theirs.similarity(vectors, vectors[:3]))
    same(ours.similarity_pairwise(vectors, vectors), theirs.similarity_pairwise(vectors, vectors))


def test_tokenize(both: tuple[layertap.SentenceEncoder, SentenceTransformer]) -> None:
    ours, theirs = both
    expected = theirs.preprocess(TEXTS)
    got = ours.tokenize(TEXTS)
    assert set(got) <= set(expected)
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


# ------------------------------------------------------------------------- CrossEncoder, SparseEncoder


PREDICT: dict[str, tuple[Any, dict[str, Any]]] = {
    "pairs": (PAIRS, {}),
    "lists": ([list(pair) for pair in PAIRS], {}),
    "one pair": (PAIRS[0], {}),
    "no pairs": ([], {}),
    "an array": (np.array(PAIRS), {}),
    "a tensor": (PAIRS, {"convert_to_tensor": True}),
    "a tensor of one pair": (PAIRS[0], {"convert_to_tensor": True}),
    "tensors": (PAIRS, {"convert_to_numpy": False}),
    "logits": (PAIRS, {"activation_fn": torch.nn.Identity()}),
    "softmax": (PAIRS, {"apply_softmax": True}),
}


@pytest.mark.parametrize("model", ["one", "three", *CONFIGURED])
@pytest.mark.parametrize("name", PREDICT)
def test_predict(root: Path, client: layertap.Client, model: str, name: str) -> None:
    ours, theirs = layertap.CrossEncoder(client, model), CrossEncoder(str(root / model), device="cpu")
    inputs, options = PREDICT[name]
    assert ours.num_labels == theirs.num_labels
    same(ours.predict(inputs, **options), theirs.predict(inputs, **options))


def test_a_function_that_is_not_known_must_be_given(client: layertap.Client) -> None:
    """sentence-transformers would take its class from torch; another result must not come without a word."""
    ours = layertap.CrossEncoder(client, "unknown")
    with pytest.raises(layertap.FailedPrecondition, match=r"torch\.nn\.Tanh.*activation_fn"):
        ours.predict(PAIRS)
    same(
        ours.predict(PAIRS, activation_fn="none"),
        layertap.CrossEncoder(client, "one").predict(PAIRS, activation_fn="none"),
    )


def test_rank(root: Path, client: layertap.Client) -> None:
    ours, theirs = layertap.CrossEncoder(client, "one"), CrossEncoder(str(root / "one"), device="cpu")
    for options in ({}, {"top_k": 2, "return_documents": True}):
        same(ours.rank(TEXTS[0], TEXTS[1:], **options), theirs.rank(TEXTS[0], TEXTS[1:], **options))  # type: ignore[arg-type]


SPARSE: dict[str, tuple[Any, dict[str, Any]]] = {
    "texts": (TEXTS, {}),
    "one text": (TEXTS[2], {}),
    "dense": (TEXTS, {"convert_to_sparse_tensor": False}),
    "tensors": (TEXTS, {"convert_to_tensor": False}),
    "limited": (TEXTS, {"max_active_dims": 9}),
    "a prompt": (TEXTS, {"prompt": "to: "}),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_vectors(root: Path, client: layertap.Client, name: str) -> None:
    ours, theirs = layertap.SparseEncoder(client, "splade"), SparseEncoder(str(root / "splade"), device="cpu")
    inputs, options = SPARSE[name]
    same(ours.encode(inputs, **options), theirs.encode(inputs, **options))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of the library's own
def test_what_sparse_vectors_are_used_for(root: Path, client: layertap.Client) -> None:
    ours, theirs = layertap.SparseEncoder(client, "splade"), SparseEncoder(str(root / "splade"), device="cpu")
    vectors = theirs.encode(TEXTS)
    same(ours.similarity(vectors, vectors), theirs.similarity(vectors, vectors))
    same(ours.similarity_pairwise(vectors, vectors), theirs.similarity_pairwise(vectors, vectors))
    same(ours.sparsity(vectors), theirs.sparsity(vectors))
    same(ours.intersection(vectors[0], vectors[1]), theirs.intersection(vectors[0], vectors[1]))
    assert ours.decode(vectors[0], top_k=5) == theirs.decode(vectors[0], top_k=5)
    same(ours.encode_query(TEXTS), theirs.encode_query(TEXTS))
    assert ours.max_seq_length == theirs.max_seq_length
    assert ours.get_embedding_dimension() == theirs.get_embedding_dimension()

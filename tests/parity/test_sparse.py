"""Sparse vectors through a real server, against sentence-transformers' own SparseEncoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling

import heads
from families import sentences
from harness import serve
from heads import array_of
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from server.support import refusal_of

TEXTS = ["", "rain", *sentences()[3:9], " ".join(sentences()[:6])]
CASES = [
    pytest.param(
        family,
        strategy,
        activation,
        marks=() if (family, activation) == ("bert", "relu") else pytest.mark.long,
    )
    for family in ("bert", "distilbert", "modernbert", "mpnet")
    for strategy in ("max", "sum")
    for activation in ("relu", "log1p_relu")
]


def build(
    folder: Path, family: str = "bert", strategy: str = "max", activation: str = "relu", **settings: Any
) -> None:
    heads.build(family, "masked", folder.with_name("plain"))
    modules = [
        Transformer(str(folder.with_name("plain")), transformer_task="fill-mask"),
        SpladePooling(pooling_strategy=strategy, activation_function=activation),  # type: ignore[arg-type]
    ]
    SparseEncoder(modules=modules, device="cpu", **settings).save_pretrained(str(folder))


@contextmanager
def served(folder: Path, **settings: Any) -> Iterator[EncoderServiceStub]:
    with (
        serve({"m": folder}, is_calibrated=False, **settings) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        yield EncoderServiceStub(channel)


def ask(
    stub: EncoderServiceStub, texts: Sequence[str], dtype: int = 1, **outputs: Any
) -> list[pb.EncodeResult]:
    request = pb.EncodeRequest(
        inputs=[pb.Input(text=text) for text in texts],
        outputs=pb.OutputSelection(**outputs),
        wire_dtype=dtype,  # type: ignore[arg-type]
        truncation=pb.TRUNCATION_END,
    )
    return list(stub.Encode(request).results)


def dense(result: pb.EncodeResult, size: int) -> np.ndarray[Any, Any]:
    ids, weights = array_of(result.sparse_ids), array_of(result.sparse_weights)
    assert ids.dtype == np.int32
    assert ids.shape == weights.shape
    assert (weights > 0).all()
    vector = np.zeros(size, np.float32)
    vector[ids] = weights
    return vector


def expected(folder: Path, **settings: Any) -> np.ndarray[Any, Any]:
    """(texts, words) as sentence-transformers computes it."""
    theirs = SparseEncoder(str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    rows = [theirs.encode(text, convert_to_sparse_tensor=False, **settings) for text in TEXTS]
    return np.stack([row.numpy() for row in rows])


@pytest.mark.parametrize(("family", "strategy", "activation"), CASES)
def test_vectors_alone_and_beside_every_other_output(
    tmp_path: Path, family: str, strategy: str, activation: str
) -> None:
    folder = tmp_path / "sparse"
    build(folder, family, strategy, activation)
    theirs = expected(folder)
    size = theirs.shape[1]
    with served(folder) as stub, ThreadPoolExecutor(8) as pool:
        everything: dict[str, Any] = {
            "last_hidden_state": True,
            "hidden_states": pb.HiddenStateSelection(layers=[0]),
            "attentions": pb.AttentionSelection(layers=[0]),
            "embeddings": [pb.EmbeddingSpec(pooling=pb.POOLING_MEAN)],
            "logits": pb.LogitsSelection(top_k=1),
        }
        calls = []
        for number in range(12):
            top_k, dtype = (0, 5, 40)[number % 3], 1 + number % 2
            asked = pb.SparseSelection(top_k=top_k)
            more = everything if number % 2 else {}
            calls.append((top_k, dtype, pool.submit(ask, stub, TEXTS, dtype, sparse=asked, **more)))
            pool.submit(
                ask, stub, TEXTS, **{name: everything[name] for name in list(everything)[: 1 + number % 5]}
            )
        for top_k, dtype, call in calls:
            for result, wanted in zip(call.result(), theirs, strict=True):
                rtol, atol = 1e-4 + (2.0**-11 if dtype == 2 else 0), 2e-5
                given = dense(result, size)
                if not top_k:
                    np.testing.assert_allclose(given, wanted, rtol=rtol, atol=atol)
                    assert (np.diff(array_of(result.sparse_ids)) > 0).all()
                    continue
                highest = np.sort(wanted)[::-1][:top_k]
                weights = array_of(result.sparse_weights)
                assert (np.diff(weights) <= 0).all()
                np.testing.assert_allclose(weights, highest[highest > 0], rtol=rtol, atol=atol)
                np.testing.assert_allclose(given[given > 0], wanted[given > 0], rtol=rtol, atol=atol)


def test_in_bfloat16_and_sent_as_bfloat16(tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    build(folder)
    theirs = expected(folder)
    with served(folder, dtype="bfloat16") as stub:
        results = ask(stub, TEXTS, pb.DATA_TYPE_BFLOAT16, sparse=pb.SparseSelection())
    given = np.stack([dense(result, theirs.shape[1]) for result in results])
    assert np.linalg.norm(given - theirs) <= 3e-2 * np.linalg.norm(theirs)


@pytest.mark.long
def test_the_most_entries_that_the_files_configure(tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    build(folder, max_active_dims=9)
    theirs = expected(folder)
    assert ((theirs > 0).sum(1) <= 9).all()
    more = expected(folder, max_active_dims=30)
    with served(folder) as stub:
        for result, wanted in zip(ask(stub, TEXTS, sparse=pb.SparseSelection()), theirs, strict=True):
            assert (np.diff(array_of(result.sparse_ids)) > 0).all()
            np.testing.assert_allclose(dense(result, theirs.shape[1]), wanted, rtol=1e-4, atol=2e-5)
        for result, wanted in zip(ask(stub, TEXTS, sparse=pb.SparseSelection(top_k=30)), more, strict=True):
            np.testing.assert_allclose(dense(result, theirs.shape[1]), wanted, rtol=1e-4, atol=2e-5)


def older(folder: Path) -> None:
    """The files as sentence-transformers 5.0 wrote them."""
    package = "sentence_transformers.sparse_encoder.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{package}.MLMTransformer"},
        {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": f"{package}.SpladePooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    settings = {"max_seq_length": 20, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings), "utf-8")
    pooling = {"pooling_strategy": "sum", "activation_function": "relu", "word_embedding_dimension": 505}
    (folder / "1_SpladePooling" / "config.json").write_text(json.dumps(pooling), "utf-8")


def test_older_files(tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    build(folder)
    older(folder)
    theirs = expected(folder)
    with served(folder) as stub:
        results = ask(stub, TEXTS[:-1], sparse=pb.SparseSelection())
        [model] = stub.ListModels(pb.ListModelsRequest()).models
    assert (model.has_sparse, model.head) == (True, pb.HEAD_KIND_MASKED_LANGUAGE)
    assert "SparseEncoder" in model.embedding_unsupported
    for result, wanted in zip(results, theirs, strict=False):
        if result.token_count <= 20:
            np.testing.assert_allclose(dense(result, theirs.shape[1]), wanted, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root") / "sparse"
    build(folder)
    return folder


def edit(file: Path, change: Any) -> None:
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


REFUSED = {
    "a module of another kind": (
        "modules.json",
        lambda modules: modules[1].update(
            type="sentence_transformers.sparse_encoder.modules.SparseAutoEncoder"
        ),
        "SparseAutoEncoder",
    ),
    "a router": (
        "modules.json",
        lambda modules: modules[0].update(type="sentence_transformers.base.modules.Router"),
        "Router",
    ),
    "one more module": (
        "modules.json",
        lambda modules: modules.append({**modules[1], "type": "sentence_transformers.models.Normalize"}),
        "Normalize",
    ),
    "another strategy": (
        "1_SpladePooling/config.json",
        lambda config: config.update(pooling_strategy="median"),
        "'median'",
    ),
    "another activation": (
        "1_SpladePooling/config.json",
        lambda config: config.update(activation_function="elu"),
        "'elu'",
    ),
    "another task": (
        "sentence_bert_config.json",
        lambda config: config.update(transformer_task="feature-extraction"),
        "'feature-extraction'",
    ),
    "another limit": (
        "config_sentence_transformers.json",
        lambda config: config.update(max_active_dims=0),
        "0",
    ),
}


@pytest.mark.parametrize("what", [*REFUSED, "top_k", "no head"])
def test_refusals(sparse: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(sparse, folder)
    request = pb.EncodeRequest(
        inputs=[pb.Input(text="rain")], outputs=pb.OutputSelection(sparse=pb.SparseSelection())
    )
    if what == "top_k":
        with served(folder) as stub:
            request.outputs.sparse.top_k = 506
            refusal = refusal_of(stub.Encode, request)
        assert (refusal.reason, refusal.fields) == ("OUT_OF_RANGE", ["outputs.sparse.top_k"])
        assert "506" in refusal.message
        return
    said = "its masked-language head is not served: the checkpoint lacks weights of it"
    if what == "no head":
        weights_file = folder / "model.safetensors"
        weights = {
            name: weight for name, weight in load_file(weights_file).items() if not name.startswith("cls.")
        }
        save_file(weights, weights_file, {"format": "pt"})
    else:
        file, change, said = REFUSED[what]
        edit(folder / file, change)
    with served(folder) as stub:
        refusal = refusal_of(stub.Encode, request)
        [model] = stub.ListModels(pb.ListModelsRequest()).models
        [result] = ask(stub, ["rain"], embeddings=[pb.EmbeddingSpec(pooling=pb.POOLING_MEAN)])
    assert (refusal.reason, refusal.fields, model.has_sparse) == ("NO_SPARSE", ["outputs.sparse"], False)
    assert said in refusal.message
    assert result.embeddings

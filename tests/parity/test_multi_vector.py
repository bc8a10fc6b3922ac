"""Token vectors of multi-vector (ColBERT) models are what sentence-transformers' `MultiVectorEncoder` gives, whose
folders and PyLate's are read."""

from __future__ import annotations

import json
import logging
import re
import shutil
import string
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from selections import array_of, input_message
from transformers import AddedToken, AutoModel, AutoTokenizer

import layertap
from families import HIDDEN_SIZE, build, sentences
from harness import Running, serve
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.engine.loading.sentence_transformers import read_embedding_config
from server.support import WAIT_S

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    multi_vector = pytest.importorskip("sentence_transformers.multi_vector_encoder.model")
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

NARROW = 20
TEXTS = [
    "Short.",
    "the CASE of: its letters!",
    *(" ".join(sentences()[40 + i : 41 + i * 3]) for i in range(5)),
]
PUNCTUATION = list(string.punctuation)


def dense(size: int, into: int, activation: torch.nn.Module | None = None, **options: Any) -> torch.nn.Module:
    module = Dense(
        size,
        into,
        activation_function=activation or torch.nn.Identity(),
        module_input_name="token_embeddings",
        **options,
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return module


def edit(folder: Path, filename: str, **changes: Any) -> None:
    path = folder / filename
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, **changes}))


@dataclass(frozen=True, slots=True)
class Case:
    """A folder of a multi-vector model: its modules behind the model, and what is then changed in it."""

    modules: Callable[[], list[torch.nn.Module]]
    family: str = "bert"
    transformer: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    changes: Callable[[Path], None] | None = None
    # What the log says that the caller has to do.
    left: tuple[str, ...] = ()


def plain() -> list[torch.nn.Module]:
    return [
        dense(HIDDEN_SIZE, NARROW, bias=False),
        MultiVectorMask(),
        Normalize(module_input_name="token_embeddings"),
    ]


def pylate(folder: Path, **settings: Any) -> None:
    """As PyLate saves it: a Dense of its own, no mask and no norm, and all settings in one file."""
    modules = json.loads((folder / "modules.json").read_text())[:2]
    modules[0]["type"] = "sentence_transformers.models.Transformer"
    modules[1]["type"] = "pylate.models.Dense.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))
    path = folder / modules[1]["path"] / "config.json"
    config = json.loads(path.read_text())
    kept = ("in_features", "out_features", "bias", "activation_function")
    path.write_text(json.dumps({key: config[key] for key in kept}))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 60, "do_lower_case": False})
    )
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"model_type": "ColBERT", "prompts": {}, "similarity_fn_name": "MaxSim", **settings})
    )


def with_markers(folder: Path) -> None:
    """[Q] and [D] as PyLate adds them to a vocabulary, in which "[unused0]" would be as well."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("[Q] "), AddedToken("[D] ")])
    tokenizer.save_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.nn.init.normal_(model.get_input_embeddings().weight.data[-2:])
    model.save_pretrained(folder)


COLBERT = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 32, "document_length": 24}
CASES: dict[str, Case] = {
    "native": Case(plain, options={"prompts": {"query": "find: ", "document": "text: "}}),
    "windows": Case(plain, family="modernbert"),
    "padded": Case(plain, family="mpnet"),
    "lengths": Case(
        plain,
        transformer={"document_length": 18, "query_length": 9},
        left=("to limit queries to 9 tokens (max_tokens)",),
    ),
    "two": Case(
        lambda: [
            dense(HIDDEN_SIZE, 48, torch.nn.GELU(), use_residual=True),
            Normalize(module_input_name="token_embeddings"),
            dense(48, NARROW),
        ]
    ),
    "no-dense": Case(lambda: [MultiVectorMask(), Normalize(module_input_name="token_embeddings")]),
    "masked": Case(
        lambda: [dense(HIDDEN_SIZE, NARROW, bias=False), MultiVectorMask(skiplist_words=PUNCTUATION)],
        transformer={"query_expansion": {"strategy": "fixed", "attend": True, "length": 16}},
        left=(
            "to drop the vectors of a document's 32 skipped words",
            "to fill up queries to 16 tokens with mask tokens",
        ),
    ),
    "unseen-masks": Case(
        plain,
        transformer={"query_expansion": {"strategy": "fixed", "attend": False, "length": 60}},
        left=(
            "to fill up queries to 60 tokens with mask tokens (to which the others would not attend; here they do)",
        ),
    ),
    "pylate": Case(
        lambda: [dense(HIDDEN_SIZE, NARROW, bias=False)],
        changes=lambda folder: (
            with_markers(folder),
            pylate(folder, **COLBERT, do_query_expansion=False, skiplist_words=[]),
        )[0],
        left=("to limit queries to 32 tokens (max_tokens)",),
    ),
    "pylate-as-usual": Case(
        lambda: [dense(HIDDEN_SIZE, NARROW, bias=False)],
        changes=lambda folder: pylate(folder, **COLBERT, attend_to_expansion_tokens=True),
        left=(
            "to drop the vectors of a document's 32 skipped words",
            "to fill up queries to 32 tokens with mask tokens",
        ),
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("multi-vector")
    for name, case in CASES.items():
        build(case.family, root / f"base-{name}")
        transformer = Transformer(str(root / f"base-{name}"), **case.transformer)
        model = multi_vector.MultiVectorEncoder(
            modules=[transformer, *case.modules()], device="cpu", **case.options
        )
        model.save(str(root / name), create_model_card=False)
        if case.changes is not None:
            case.changes(root / name)
        shutil.rmtree(root / f"base-{name}")
    return root


@pytest.fixture(scope="module")
def log() -> Iterator[list[str]]:
    """What the servers of this module have logged."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Kept(), logging.getLogger("layertap_server")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="module")
def running(root: Path, log: list[str]) -> Iterator[Running]:
    with serve({name: root / name for name in CASES}, threads=1, is_calibrated=False) as running:
        yield running


@pytest.fixture(scope="module")
def stub(running: Running) -> Iterator[EncoderServiceStub]:
    with grpc.insecure_channel(running.address) as channel:
        yield EncoderServiceStub(channel)


@cache
def library_model(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return multi_vector.MultiVectorEncoder(str(folder), device="cpu")


def encode(
    stub: EncoderServiceStub, model: str, items: list[Any], prompt: str = "", **fields: Any
) -> list[pb.EncodeResult]:
    fields.setdefault("outputs", pb.OutputSelection(embeddings=[pb.EmbeddingSpec()], tokens=True))
    request = pb.EncodeRequest(
        model=model,
        inputs=[input_message(item) for item in items],
        truncation=pb.TRUNCATION_END,
        prompt_name=prompt,
        **fields,
    )
    return list(stub.Encode(request, timeout=WAIT_S).results)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


def prompt_of(model: Any, name: str) -> str:
    """The prompt's name, if the model has one that is not empty."""
    return name if model.prompts.get(name) else ""


@pytest.mark.parametrize("name", CASES)
def test_documents(root: Path, stub: EncoderServiceStub, name: str) -> None:
    """Each alone and all in one batch; without the rows that the library drops by their token."""
    model = library_model(root / name)
    expected = model.encode_document(TEXTS, convert_to_numpy=True)
    [mask] = [module for module in model if isinstance(module, MultiVectorMask)] or [MultiVectorMask()]
    skipped = set() if mask._skiplist_ids is None else set(mask._skiplist_ids.tolist())
    prompt = prompt_of(model, "document")
    batch = encode(stub, name, TEXTS, prompt)
    for text, in_batch, wanted in zip(TEXTS, batch, expected, strict=True):
        [alone] = encode(stub, name, [text], prompt)
        for got in (alone, in_batch):
            kept = [token not in skipped for token in got.tokens.ids]
            same(array_of(got.embeddings[0])[kept], wanted)


@pytest.mark.parametrize("name", CASES)
def test_queries(root: Path, stub: EncoderServiceStub, name: str) -> None:
    """Filled up by the caller, where the model is configured for it and attends to the mask tokens."""
    model = library_model(root / name)
    expected = model.encode_query(TEXTS, convert_to_numpy=True)
    expansion, limit = model[0].query_expansion, model[0].query_length
    length = expansion["length"] if expansion else limit or 0
    results = encode(stub, name, TEXTS, prompt_of(model, "query"), max_tokens=length)
    if expansion and not expansion["attend"]:
        # The vectors of the query itself are the same: its tokens do not attend to the mask tokens.
        expected = [wanted[: one.token_count] for one, wanted in zip(results, expected, strict=True)]
    elif expansion:
        filled = [
            layertap.TokenIds(
                [*one.tokens.ids] + [model.tokenizer.mask_token_id] * (length - one.token_count)
            )
            for one in results
        ]
        results = encode(stub, name, filled, max_tokens=length)
    for got, wanted in zip(results, expected, strict=True):
        same(array_of(got.embeddings[0]), wanted)


def test_in_mixed_batches_and_other_forms(root: Path, stub: EncoderServiceStub) -> None:
    name, text = "native", TEXTS[3]
    # With the token vectors of the model's own, cut and encoded, and other outputs.
    specs = [
        pb.EmbeddingSpec(),
        pb.EmbeddingSpec(without_projection=True),
        pb.EmbeddingSpec(dimensions=8),
        pb.EmbeddingSpec(encoding=pb.EMBEDDING_ENCODING_FLOAT16),
        pb.EmbeddingSpec(exclude_special_tokens=True),
        pb.EmbeddingSpec(pooling=pb.POOLING_MEAN, normalize=False),
    ]
    outputs = pb.OutputSelection(embeddings=specs, last_hidden_state=True, tokens=True)
    [whole, *_] = encode(stub, name, [text, *TEXTS], outputs=outputs)
    vectors, own, cut, half, inner, mean = map(array_of, whole.embeddings)
    last = array_of(whole.last_hidden_state)
    same(vectors, library_model(root / name).encode([text], convert_to_numpy=True)[0])
    same(own, last / np.linalg.norm(last, axis=-1, keepdims=True))
    same(cut, vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=-1, keepdims=True))
    np.testing.assert_allclose(half.astype(np.float32), vectors, atol=1e-3)
    same(inner, vectors[~np.array(whole.tokens.special)])
    same(mean, last.mean(0))


@pytest.mark.parametrize("name", CASES)
def test_what_the_model_and_the_log_say(
    root: Path, stub: EncoderServiceStub, log: list[str], name: str
) -> None:
    facts = stub.GetModel(pb.GetModelRequest(model=name)).model
    assert facts.default_pooling == pb.POOLING_NONE
    assert facts.embedding_unsupported == ""
    assert facts.embedding_size == (HIDDEN_SIZE if name == "no-dense" else NARROW)
    assert facts.default_normalize == (name not in ("two", "masked"))
    said = [line for line in log if line.startswith(f"{name}: ") and "left to the caller" in line]
    assert [line.partition("left to the caller: ")[2] for line in said] == ["; ".join(CASES[name].left)][
        : len(CASES[name].left)
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda folder: edit(folder, "2_MultiVectorMask/config.json", keep_only_token_ids=[7]),
            "some tokens",
        ),
        (lambda folder: add(folder, "sentence_transformers.models.Pooling"), "Pooling module behind"),
        (lambda folder: add(folder, "sentence_transformers.multi_vector_encoder.Pool"), "Pool.*unknown"),
        (lambda folder: edit(folder, "sentence_bert_config.json", document_length="long"), "document_length"),
    ],
    ids=["image tokens", "pooling", "unknown", "length"],
)
def test_what_cannot_be_given_has_a_reason(
    root: Path, tmp_path: Path, change: Callable[[Path], None], reason: str
) -> None:
    shutil.copytree(root / "native", tmp_path / "model")
    change(tmp_path / "model")
    assert re.search(reason, read_embedding_config(str(tmp_path / "model")).unsupported)


def add(folder: Path, kind: str) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": len(modules), "name": "other", "path": "9_Other", "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))


def test_a_checkpoint_of_stanford_is_not_taken_for_a_mean(tmp_path: Path) -> None:
    build("bert", tmp_path)
    edit(tmp_path, "config.json", architectures=["HF_ColBERT"])
    assert "stanford" in read_embedding_config(str(tmp_path)).unsupported

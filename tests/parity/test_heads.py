"""The scores of every kind of head through a real server, against the checkpoint's own class in transformers: alone, and
in batches where other texts ask for everything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder

import families
import heads
from families import MAX_TOKENS, sentences
from harness import Running, serve
from heads import array_of, own_logits
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from server.support import refusal_of

KINDS = ("sequence", "token", "masked")
FAMILIES = (
    "bert", "roberta", "xlm_roberta", "camembert", "distilbert", "electra", "albert", "modernbert", "deberta_v2",
    "esm", "mpnet", "nomic_bert", "ernie", "eurobert", "deberta", "jina_embeddings_v3",
)  # fmt: skip
# Classification heads that read more than the first token.
POOLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert mean": ("modernbert", {"classifier_pooling": "mean"}),
    "eurobert late": ("eurobert", {"classifier_pooling": "late"}),
    "eurobert bos": ("eurobert", {"classifier_pooling": "bos"}),
}
CASES = [(family, kind, {}) for family in FAMILIES for kind in KINDS]
CASES += [(family, "sequence", settings) for family, settings in POOLINGS.values()]
# `make test` takes these, and in bfloat16 the latter.
QUICK = (
    "bert sequence",
    "bert masked",
    "albert sequence",
    "modernbert sequence mean",
    "deberta_v2 masked",
    "esm token",
)
QUICK_BFLOAT16 = ("bert masked", "deberta_v2 sequence")
ROUNDING = {pb.DATA_TYPE_FLOAT32: 0.0, pb.DATA_TYPE_FLOAT16: 2.0**-11, pb.DATA_TYPE_BFLOAT16: 2.0**-8}
LENGTHS = (1, 3, 9, 20, 21, 40, MAX_TOKENS)

Text = tuple[list[int], list[int] | None]


def name_of(case: tuple[str, str, dict[str, Any]]) -> str:
    return " ".join([case[0], case[1], *map(str, case[2].values())])


def parameters(quick: Sequence[str]) -> list[Any]:
    names = map(name_of, CASES)
    return [
        pytest.param(case, id=name, marks=() if name in quick else pytest.mark.long)
        for case, name in zip(CASES, names, strict=True)
    ]


def softmax(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.from_numpy(rows).softmax(-1).numpy()


def sigmoid(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.from_numpy(rows).sigmoid().numpy()


ACTIVATIONS = {
    pb.ACTIVATION_UNSPECIFIED: lambda rows: rows,
    pb.ACTIVATION_NONE: lambda rows: rows,
    pb.ACTIVATION_SOFTMAX: softmax,
    pb.ACTIVATION_SIGMOID: sigmoid,
}


class Served:
    """A server over one tiny checkpoint with a head, and the checkpoint's own class."""

    def __init__(self, folder: Path, case: tuple[str, str, dict[str, Any]], **settings: Any) -> None:
        family, self.kind, own = case
        heads.build(family, self.kind, folder, **own, **settings)
        self.folder = folder
        self.model = heads.read(folder, self.kind)
        self.num_types = getattr(self.model.config, "type_vocab_size", 0) if family != "distilbert" else 0

    def texts(self) -> list[Text]:
        draw = np.random.default_rng(7)
        vocab_size = min(self.model.config.vocab_size, 300)
        ids = [draw.integers(5, vocab_size, length).tolist() for length in LENGTHS]
        if self.model.config.model_type == "esm":  # its first letters
            ids = [[5 + one % 20 for one in text] for text in ids]
        return [
            (one, [i * 2 // len(one) for i in range(len(one))] if self.num_types > 1 else None) for one in ids
        ]

    def ask(self, stub: EncoderServiceStub, texts: Sequence[Text], **outputs: Any) -> list[pb.EncodeResult]:
        dtype = outputs.pop("wire_dtype", 0)
        inputs = [pb.Input(token_ids=pb.TokenIds(ids=ids, type_ids=types)) for ids, types in texts]
        request = pb.EncodeRequest(inputs=inputs, outputs=pb.OutputSelection(**outputs), wire_dtype=dtype)
        return list(stub.Encode(request).results)


@pytest.fixture
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Served:
    return Served(tmp_path, request.param)


@contextmanager
def stub_of(running: Running) -> Iterator[EncoderServiceStub]:
    with grpc.insecure_channel(running.address) as channel:
        yield EncoderServiceStub(channel)


def check(
    result: pb.EncodeResult, logits: np.ndarray[Any, Any], asked: pb.LogitsSelection, dtype: int = 1
) -> None:
    """Compares with (labels,) or (T, labels) of the checkpoint's own class."""
    rows = logits if not asked.positions else logits[list(asked.positions)]
    wanted = ACTIVATIONS[asked.activation](rows)
    actual = array_of(result.logits).astype(np.float32)
    if asked.top_k:
        ids = array_of(result.logit_ids)
        assert ids.shape == (*rows.shape[:-1], asked.top_k)
        assert all(len(set(row)) == asked.top_k for row in ids.reshape(-1, asked.top_k).tolist())
        # Equal scores may stand in either order.
        np.testing.assert_allclose(
            np.take_along_axis(rows, ids, -1), -np.sort(-rows, -1)[..., : asked.top_k], rtol=1e-4, atol=1e-4
        )
        wanted = np.take_along_axis(wanted, ids, -1)
    else:
        assert not result.HasField("logit_ids")
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=1e-4 + ROUNDING[dtype], atol=5e-5)


def selections(kind: str, num_labels: int) -> list[pb.LogitsSelection]:
    positions = [[]] if kind == "sequence" else [[], [-1], [0, -1, 0]]
    return [
        pb.LogitsSelection(positions=some, top_k=top_k, activation=activation)
        for some in positions
        for top_k in (0, 1, min(num_labels, 7))
        for activation in ACTIVATIONS
    ]


@pytest.mark.parametrize("served", parameters(QUICK), indirect=True)
def test_scores_alone_and_beside_every_other_output(served: Served) -> None:
    texts = served.texts()
    own = [own_logits(served.model, *text) for text in texts]
    with (
        serve({"m": served.folder}, is_calibrated=False) as running,
        stub_of(running) as stub,
        ThreadPoolExecutor(8) as pool,
    ):
        facts = running.models["m"].facts
        for text, logits in zip(texts, own, strict=True):
            [result] = served.ask(stub, [text], logits=pb.LogitsSelection())
            check(result, logits, pb.LogitsSelection())
        others: list[dict[str, Any]] = [
            {"last_hidden_state": True},
            {"hidden_states": pb.HiddenStateSelection(layers=[0, 1])},
            {"embeddings": [pb.EmbeddingSpec()]},
        ]
        others += [{"attentions": pb.AttentionSelection()}] if facts.has_attentions else []
        others += [{"pooler_output": True}] if facts.has_pooler else []
        everything: dict[str, Any] = {key: value for one in others for key, value in one.items()}
        calls = []
        for number, asked in enumerate(selections(served.kind, own[0].shape[-1])):
            dtype = list(ROUNDING)[number % 3]
            more = everything if number % 2 else {}
            calls.append(
                (asked, dtype, pool.submit(served.ask, stub, texts, logits=asked, wire_dtype=dtype, **more))
            )
            pool.submit(served.ask, stub, texts, **others[number % len(others)])
        for asked, dtype, call in calls:
            for result, logits in zip(call.result(), own, strict=True):
                check(result, logits, asked, dtype)


@pytest.mark.parametrize("served", parameters(QUICK_BFLOAT16), indirect=True)
def test_scores_in_bfloat16(served: Served, tmp_path: Path) -> None:
    texts = served.texts()
    with (
        serve({"m": served.folder}, is_calibrated=False, dtype="bfloat16") as running,
        stub_of(running) as stub,
    ):
        results = served.ask(stub, texts, logits=pb.LogitsSelection(), last_hidden_state=True)
    own = np.concatenate([np.atleast_2d(own_logits(served.model, *text)) for text in texts])
    actual = np.concatenate([np.atleast_2d(array_of(result.logits)) for result in results])
    assert np.linalg.norm(actual - own) <= 3e-2 * np.linalg.norm(own)


# ------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def heads_stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncoderServiceStub]:
    """Of a server over a tiny BERT with each kind of head, one without, and one whose head lacks a weight."""
    root = tmp_path_factory.mktemp("heads")
    folders = {kind: root / kind for kind in (*KINDS, "none", "lacking")}
    for kind in KINDS:
        heads.build("bert", kind, folders[kind])
    families.build("bert", folders["none"], num_layers=2)
    heads.build("bert", "sequence", folders["lacking"])
    file = folders["lacking"] / "model.safetensors"
    save_file(
        {name: weight for name, weight in load_file(file).items() if name != "classifier.bias"},
        file,
        {"format": "pt"},
    )
    with serve(folders, is_calibrated=False) as running, stub_of(running) as stub:
        yield stub


@pytest.mark.parametrize(
    ("model", "asked", "reason", "field", "said"),
    [
        ("none", {}, "NO_HEAD", "outputs.logits", "its checkpoint has none"),
        (
            "lacking",
            {},
            "NO_HEAD",
            "outputs.logits",
            "the checkpoint lacks weights of it, such as 'classifier.bias'",
        ),
        (
            "sequence",
            {"positions": [0]},
            "NO_TOKEN_LOGITS",
            "outputs.logits.positions",
            "scores the whole input",
        ),
        ("sequence", {"top_k": 4}, "OUT_OF_RANGE", "outputs.logits.top_k", "4 is more than the head's 3"),
        ("token", {"positions": [1, 3]}, "OUT_OF_RANGE", "outputs.logits.positions[1]", "3"),
        ("masked", {"positions": [-4]}, "OUT_OF_RANGE", "outputs.logits.positions[0]", "-4"),
        ("masked", {"activation": 9}, "UNKNOWN_ENUM", "outputs.logits.activation", "9"),
    ],
)
def test_refusals(
    heads_stub: EncoderServiceStub, model: str, asked: dict[str, Any], reason: str, field: str, said: str
) -> None:
    request = pb.EncodeRequest(
        model=model,
        inputs=[pb.Input(token_ids=pb.TokenIds(ids=[5, 6, 7]))],
        outputs=pb.OutputSelection(logits=pb.LogitsSelection(**asked)),
    )
    refusal = refusal_of(heads_stub.Encode, request)
    assert (refusal.reason, refusal.fields) == (reason, [field])
    assert said in refusal.message


def test_the_facts_of_a_head(heads_stub: EncoderServiceStub) -> None:
    models = {model.name: model for model in heads_stub.ListModels(pb.ListModelsRequest()).models}
    assert {name: (model.head, list(model.labels)) for name, model in models.items()} == {
        "sequence": (pb.HEAD_KIND_SEQUENCE_CLASSIFICATION, list(heads.LABELS)),
        "token": (pb.HEAD_KIND_TOKEN_CLASSIFICATION, list(heads.LABELS)),
        "masked": (pb.HEAD_KIND_MASKED_LANGUAGE, []),
        "none": (pb.HEAD_KIND_UNSPECIFIED, []),
        "lacking": (pb.HEAD_KIND_UNSPECIFIED, []),
    }


# --------------------------------------------------------------------------------------- cross-encoders


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_cross_encoder_scores_pairs_as_sentence_transformers_does(tmp_path: Path, num_labels: int) -> None:
    heads.build("bert", "sequence", tmp_path / "plain", labels=heads.LABELS[:num_labels])
    theirs = CrossEncoder(str(tmp_path / "plain"), device="cpu")
    theirs.save_pretrained(str(tmp_path / "saved"))
    pairs = [(a, b) for a in sentences()[3:5] for b in sentences()[5:9]]
    for folder in ("plain", "saved"):
        with serve({"m": tmp_path / folder}, is_calibrated=False) as running, stub_of(running) as stub:
            request = pb.EncodeRequest(
                inputs=[pb.Input(pair=pb.TextPair(first=first, second=second)) for first, second in pairs],
                outputs=pb.OutputSelection(logits=pb.LogitsSelection()),
                truncation=pb.TRUNCATION_END,
            )
            raw = np.stack([array_of(result.logits) for result in stub.Encode(request).results])
            request.outputs.logits.activation = pb.ACTIVATION_SIGMOID
            scores = np.stack([array_of(result.logits) for result in stub.Encode(request).results])
        expected = theirs.predict(pairs, activation_fn=torch.nn.Identity())
        np.testing.assert_allclose(raw.reshape(expected.shape), expected, rtol=1e-4, atol=2e-5)
        expected = theirs.predict(pairs, activation_fn=torch.nn.Sigmoid())
        np.testing.assert_allclose(scores.reshape(expected.shape), expected, rtol=1e-4, atol=2e-5)

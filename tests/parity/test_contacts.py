"""Contact maps of protein models: equal to `predict_contacts` of transformers, however they are computed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from selections import array_of, input_message
from transformers import AutoConfig, AutoModel, AutoTokenizer, EsmForMaskedLM

import layertap
from families import MAX_TOKENS, build
from harness import serve
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.engine import attention, contacts, engine_for, load_model
from layertap_server.engine.loading import load as loading
from layertap_server.engine.model import LoadedModel
from layertap_server.enums import DType
from layertap_server.output_plans import AttentionPlan
from layertap_server.plan import OutputPlan, Work
from server.support import WAIT_S, refusal_of

EOS = 2
TEXTS = ["M", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "AC", "ACDEFGHIKLMNPQRSTVWY", "MK<mask>AY", "L" * 60]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models so small gain nothing by more, and wait for each other's threads where a machine is busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("proteins")
    folders = {name: root / name for name in ("esm", "esm_absolute")}
    for name, folder in folders.items():
        build(name, folder)
    folders["of a masked language model"] = root / "masked"
    build("esm", root / "masked")
    model = EsmForMaskedLM(AutoConfig.from_pretrained(root / "masked"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(root / "masked")
    return folders


def own(folder: Path) -> tuple[Any, Any]:
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    return AutoTokenizer.from_pretrained(folder), model


@torch.no_grad()
def expected_of(model: Any, ids: list[int]) -> np.ndarray:
    """(T-2, T-2)"""
    tokens = torch.tensor([ids])
    return model.predict_contacts(tokens, torch.ones_like(tokens))[0].numpy()


def loaded_of(folder: Path, **options: Any) -> LoadedModel:
    options = {"device": "cpu", "dtype": "float32", **options}
    return load_model("esm", str(folder), trust_remote_code=False, max_input_tokens=0, **options)


def works_of(all_ids: list[list[int]], plan: OutputPlan) -> list[Work]:
    return [Work(np.array(ids), None, plan, plan.specs(len(ids), 32)) for ids in all_ids]


CONTACTS = OutputPlan(DType.FLOAT32, contacts=True)
MANY_IDS = [[0, *range(4, 4 + length), EOS] for length in (1, 2, 17, 9, 20)] + [
    [0, 5, 6, EOS, 7, 8, EOS, 9, EOS],  # as of two chains
    [5, 6, 7, 8],  # without special tokens: the outer two are left out all the same
    [EOS] * 3,
    [5 + place % 20 for place in range(MAX_TOKENS)],
]


@pytest.mark.parametrize("way", ["native", "torch", "padded", "a head at a time"])
@pytest.mark.parametrize("name", ["esm", "esm_absolute", "of a masked language model"])
def test_equal_to_the_model(
    folders: dict[str, Path], name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "padded":
        monkeypatch.setattr(loading, "FAMILIES", {})
    elif way == "torch":
        monkeypatch.setattr(attention, "kernel_for", lambda *_: None)
    elif way == "a head at a time":
        monkeypatch.setattr(contacts, "MAP_SCRATCH_BYTES", 1)
    loaded = loaded_of(folders[name])
    assert loaded.facts.has_contacts
    assert loaded.facts.packed == (way != "padded")
    _, model = own(folders[name])
    engine = engine_for(loaded)
    together = engine.run(works_of(MANY_IDS, CONTACTS))
    for ids, (in_batch,) in zip(MANY_IDS, together, strict=True):
        expected = expected_of(model, ids)
        [[alone]] = engine.run(works_of([ids], CONTACTS))
        for got in (alone, in_batch):
            assert got.data.shape == (len(ids) - 2,) * 2
            np.testing.assert_allclose(got.data, expected, rtol=1e-4, atol=2e-5)
    assert np.isnan(together[MANY_IDS.index([EOS] * 3)][0].data).all()


def test_maps_of_the_same_text_are_as_without_it(folders: dict[str, Path]) -> None:
    loaded = loaded_of(folders["esm"])
    maps = AttentionPlan((0, 3), (1, 2), False, (0, 2), key_positions=(1, 0))
    both = OutputPlan(DType.FLOAT32, last_hidden_state=True, attentions=maps, contacts=True)
    engine = engine_for(loaded)
    [together] = engine.run(works_of(MANY_IDS[2:3], both))
    [alone] = engine.run(works_of(MANY_IDS[2:3], replace(both, contacts=False)))
    [[contact]] = engine.run(works_of(MANY_IDS[2:3], CONTACTS))
    for got, expected in zip(together, [*alone, contact], strict=True):
        np.testing.assert_allclose(got.data, expected.data, atol=1e-6)


def test_nan_comes_through_as_in_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of one token's embedding; texts without that token are not affected."""
    folder = tmp_path / "nan"
    build("esm", folder)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    engine, (_, model) = engine_for(loaded_of(folder)), own(folder)
    all_ids = [[0, 5, 6, 8, EOS], [0, 5, 7, 8, EOS]]
    for ids, (got,) in zip(all_ids, engine.run(works_of(all_ids, CONTACTS)), strict=True):
        np.testing.assert_allclose(got.data, expected_of(model, ids), rtol=1e-4, atol=2e-5)
        assert np.isnan(got.data).all() == (7 in ids)


def test_in_16_bits(tmp_path: Path) -> None:
    folder = tmp_path / "gentle"
    build("esm", folder, num_layers=2, gain=0.5)
    _, model = own(folder)
    engine = engine_for(loaded_of(folder, dtype="bfloat16"))
    assert engine.facts.has_contacts
    for ids, (got,) in zip(MANY_IDS[:7], engine.run(works_of(MANY_IDS[:7], CONTACTS)), strict=True):
        expected = expected_of(model, ids)
        error = np.linalg.norm(got.data - expected) / np.linalg.norm(expected)
        assert error <= 1e-2


# ------------------------------------------------------------------------------ by the server


@pytest.fixture(scope="module")
def stub(folders: dict[str, Path]) -> Iterator[EncoderServiceStub]:
    with (
        serve({"esm": folders["esm"]}, is_calibrated=False) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        yield EncoderServiceStub(channel)


def request(*items: Any, **fields: Any) -> pb.EncodeRequest:
    outputs = pb.OutputSelection(contacts=True, **fields)
    return pb.EncodeRequest(inputs=[input_message(item) for item in items], outputs=outputs)


@pytest.mark.parametrize("dtype", [1, 2, 3], ids=["float32", "float16", "bfloat16"])
def test_served_beside_other_outputs(stub: EncoderServiceStub, folders: dict[str, Path], dtype: int) -> None:
    tokenizer, model = own(folders["esm"])
    assert stub.GetModel(pb.GetModelRequest()).model.has_contacts
    asked = [
        request(text, *TEXTS[:2], attentions=pb.AttentionSelection(layers=[1]), last_hidden_state=True)
        for text in TEXTS
    ]
    asked += [request(text) for text in TEXTS]
    for one in asked:
        one.wire_dtype = dtype
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = list(pool.map(lambda one: stub.Encode(one, timeout=WAIT_S), asked))
    rounding = {1: 0.0, 2: 2.0**-11, 3: 2.0**-8}[dtype]
    for one, reply in zip(asked, replies, strict=True):
        for item, result in zip(one.inputs, reply.results, strict=True):
            ids = tokenizer(item.text)["input_ids"]
            np.testing.assert_allclose(
                array_of(result.contacts), expected_of(model, ids), rtol=1e-4 + rounding, atol=2e-5
            )
            assert result.HasField("last_hidden_state") == one.outputs.last_hidden_state


def test_an_input_of_special_tokens_alone_is_refused(stub: EncoderServiceStub) -> None:
    for item, field in (("", "inputs[1].text"), (layertap.TokenIds([0, EOS]), "inputs[1].token_ids")):
        refusal = refusal_of(stub.Encode, request("MKT", item), timeout=WAIT_S)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_INPUT")
        assert refusal.fields == [field]


# --------------------------------------------------------------------------------- at loading


def test_a_checkpoint_without_the_weights_has_none(tmp_path: Path) -> None:
    build("esm", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("contact_head")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = loaded_of(tmp_path)
    assert not loaded.facts.has_contacts
    assert loaded.contact_head is None


def test_a_contact_map_that_differs_is_not_served(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probabilities = contacts.ContactHead.probabilities
    monkeypatch.setattr(
        contacts.ContactHead, "probabilities", lambda self, sums: probabilities(self, sums + 0.1)
    )
    with caplog.at_level(logging.WARNING):
        loaded = loaded_of(folders["esm"])
    assert not loaded.facts.has_contacts
    assert loaded.contact_head is None
    assert "its contact map is not served: it differs from that of the original model" in caplog.text


def test_memory_is_counted(folders: dict[str, Path]) -> None:
    from layertap_server.engine.memory import HeldBytes

    loaded = loaded_of(folders["esm"])
    ids = [5 + place % 20 for place in range(MAX_TOKENS)]
    engine = engine_for(loaded)
    for number in (1, 20):
        works = works_of([ids] * number, CONTACTS)
        engine.run(works)
        with HeldBytes() as held:
            engine.run(works)
        assert held.peak <= loaded.memory.of_pass(works, packed=True)

"""BERT's embeddings in native code against the library's own, and what happens where they cannot be used."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, ErnieConfig
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.ernie.modeling_ernie import ErnieEmbeddings

from families import build
from layertap_server.engine import load_model
from layertap_server.engine.cpu import embeddings as native_embeddings
from layertap_server.engine.cpu.embeddings import NativeBertEmbeddings

Ids = dict[str, torch.Tensor]
# By the name of the argument: how many embeddings there are.
TABLES = {"input_ids": 101, "token_type_ids": 2, "position_ids": 60}


@pytest.fixture(autouse=True)
def kernel() -> None:
    if native_embeddings.embeddings_kernel() is None:
        pytest.skip("there is no C compiler here, so no kernel")


def embeddings_of(hidden_size: int) -> BertEmbeddings:
    torch.manual_seed(hidden_size)
    config = BertConfig(
        vocab_size=TABLES["input_ids"],
        hidden_size=hidden_size,
        max_position_embeddings=TABLES["position_ids"],
    )
    embeddings = BertEmbeddings(config).eval()
    with torch.no_grad():
        for parameter in embeddings.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return embeddings


def native_of(embeddings: BertEmbeddings) -> NativeBertEmbeddings:
    [native] = native_embeddings.native_embeddings(embeddings).values()
    assert isinstance(native, NativeBertEmbeddings)
    return native


def ids_of(num_rows: int) -> Ids:
    return {name: torch.randint(num, (1, num_rows)) for name, num in TABLES.items()}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(num_rows=st.integers(1, 70), hidden_size=st.sampled_from([1, 15, 40, 64, 129, 384]))
@torch.inference_mode()
def test_gives_what_the_library_gives(num_rows: int, hidden_size: int) -> None:
    embeddings = embeddings_of(hidden_size)
    ids = ids_of(num_rows)
    torch.testing.assert_close(native_of(embeddings)(**ids), embeddings(**ids), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("beyond", [0, 2**40, -1])
@torch.inference_mode()
def test_ids_outside_of_a_table(name: str, beyond: int) -> None:
    ids = ids_of(5)
    ids[name][0, 3] = beyond if beyond < 0 else TABLES[name] + beyond
    with pytest.raises(IndexError, match="outside of its table"):
        native_of(embeddings_of(8))(**ids)


def test_other_embeddings_stay_with_the_library() -> None:
    with_tasks = ErnieEmbeddings(ErnieConfig(vocab_size=9, hidden_size=8, use_task_id=True))
    for embeddings in (with_tasks, embeddings_of(8).half(), embeddings_of(8).to("meta")):
        assert native_embeddings.native_embeddings(embeddings) == {}


@pytest.mark.parametrize("is_right", [True, False])
def test_only_what_gives_what_the_model_gives_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_right: bool
) -> None:
    build("bert", tmp_path)
    if not is_right:
        forward = NativeBertEmbeddings.forward
        monkeypatch.setattr(NativeBertEmbeddings, "forward", lambda *args, **ids: forward(*args, **ids) * 1.1)
    with caplog.at_level(logging.WARNING):
        loaded = load_model(
            "bert", str(tmp_path), device="cpu", dtype="float32", trust_remote_code=False, max_input_tokens=0
        )
    assert isinstance(loaded.model.embeddings, NativeBertEmbeddings) == is_right
    assert ("last_hidden_state of a text of" in caplog.text) == (not is_right)

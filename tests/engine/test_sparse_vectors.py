"""Sparse vectors: reduced in steps, never more in memory than is known, and only the entries that there are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import heads
from layertap_server.engine import engine_for, load_model
from layertap_server.engine import heads as engine_heads
from layertap_server.engine.memory import HeldBytes
from layertap_server.engine.model import LoadedModel
from layertap_server.engine.sparse_vectors import SparsePooling, compact, steps_of
from layertap_server.enums import DType
from layertap_server.output_plans import SparsePlan
from layertap_server.plan import OutputPlan, Work

VOCAB_SIZE = 30_522
MIB = 2**20


def load(folder: Path, pooling: SparsePooling, **settings: Any) -> LoadedModel:
    defaults = {"device": "cpu", "dtype": "float32", "trust_remote_code": False, "max_input_tokens": 0}
    loaded = load_model("m", str(folder), **(defaults | settings))
    return replace(loaded, sparse=pooling, facts=replace(loaded.facts, has_sparse=True))


def work(loaded: LoadedModel, length: int, top_k: int = 0, dtype: DType = DType.FLOAT32) -> Work:
    plan = OutputPlan(dtype, sparse=SparsePlan(top_k or loaded.facts.num_labels, by_weight=top_k > 0))
    ids = np.arange(5, 5 + length, dtype=np.int64) * length % 90 + 5
    return Work(ids, None, plan, plan.specs(length, loaded.facts.hidden_size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    heads.build("bert", "masked", folder, vocab_size=VOCAB_SIZE, max_position_embeddings=128)
    return folder


def dense(outputs: Sequence[Any]) -> np.ndarray[Any, Any]:
    vector = np.zeros(VOCAB_SIZE, np.float32)
    vector[outputs[0].data] = outputs[1].data
    return vector


@pytest.mark.parametrize(
    "pooling", [SparsePooling(), pytest.param(SparsePooling(sums=True, num_logs=2), marks=pytest.mark.long)]
)
def test_a_batch_never_has_all_scores_in_memory(folder: Path, pooling: SparsePooling) -> None:
    """All scores of 32 texts of 128 tokens would take 476 MiB."""
    loaded = load(folder, pooling)
    engine = engine_for(loaded)
    works = [work(loaded, 128) for _ in range(32)]
    plain = OutputPlan(DType.FLOAT32, last_hidden_state=True)
    without = [replace(one, plan=plain, specs=plain.specs(128, loaded.facts.hidden_size)) for one in works]
    peaks = []
    for batch in (without, works):
        engine.run(batch)
        with HeldBytes() as counted:
            engine.run(batch)
        peaks.append(counted.peak)
    assert peaks[1] - peaks[0] <= 64 * MIB
    assert peaks[1] <= loaded.memory.of_pass(works, packed=True) <= peaks[0] + 160 * MIB


@pytest.mark.parametrize("pooling", [SparsePooling(), SparsePooling(sums=True)])
def test_steps_change_nothing(folder: Path, pooling: SparsePooling, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(folder, pooling)
    model = heads.read(folder, "masked")
    works = [work(loaded, length) for length in (1, 9, 20, 30)]
    for num_rows in (3, 1000):
        monkeypatch.setattr(engine_heads, "STEP_BYTES", 4 * VOCAB_SIZE * num_rows)
        for one, outputs in zip(works, engine_for(loaded).run(works), strict=True):
            weights = np.log1p(np.maximum(heads.own_logits(model, one.input_ids), 0))
            expected = weights.sum(0) if pooling.sums else weights.max(0)
            np.testing.assert_allclose(dense(outputs), expected, rtol=1e-4, atol=5e-5)


def test_the_same_bits_in_any_batch(folder: Path) -> None:
    loaded = load(folder, SparsePooling(sums=True), batch_invariant=True)
    engine = engine_for(loaded)
    texts = [work(loaded, length, top_k) for length, top_k in ((1, 0), (9, 5), (33, 0), (64, 40))]
    alone = [engine.run([text])[0] for text in texts]
    with ThreadPoolExecutor(1, initializer=engine.use_one_core) as one_core:
        company = [work(loaded, 1 + 7 * number % 60) for number in range(6)]
        for together in (
            engine.run([*texts, *company]),
            one_core.submit(engine.run, [*texts, *company]).result(),
        ):
            for mine, expected in zip(together, alone, strict=False):
                for one, wanted in zip(mine, expected, strict=True):
                    assert one.data.tobytes() == wanted.data.tobytes()


def test_steps_divide_long_ranges_and_join_short_ones() -> None:
    assert list(steps_of([(0, 2), (5, 6), (6, 11)], 4)) == [[(0, 0, 2), (1, 5, 6), (2, 6, 7)], [(2, 7, 11)]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_no_number_is_an_entry_and_zeros_are_none(dtype: str) -> None:
    given = torch.tensor([[0.0, 2.0, -0.0, float("nan"), 1e-8, float("inf")]]).to(getattr(torch, dtype))
    as_bits = given.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else given.numpy()
    ids, weights = compact(None, as_bits, SparsePlan(6))
    # In float16, 1e-8 is zero.
    assert ids.tolist() == ([1, 3, 5] if dtype == "float16" else [1, 3, 4, 5])
    assert (ids.dtype, weights.dtype) == (np.int32, as_bits.dtype)
    assert not np.shares_memory(weights, as_bits)
    chosen = np.array([[3, 5, 1, 0]], np.int32)
    ids, _ = compact(chosen, as_bits[:, chosen[0]], SparsePlan(4, by_weight=True))
    assert ids.tolist() == [3, 5, 1]
    ids, weights = compact(chosen, as_bits[:, chosen[0]], SparsePlan(4))
    assert ids.tolist() == [1, 3, 5]
    assert weights.tobytes() == as_bits[0, [1, 3, 5]].tobytes()

"""Cores that take batches apart from each other: the same answers as together, and failures that stay where they are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import FAMILIES, HIDDEN_SIZE, NUM_LAYERS, build
from layertap_server.engine import Engine, load_model
from layertap_server.engine.threads import use_one_thread
from layertap_server.enums import DType, Encoding, LayerMerge, Pooling
from layertap_server.output_plans import AttentionPlan, EmbeddingPlan
from layertap_server.plan import OutputPlan, Outputs, Work

LAST = OutputPlan(DType.FLOAT32, last_hidden_state=True)
NUM_CORES = 3


def engine_of(folder: Path, name: str = "bert", **settings: Any) -> Engine:
    build(name, folder)
    defaults = {"device": "cpu", "dtype": "float32", "trust_remote_code": False, "max_input_tokens": 0}
    return Engine(load_model(name, str(folder), **(defaults | settings)))


@contextmanager
def cores_of(engine: Engine) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(NUM_CORES, initializer=engine.use_one_core) as threads:
        yield threads


def work(num_tokens: int, plan: OutputPlan = LAST, seed: int = 0) -> Work:
    ids = np.random.default_rng(seed + num_tokens).integers(5, 27, num_tokens)
    return Work(ids, None, plan, plan.specs(num_tokens, HIDDEN_SIZE))


def vector(num_tokens: int) -> EmbeddingPlan:
    return EmbeddingPlan(
        pooling=Pooling.MEAN,
        layers=(1, NUM_LAYERS),
        layer_merge=LayerMerge.CONCAT,
        normalize=True,
        dimensions=2 * HIDDEN_SIZE,
        encoding=Encoding.INT8,
        segments=((0, num_tokens),),
        has_spans=False,
    )


def mixed(seed: int) -> list[Work]:
    """Every kind of output, and texts of many lengths."""
    works = []
    for number, num_tokens in enumerate(np.random.default_rng(seed).integers(1, 40, 12).tolist()):
        plan = (
            LAST,
            OutputPlan(DType.FLOAT32, embeddings=(vector(num_tokens),)),
            OutputPlan(
                DType.FLOAT16, hidden_states=(0, 2), attentions=AttentionPlan((0, 3), (0, 2), False, None)
            ),
            OutputPlan(
                DType.FLOAT32, hidden_states=(1,), attentions=AttentionPlan((1,), (0, 1, 3), True, (0,))
            ),
        )[number % 4]
        works.append(work(num_tokens, plan, seed))
    return works


def assert_close(answers: list[Outputs], expected: list[Outputs], atol: float) -> None:
    for mine, wanted in zip(answers, expected, strict=True):
        for tensor, right in zip(mine, wanted, strict=True):
            assert tensor.data.shape == right.data.shape
            if tensor.data.dtype == np.int8:  # a step of the quantization
                assert np.abs(tensor.data.astype(int) - right.data.astype(int)).max() <= 1
                np.testing.assert_allclose(tensor.scales, right.scales, rtol=1e-4)
            else:
                np.testing.assert_allclose(tensor.data, right.data, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_batches_at_once_give_what_each_gives_to_all_cores(tmp_path: Path, name: str) -> None:
    engine = engine_of(tmp_path, name)
    if not engine.facts.packed:
        pytest.skip(f"{name} runs padded, with all cores together")
    batches = [mixed(seed) for seed in range(8)]
    expected = [engine.run(batch) for batch in batches]
    rows = engine.num_rows
    with cores_of(engine) as cores:
        for answers, wanted in zip(cores.map(engine.run, batches), expected, strict=True):
            assert_close(answers, wanted, atol=1e-3)  # some are of 16 bits
    assert engine.num_rows == 2 * rows


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (RuntimeError("it is poisoned"), RuntimeError),
        (RuntimeError("[x] can't allocate memory"), MemoryError),
    ],
)
def test_a_pass_that_fails_leaves_those_beside_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, seen: type[Exception]
) -> None:
    engine = engine_of(tmp_path)
    run, all_begun = engine._run_pass, threading.Barrier(NUM_CORES)

    def failing(loaded: Any, packing: Any, taps: Any) -> None:
        all_begun.wait(30)
        if packing.total_tokens == 20:
            raise raised
        run(loaded, packing, taps)

    expected = [engine.run([work(size)]) for size in (19, 21)]
    monkeypatch.setattr(engine, "_run_pass", failing)
    with cores_of(engine) as cores:
        before, failed, after = (cores.submit(engine.run, [work(size)]) for size in (19, 20, 21))
        with pytest.raises(seen, match=str(raised).partition(" ")[2]):
            failed.result()
        assert_close([*before.result(), *after.result()], [one for [one] in expected], atol=1e-5)


def test_a_thread_computes_with_one_core_and_others_with_theirs() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(2, initializer=use_one_thread) as threads:
        assert set(threads.map(lambda _: torch.get_num_threads(), range(8))) == {1}
    with ThreadPoolExecutor(1) as others:
        assert others.submit(torch.get_num_threads).result() == before
    assert torch.get_num_threads() == before


def test_which_models_cores_may_take_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, padded = engine_of(tmp_path / "bert"), engine_of(tmp_path / "mpnet", "mpnet")
    monkeypatch.setattr(torch, "get_num_threads", lambda: NUM_CORES)
    assert Engine(packed._loaded).num_cores == NUM_CORES
    assert Engine(padded._loaded).num_cores == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert Engine(packed._loaded).num_cores == 1

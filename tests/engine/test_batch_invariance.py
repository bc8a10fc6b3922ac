"""A text and its company: the same bits where that is promised, and a pass of its own where it must be."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from engine.works import works_wanting_everything
from families import build
from layertap_server.engine import Engine, LoadedModel, engine_for, load_model
from layertap_server.engine.loading import load as loading
from layertap_server.engine.loading.families import depends_on_longest
from layertap_server.enums import DType
from layertap_server.output_plans import AttentionPlan
from layertap_server.plan import OutputPlan, Outputs, Work

PLAN = OutputPlan(DType.FLOAT32, last_hidden_state=True, attentions=AttentionPlan((1,), (0,), False, None))


def load(folder: Path, **settings: Any) -> LoadedModel:
    defaults = {"device": "cpu", "dtype": "float32", "trust_remote_code": False, "max_input_tokens": 0}
    return load_model("model", str(folder), **(defaults | settings))


def work(loaded: LoadedModel, num_tokens: int, seed: int) -> Work:
    ids = np.random.default_rng(seed).integers(5, 27, num_tokens)
    return Work(ids, None, PLAN, PLAN.specs(num_tokens, loaded.facts.hidden_size))


def count_passes(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> list[int]:
    """The number of texts of each pass that runs from here on."""
    passes: list[int] = []
    run = engine._run_pass

    def counted(loaded: LoadedModel, packing: Any, taps: Any) -> None:
        passes.append(len(packing.works))
        run(loaded, packing, taps)

    monkeypatch.setattr(engine, "_run_pass", counted)
    return passes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "mpnet", "deberta_v2"])
def test_batch_invariant_gives_the_same_bits_in_any_company(tmp_path: Path, name: str, dtype: str) -> None:
    build(name, tmp_path)
    loaded = load(tmp_path, dtype=dtype, batch_invariant=True)
    engine = engine_for(loaded)
    one_core = ThreadPoolExecutor(1, initializer=engine.use_one_core)
    ways: list[Callable[[list[Work]], list[Outputs]]] = [engine.run]
    if engine.num_cores > 1:
        ways.append(lambda works: one_core.submit(engine.run, works).result())
    texts = [work(loaded, num_tokens, num_tokens) for num_tokens in (1, 4, 9, 20, 37, 64)]
    alone = [engine.run([text])[0] for text in texts]
    for seed, size in enumerate((1, 4, 24)):
        lengths = np.random.default_rng(seed).integers(1, 65, size)
        company = [work(loaded, int(length), 1000 + number) for number, length in enumerate(lengths)]
        for run in ways:
            for outputs, expected in zip(run([*texts, *company]), alone, strict=False):
                for tensor, wanted in zip(outputs, expected, strict=True):
                    np.testing.assert_array_equal(tensor.data, wanted.data)
    one_core.shutdown()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_every_output_has_the_same_bits_in_any_company(tmp_path: Path, name: str, dtype: str) -> None:
    """Also a lone output, and several of one kind in one batch."""
    build(name, tmp_path)
    engine = engine_for(load(tmp_path, dtype=dtype, batch_invariant=True))
    works = works_wanting_everything(engine.facts)
    assert any(one.plan.pooler_output for one in works)
    alone = {id(one): engine.run([one])[0] for one in works}
    alike = [[one] * 6 for one in works]
    for batch in (works, works[::-1], [*works, *works, *works], *alike):
        for one, outputs in zip(batch, engine.run(batch), strict=True):
            for tensor, wanted in zip(outputs, alone[id(one)], strict=True):
                np.testing.assert_array_equal(tensor.data, wanted.data)


@pytest.mark.parametrize("holds", [True, False])
def test_texts_share_a_pass_only_where_bits_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holds: bool
) -> None:
    build("bert", tmp_path)
    monkeypatch.setattr(loading, "is_batch_invariant", lambda *_: holds)
    loaded = load(tmp_path, batch_invariant=True)
    engine = Engine(loaded)
    passes = count_passes(monkeypatch, engine)
    engine.run([work(loaded, length, 0) for length in (3, 9, 3)])
    assert passes == ([3] if holds else [1, 1, 1])


def dynamic(config: Any) -> None:
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def longrope(config: Any) -> None:
    half = config.hidden_size // config.num_attention_heads // 2
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    }


@pytest.mark.parametrize("change", [dynamic, longrope])
def test_rotary_kinds_that_depend_on_the_longest_text_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    build("eurobert", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert not depends_on_longest(config)
    change(config)
    config.save_pretrained(tmp_path)
    reference = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()

    loaded = load(tmp_path)
    assert not loaded.facts.packed
    engine = Engine(loaded)
    passes = count_passes(monkeypatch, engine)
    works = [work(loaded, length, length) for length in (5, 40, 40, 12)]
    for one, (last_hidden_state, _) in zip(works, engine.run(works), strict=True):
        with torch.no_grad():
            expected = reference(input_ids=torch.from_numpy(one.input_ids)[None]).last_hidden_state[0]
        np.testing.assert_allclose(last_hidden_state.data, expected.numpy(), atol=2e-5, rtol=1e-4)
    assert passes == [1] * len(works)

"""Cores that take texts apart from each other: the same answers, failures that stay where they are, and their end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import FAMILIES, HIDDEN_SIZE, NUM_LAYERS, build
from layertap_server.engine import Engine, choice, load_model
from layertap_server.engine.lanes import MAX_SHARE, LaneEngine, Lanes, even_groups
from layertap_server.plan import (
    AttentionPlan,
    DType,
    EmbeddingPlan,
    Encoding,
    LayerMerge,
    OutputPlan,
    Outputs,
    Pooling,
    Work,
)

LAST = OutputPlan(DType.FLOAT32, last_hidden_state=True)
NUM_LANES = 2


def engine_of(folder: Path, name: str = "bert", **settings: Any) -> LaneEngine:
    build(name, folder)
    defaults = {"device": "cpu", "dtype": "float32", "trust_remote_code": False, "max_input_tokens": 0}
    engine = LaneEngine(load_model(name, str(folder), **(defaults | settings)), NUM_LANES)
    engine.min_tokens = 0  # which way is the faster does not matter here
    return engine


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
def test_batches_launched_ahead_give_what_one_pass_gives(tmp_path: Path, name: str) -> None:
    engine = engine_of(tmp_path, name)
    if not engine.facts.packed:
        pytest.skip(f"{name} runs padded, where there are no lanes")
    batches = [mixed(seed) for seed in range(6)]
    expected = [Engine.run(engine, batch) for batch in batches]
    launched = [engine.launch(batch) for batch in batches]
    assert all(one is not None for one in launched)
    for one, wanted in zip(launched, expected, strict=True):
        assert one is not None
        assert_close(one.wait(), wanted, atol=1e-3)  # some are of 16 bits
    alone = [engine.run([one])[0] for one in batches[0]]
    assert_close(engine.run(batches[0]), alone, atol=1e-3)


@pytest.mark.parametrize("lengths", [(7,), (30, 3, 2), (5,) * 3])
def test_what_cannot_be_parted_evenly_is_run_by_all(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    engine = engine_of(tmp_path)
    works = [work(length) for length in lengths]
    assert engine.launch(works) is None
    assert [len(outputs[0].data) for outputs in engine.run(works)] == list(lengths)


def test_small_batches_are_shared(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    engine.min_tokens = 40
    assert engine.launch([work(19), work(20)]) is None
    launched = engine.launch([work(20), work(20)])
    assert launched is not None
    assert len(launched.wait()) == 2


@given(st.lists(st.integers(1, 512), min_size=1, max_size=60), st.integers(1, 8))
def test_groups_are_even_or_there_are_none(sizes: list[int], num_groups: int) -> None:
    groups = even_groups(sizes, num_groups)
    if groups is None:
        return
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    totals = [sum(sizes[index] for index in group) for group in groups]
    assert len(totals) == num_groups
    assert max(totals) * num_groups <= MAX_SHARE * sum(sizes)


def test_many_equal_texts_make_even_groups() -> None:
    assert even_groups([3] * 8, 4) == [[0, 4], [1, 5], [2, 6], [3, 7]]


# ------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (RuntimeError("it is poisoned"), RuntimeError),
        (RuntimeError("[x] can't allocate memory"), MemoryError),
    ],
)
def test_a_group_that_fails_is_told_of_when_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, seen: type[Exception]
) -> None:
    engine = engine_of(tmp_path)
    run, ended = engine._run_pass, []

    def failing(loaded: Any, packing: Any, taps: Any) -> None:
        if packing.total_tokens == 20:
            raise raised
        run(loaded, packing, taps)
        ended.append(packing.total_tokens)

    monkeypatch.setattr(engine, "_run_pass", failing)
    launched = engine.launch([work(20), work(19)])
    assert launched is not None
    with pytest.raises(seen, match=str(raised).partition(" ")[2]):
        launched.wait()
    assert ended == [19]
    assert len(engine.run([work(18), work(17)])) == 2, "the lanes go on"


def test_a_batch_that_would_not_fit_is_not_begun(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    engine._free_bytes = lambda: 0.0
    large = [work(64, OutputPlan(DType.FLOAT32, hidden_states=(0,) * 5000)) for _ in range(2)]
    with pytest.raises(MemoryError, match="a pass over 2 inputs needs"):
        engine.launch(large)


# ------------------------------------------------------------------------------- the threads


@pytest.fixture
def two_lanes() -> Iterator[Lanes]:
    yield Lanes(2)
    gc.collect()


def test_a_lane_computes_with_one_thread_and_others_with_theirs(two_lanes: Lanes) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    futures = [two_lanes.submit(lambda: seen.append(torch.get_num_threads()) or []) for _ in range(8)]
    assert [future.result() for future in futures] == [[]] * 8
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [1] * 8 + [before]
    assert torch.get_num_threads() == before


def test_room_is_there_when_a_lane_has_nothing_to_do(two_lanes: Lanes) -> None:
    goes_on, has_begun = threading.Event(), threading.Barrier(3)

    def held() -> list[Any]:
        has_begun.wait()
        goes_on.wait()
        return []

    two_lanes.wait_for_room()
    futures = [two_lanes.submit(held), two_lanes.submit(lambda: (has_begun.wait(), [])[1])]
    waiting = threading.Thread(target=two_lanes.wait_for_room)
    waiting.start()
    has_begun.wait()
    waiting.join()  # one is still held
    assert not futures[0].done()
    goes_on.set()
    futures[0].result()


def test_threads_end_with_their_engine(tmp_path: Path) -> None:
    def alive() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("lane ")]

    gc.collect()
    before = alive()
    engine = engine_of(tmp_path)
    new = [thread for thread in alive() if thread not in before]
    assert len(new) == NUM_LANES
    del engine
    gc.collect()
    for thread in new:
        thread.join(30)
        assert not thread.is_alive()


def test_a_lane_that_hangs_does_not_keep_the_process() -> None:
    script = (
        "import threading\n"
        "from layertap_server.engine.lanes import Lanes\n"
        "lanes, hangs = Lanes(2), threading.Event()\n"
        "lanes.submit(hangs.wait)\n"
        "print('left')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "left\n"), ended.stderr


def test_which_engine_a_model_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tmp_path / "bert")
    padded = engine_of(tmp_path / "mpnet", "mpnet")
    monkeypatch.setattr(torch, "get_num_threads", lambda: NUM_LANES)
    assert type(choice.engine_for(engine._loaded)) is LaneEngine
    assert type(choice.engine_for(padded._loaded)) is Engine
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert type(choice.engine_for(engine._loaded)) is Engine

"""Pooling on CUDA as one kernel, interpreted, beside torch's steps; and when it is not used."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drawings import drawings
from layertap_server.engine.pooling import REDUCTIONS, pool_segments
from layertap_server.enums import Encoding, LayerMerge, Pooling
from layertap_server.output_plans import EmbeddingPlan

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
if torch.cuda.is_available():
    pytest.skip("with a device the kernel is compiled for it: test_cuda_device.py", allow_module_level=True)

import families
from layertap_server.engine import LoadedModel, load_model
from layertap_server.engine.cpu.pooling import pool_natively
from layertap_server.engine.cuda import pooling as cuda_pooling
from layertap_server.engine.cuda.engine import fastest_pool
from layertap_server.engine.cuda.pooling import pool_on_cuda

SIZE = 37


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a step takes as long as it has numbers."""
    monkeypatch.setattr(cuda_pooling, "STEP_SIZE", 256)


def plan_of(kind: Pooling, dims: int, normalize: bool) -> EmbeddingPlan:
    return EmbeddingPlan(kind, (1,), LayerMerge.CONCAT, normalize, dims, Encoding.FLOAT32, (), False)


@settings(
    max_examples=drawings(40),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    derandomize=True,
)
@given(
    kind=st.sampled_from([one for one in Pooling if one in REDUCTIONS]),
    share=st.floats(0.01, 1),
    normalize=st.booleans(),
    segments=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 20)), min_size=1, max_size=4),
)
@torch.inference_mode()
def test_gives_what_torch_gives(
    kind: Pooling, share: float, normalize: bool, segments: list[tuple[int, int]]
) -> None:
    width = SIZE * len(REDUCTIONS[kind])
    plan = plan_of(kind, max(int(width * share), 1), normalize)
    ranges = [(start, min(start + length, 60)) for start, length in segments]
    torch.manual_seed(0)
    hidden = torch.randn(60, SIZE)
    got = pool_segments(hidden, ranges, plan, pool_on_cuda)
    expected = pool_segments(hidden, ranges, plan, lambda *_, **__: None)
    assert got.shape == (len(ranges), plan.dimensions)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_nothing_to_divide_by_and_nothing_that_is_a_number() -> None:
    hidden = torch.zeros(4, SIZE)
    plan = plan_of(Pooling.MEAN, SIZE, True)
    assert torch.equal(pool_segments(hidden, [(0, 4)], plan, pool_on_cuda), torch.zeros(1, SIZE))
    hidden[1, 3] = float("nan")
    for kind in (Pooling.MEAN, Pooling.MAX):
        plan = plan_of(kind, SIZE, False)
        got = pool_segments(hidden, [(0, 2), (1, 3), (2, 4)], plan, pool_on_cuda)
        assert got.isnan().sum(1).tolist() == [1, 1, 0]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = tmp_path_factory.mktemp("bert")
    families.build("bert", folder, num_layers=2)
    model = load_model(
        "m", str(folder), device="cpu", dtype="float32", trust_remote_code=False, max_input_tokens=0
    )
    return replace(model, facts=replace(model.facts, hidden_size=SIZE))


def test_one_that_is_right_is_used(loaded: LoadedModel) -> None:
    assert fastest_pool(loaded) is pool_on_cuda


def fails(*_: object, **__: object) -> Any:
    raise RuntimeError("no compiler here")


def differs(*arguments: Any, dims: int, epsilon: float | None) -> torch.Tensor:
    return pool_on_cuda(*arguments, dims=dims, epsilon=epsilon) * 1.001


def is_no_number(*arguments: Any, dims: int, epsilon: float | None) -> torch.Tensor:
    return pool_on_cuda(*arguments, dims=dims, epsilon=epsilon) * float("nan")


@pytest.mark.parametrize(
    ("pool", "said"),
    [(fails, "no compiler here"), (differs, "differ by 0.001"), (is_no_number, "differ by nan")],
)
def test_one_that_fails_or_differs_is_not(
    pool: Callable[..., Any], said: str, loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert fastest_pool(loaded, pool) is pool_natively
    assert "m: runs without pooling in one kernel" in caplog.text
    assert said in caplog.text

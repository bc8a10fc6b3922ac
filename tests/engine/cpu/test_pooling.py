"""Pooling in native code beside torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layertap_server.engine import pooling
from layertap_server.engine.cpu import pooling as native_pooling
from layertap_server.engine.pooling import finished, pool_in_steps, pool_segments
from layertap_server.enums import Encoding, LayerMerge, Pooling
from layertap_server.output_plans import EmbeddingPlan

SIZE = 37
POOLINGS = [one for one in Pooling if one in pooling.REDUCTIONS]


def plan_of(kind: Pooling, dims: int, normalize: bool) -> EmbeddingPlan:
    return EmbeddingPlan(kind, (1,), LayerMerge.CONCAT, normalize, dims, Encoding.FLOAT32, (), False)


@pytest.fixture(autouse=True)
def kernel() -> None:
    if native_pooling.pooling_kernel(is_held=True) is None:
        pytest.skip("there is no C compiler here, so no kernel")


def in_steps(hidden: torch.Tensor, segments: list[tuple[int, int]], plan: EmbeddingPlan) -> torch.Tensor:
    """A range after the other, as one would write it."""
    vectors = []
    for start, end in segments:
        rows = hidden[start:end]
        parts = {
            Pooling.MEAN: [rows.mean(0)],
            Pooling.MAX: [rows.amax(0)],
            Pooling.MEAN_MAX: [rows.mean(0), rows.amax(0)],
            Pooling.CLS: [rows[0]],
            Pooling.LAST_TOKEN: [rows[-1]],
        }[plan.pooling]
        vectors.append(torch.cat(parts))
    return finished(torch.stack(vectors), plan)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(POOLINGS),
    share=st.floats(0.01, 1),
    normalize=st.booleans(),
    segments=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 20)), min_size=1, max_size=9),
    held_bytes=st.sampled_from([0, 2**20]),
)
@torch.inference_mode()
def test_gives_what_torch_gives(
    kind: Pooling, share: float, normalize: bool, segments: list[tuple[int, int]], held_bytes: int
) -> None:
    width = SIZE * len(pooling.REDUCTIONS[kind])
    plan = plan_of(kind, max(int(width * share), 1), normalize)
    ranges = [(start, min(start + length, 60)) for start, length in segments]
    torch.manual_seed(0)
    hidden = torch.randn(60, SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_pooling, "HELD_BYTES", held_bytes)
        got = pool_segments(hidden, ranges, plan)
        patch.setattr(pooling, "pool_natively", lambda *_, **__: None)
        by_torch = pool_segments(hidden, ranges, plan)
    expected = in_steps(hidden, ranges, plan)
    assert got.shape == (len(ranges), plan.dimensions)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(by_torch, expected, atol=1e-6, rtol=1e-5)


def test_nothing_to_divide_by_and_nothing_that_is_a_number() -> None:
    hidden = torch.zeros(4, SIZE)
    plan = plan_of(Pooling.MEAN, SIZE, True)
    assert torch.equal(pool_segments(hidden, [(0, 4)], plan), torch.zeros(1, SIZE))
    hidden[1, 3] = float("nan")
    for kind in (Pooling.MEAN, Pooling.MAX):
        got = pool_segments(hidden, [(0, 2), (1, 3), (2, 4)], plan_of(kind, SIZE, False))
        assert got.isnan().sum(1).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "hidden", [torch.randn(6, SIZE).double(), torch.randn(6, 2 * SIZE)[:, ::2]], ids=["wider", "with gaps"]
)
def test_what_it_cannot_take_is_left_to_torch(hidden: torch.Tensor) -> None:
    reductions = ("mean",)
    assert native_pooling.pool_natively(hidden, [(0, 6)], reductions, dims=SIZE, epsilon=None) is None
    got = pool_segments(hidden, [(0, 6)], plan_of(Pooling.MEAN, SIZE, False))
    torch.testing.assert_close(got, pool_in_steps(hidden, [(0, 6)], reductions))

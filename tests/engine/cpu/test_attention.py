"""The CPU attention kernel against torch's own, over shapes, windows, layouts and types."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layertap_server.engine.attention import attend_runs, write_maps
from layertap_server.engine.attention_maps import MapTap
from layertap_server.engine.cpu import library as native
from layertap_server.engine.packing import Packing
from layertap_server.enums import DType
from layertap_server.plan import OutputPlan, Work


def packing_of(lengths: list[int]) -> Packing:
    plan = OutputPlan(DType.FLOAT32)
    return Packing.of([Work(np.zeros(length, np.int64), None, plan, ()) for length in lengths])


@pytest.fixture(scope="module")
def kernel(kernels_with_tiles: None) -> native.AttentionKernel:
    kernel = native.attention_kernel()
    assert kernel is not None
    return kernel


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    lengths=st.lists(
        st.integers(1, 40) | st.sampled_from([95, 96, 97, 192, 193, 300]), min_size=1, max_size=6
    ),
    num_heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 8, 16, 24, 32, 40, 64, 80, 96, 128]),
    window=st.none() | st.integers(1, 70),
    dtype=st.sampled_from(native.DTYPES),
    heads_first=st.booleans(),
)
def test_kernel_is_torch_attention(
    kernel: native.AttentionKernel,
    lengths: list[int],
    num_heads: int,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
    heads_first: bool,
) -> None:
    packing = packing_of(lengths)
    torch.manual_seed(sum(lengths))
    shape = (packing.num_rows, num_heads, head_dim)
    if heads_first:  # as rotary embeddings leave them
        tensors = [torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1) for _ in range(3)]
    else:
        tensors = [torch.randn(shape) for _ in range(3)]
    query, key, value = (tensor.to(dtype) for tensor in tensors)

    scaling = head_dim**-0.5
    got = kernel(query, key, value, packing, scaling, window)
    expected = attend_runs(query.double(), key.double(), value.double(), packing, scaling, window).float()

    assert got.shape == shape
    assert got.dtype == dtype
    exact = dtype is torch.float32
    torch.testing.assert_close(
        got.float(), expected, atol=5e-6 if exact else 1e-2, rtol=1e-5 if exact else 1e-2
    )


def test_scores_far_apart_do_not_overflow(kernel: native.AttentionKernel) -> None:
    packing = packing_of([20])
    query = torch.full((packing.num_rows, 1, 16), 60.0)
    key = torch.linspace(-60, 60, 20).repeat(2)[: packing.num_rows, None, None].repeat(1, 1, 16)
    value = torch.randn(packing.num_rows, 1, 16)
    got = kernel(query, key, value, packing, 1.0, None)
    torch.testing.assert_close(got[:20], value[19].expand(20, 1, 16))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40) | st.sampled_from([97, 130]), min_size=1, max_size=4),
    head_dim=st.sampled_from([8, 32, 40, 64]),
    window=st.none() | st.integers(1, 50),
    mean_over_heads=st.booleans(),
    dtype=st.sampled_from(native.DTYPES),
    wire_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    data=st.data(),
)
def test_maps_are_torch_maps(
    kernel: native.AttentionKernel,
    lengths: list[int],
    head_dim: int,
    window: int | None,
    mean_over_heads: bool,
    dtype: torch.dtype,
    wire_dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    packing = packing_of(lengths)
    num_heads = 3
    torch.manual_seed(sum(lengths))
    query, key = (torch.randn(packing.num_rows, num_heads, head_dim).to(dtype) for _ in range(2))
    got, expected = [], []
    for text, (work, start, end) in enumerate(packing.rows()):
        heads = tuple(data.draw(st.lists(st.integers(0, num_heads - 1), min_size=1, max_size=4)))
        rows = st.lists(st.integers(0, work.num_tokens - 1), min_size=1, max_size=9).map(tuple)
        queries = data.draw(st.none() | rows)
        shape = (
            1 if mean_over_heads else len(heads),
            work.num_tokens if queries is None else len(queries),
            work.num_tokens,
        )
        for taps in (got, expected):
            target = torch.full(shape, 7.0).to(wire_dtype)
            taps.append(MapTap(text, start, end, heads, queries, mean_over_heads, target))

    kernel.write_maps(query, key, got, head_dim**-0.5, window)
    write_maps(query, key, expected, head_dim**-0.5, window)

    for one, other in zip(got, expected, strict=True):
        atol = 1e-6 if wire_dtype is torch.float32 else 4e-3
        torch.testing.assert_close(one.target, other.target, atol=atol, rtol=1e-5 if atol < 1e-3 else 1e-2)

"""The native product against torch's own, over shapes, types and what is fused behind it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from drawings import drawings
from layertap_server.engine.cpu import product as native_product
from layertap_server.engine.cpu.library import DTYPES
from layertap_server.engine.cpu.product import NativeProduct, ProductKernel


@pytest.fixture(scope="module")
def kernel(kernels_with_tiles: None) -> ProductKernel:
    kernel = native_product.product_kernel()
    assert kernel is not None
    return kernel


@settings(max_examples=drawings(60), deadline=None, derandomize=True)
@given(
    num_rows=st.integers(0, 40) | st.sampled_from([95, 97, 193, 600]),
    size=st.tuples(st.sampled_from([32, 40, 64, 96, 400]), st.sampled_from([1, 40, 64, 150, 320])),
    dtype=st.sampled_from(DTYPES),
    wide_input=st.booleans(),
    wide_output=st.booleans(),
    gelu=st.booleans(),
    has_bias=st.booleans(),
    cut=st.booleans(),
)
@torch.inference_mode()
def test_gives_what_torch_gives(
    kernel: ProductKernel,
    num_rows: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    wide_input: bool,
    wide_output: bool,
    gelu: bool,
    has_bias: bool,
    cut: bool,
) -> None:
    k, n = size
    torch.manual_seed(num_rows)
    weight, bias = torch.randn(n, k) / k**0.5, torch.randn(n) if has_bias else None
    rows = torch.randn(num_rows, 2 * k)[:, :k] if cut else torch.randn(num_rows, k)
    rows = rows if wide_input else rows.to(dtype)
    if not kernel.fits(weight, dtype):
        assert dtype is torch.bfloat16  # this processor has no tiles, or the shape does not fill them
        return
    product = NativeProduct(kernel, weight, bias, dtype, gelu=gelu, wide_output=wide_output)
    exact = dtype is torch.float32
    expected = nn.functional.linear(
        rows.to(dtype).double(), weight.to(dtype).double(), None if bias is None else bias.double()
    )
    if gelu:
        expected = nn.functional.gelu(expected)

    got = product(rows[None])[0]

    assert got.dtype is (torch.float32 if wide_output else dtype)
    atol = 1e-5 if exact else 1e-2
    torch.testing.assert_close(got.double(), expected, atol=atol, rtol=1e-6 if exact else 1e-2)
    for row in range(0, num_rows, 50):  # only the bits are compared
        assert torch.equal(product(rows[row : row + 1])[0], got[row])

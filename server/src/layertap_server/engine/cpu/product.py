"""A linear layer in native code: the weight is packed once, and one call computes the product and exact GELU.

The order in which a row is summed does not depend on the other rows of the batch, so a text's results do not
depend on its batch, to the bit. Unlike oneDNN, no kernel is prepared and kept for each number of rows.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from layertap_server.engine.cpu.library import DTYPES, library
from layertap_server.engine.cpu.structures import LinearArgument, Operands

# Columns of the widest panel of a packed weight: biases are padded with zeros to a multiple of it.
PANEL = 64


class ProductKernel:
    """The functions of product.h."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self._packed_size = loaded.layertap_packed_size
        self._packed_size.argtypes = (number, number, number)
        self._packed_size.restype = ctypes.c_int64
        self._pack = loaded.layertap_pack
        self._pack.argtypes = (pointer, number, number, number, pointer)
        self._pack.restype = None
        self.narrow_size = loaded.layertap_narrow_size
        self.narrow_size.argtypes = (number, ctypes.c_int64)
        self.narrow_size.restype = ctypes.c_int64
        self.multiply = loaded.layertap_product
        self.multiply.argtypes = (
            ctypes.POINTER(LinearArgument),
            ctypes.POINTER(Operands),
            number,
            pointer,
            number,
        )
        self.multiply.restype = None

    def fits(self, weight: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether this processor has a kernel for products of `dtype` with a weight of this shape."""
        if weight.device.type != "cpu" or dtype not in DTYPES:
            return False
        return bool(self._packed_size(*weight.shape, dtype is torch.bfloat16) > 0)

    def packed(
        self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[LinearArgument, tuple[torch.Tensor, ...]]:
        """Packs an (out, in) weight into the order in which the kernel reads it. Also returns the tensors
        that own the memory; the caller must keep them alive."""
        n, k = weight.shape
        bf16 = dtype is torch.bfloat16
        rows = weight.detach().to(dtype).contiguous()
        packed = torch.empty(self._packed_size(n, k, bf16), dtype=dtype)
        self._pack(rows.data_ptr(), n, k, bf16, packed.data_ptr())
        filled = torch.zeros(-(-n // PANEL) * PANEL)
        if bias is not None:
            filled[:n] = bias.detach()
        return LinearArgument(packed.data_ptr(), filled.data_ptr(), k, n), (packed, filled)


@lru_cache(maxsize=1)
def product_kernel() -> ProductKernel | None:
    loaded = library()
    return None if loaded is None else ProductKernel(loaded)


class NativeProduct:
    """x·Wᵀ + b, and with `gelu` its exact GELU. The operands are in `dtype`; sums are float32."""

    def __init__(
        self,
        kernel: ProductKernel,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        gelu: bool,
        wide_output: bool,
    ) -> None:
        self._kernel = kernel
        self._linear, self._held = kernel.packed(weight, bias, dtype)
        self._bf16, self._gelu = dtype is torch.bfloat16, gelu
        self._output_dtype = torch.float32 if wide_output else dtype

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, in) in float32 or `dtype` to (…, out) in `dtype`, or in float32 with `wide_output`."""
        rows = rows.contiguous()
        linear, num_rows = self._linear, rows.numel() // self._linear.k
        output = torch.empty(*rows.shape[:-1], linear.n, dtype=self._output_dtype)
        narrow = None
        if self._bf16:
            narrow = torch.empty(self._kernel.narrow_size(linear.k, num_rows), dtype=torch.bfloat16)
        self._kernel.multiply(
            ctypes.byref(linear),
            ctypes.byref(
                Operands(
                    input=rows.data_ptr(),
                    rows=num_rows,
                    bf16=self._bf16,
                    output=output.data_ptr(),
                    output_stride=linear.n,
                    bf16_output=output.dtype is torch.bfloat16,
                    gelu=self._gelu,
                )
            ),
            rows.dtype is torch.float32,
            None if narrow is None else narrow.data_ptr(),
            torch.get_num_threads(),
        )
        return output

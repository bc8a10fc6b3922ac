"""The operations between the matrix products of a BERT layer on CUDA, each as one kernel.

torch would read and write the float32 residual stream separately for the sum, for the norm and for the
rounding to 16 bits; here it is read once and written once. Written in Triton, which torch's CUDA packages for
Linux include. A kernel is compiled at its first call, when the model is loaded, and cached on disk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements of one program, some 32 for each thread. Several shorter rows share a program, which reads the
# norm's weights once for all of them.
PROGRAM_SIZE = 4096
# The number of rows differs from batch to batch, so kernels are not specialized on it: one that is compiled
# for multiples of 16, for example, would have to be compiled again for other values.
ANY_ROWS = ["num_rows"]


@triton.jit
def norm_rows(rows, mask, weight, bias, columns, num_columns, epsilon):  # type: ignore[no-untyped-def]
    """LayerNorm over the columns of a (rows, columns) block, in
    float32, with one read of the block from memory."""
    mean = tl.sum(rows, 1) / num_columns
    centred = tl.where(mask, rows - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / num_columns
    scale = tl.load(weight + columns, columns < num_columns, 0.0)
    shift = tl.load(bias + columns, columns < num_columns, 0.0)
    return centred * (1 / tl.sqrt(variance + epsilon))[:, None] * scale[None, :] + shift[None, :]


@triton.jit(do_not_specialize=ANY_ROWS)
def sum_norm_kernel(  # type: ignore[no-untyped-def]
    product,
    residual,
    weight,
    bias,
    normed,
    narrowed,
    num_rows,
    num_columns,
    epsilon,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (row < num_rows)[:, None] & (columns < num_columns)[None, :]
    place = row[:, None] * num_columns + columns[None, :]
    rows = tl.load(product + place, mask, 0.0).to(tl.float32) + tl.load(residual + place, mask, 0.0)
    result = norm_rows(rows, mask, weight, bias, columns, num_columns, epsilon)
    tl.store(normed + place, result, mask)
    tl.store(narrowed + place, result.to(narrowed.dtype.element_ty), mask)


def programs(num_rows: int, num_columns: int) -> tuple[tuple[int], int, int]:
    """The grid of a kernel over (num_rows, num_columns), and its constants ROWS and COLUMNS."""
    columns = triton.next_power_of_2(num_columns)
    rows = max(PROGRAM_SIZE // columns, 1)
    return (triton.cdiv(num_rows, rows),), rows, columns


def sum_norm(
    product: torch.Tensor, residual: torch.Tensor, norm: torch.nn.LayerNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(product + residual), returned in float32 and in the
    product's type. All tensors are (rows, H), contiguous."""
    normed, narrowed = torch.empty_like(residual), torch.empty_like(product)
    num_rows, num_columns = product.shape
    grid, *sizes = programs(num_rows, num_columns)
    sum_norm_kernel[grid](
        product,
        residual,
        norm.weight,
        norm.bias,
        normed,
        narrowed,
        num_rows,
        num_columns,
        norm.eps,
        *sizes,
    )
    return normed, narrowed


@triton.jit(do_not_specialize=ANY_ROWS, do_not_specialize_on_alignment=["words", "types", "positions"])
def embed_norm_kernel(  # type: ignore[no-untyped-def]
    words,
    types,
    positions,
    word_table,
    type_table,
    position_table,
    weight,
    bias,
    normed,
    num_words,
    num_types,
    num_positions,
    num_rows,
    num_columns,
    epsilon,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_row = row < num_rows
    mask = is_row[:, None] & (columns < num_columns)[None, :]
    word, kind, position = (
        tl.load(words + row, is_row, 0),
        tl.load(types + row, is_row, 0),
        tl.load(positions + row, is_row, 0),
    )
    # For a row with an id outside of its table nothing is read, and the result is NaN.
    is_known = (word >= 0) & (word < num_words) & (kind >= 0) & (kind < num_types)
    is_known &= (position >= 0) & (position < num_positions)
    mask &= is_known[:, None]
    rows = tl.load(word_table + word[:, None] * num_columns + columns[None, :], mask, 0.0)
    rows += tl.load(type_table + kind[:, None] * num_columns + columns[None, :], mask, 0.0)
    rows += tl.load(position_table + position[:, None] * num_columns + columns[None, :], mask, 0.0)
    result = norm_rows(rows, mask, weight, bias, columns, num_columns, epsilon)
    place = row.to(tl.int64)[:, None] * num_columns + columns[None, :]
    result = tl.where(is_known[:, None], result, float("nan"))
    tl.store(normed + place, result, is_row[:, None] & (columns < num_columns)[None, :])


def embed_norm(
    ids: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    norm: torch.nn.LayerNorm,
) -> torch.Tensor:
    """The norm of the sum of each row's embeddings, (rows, H) float32. `ids`
    and `tables` are those of words, types and positions, in this order; ids
    are (rows,) int64. A row with an id outside of its table becomes NaN."""
    num_rows, num_columns = len(ids[0]), tables[0].shape[1]
    normed = torch.empty(num_rows, num_columns, device=tables[0].device)
    grid, *sizes = programs(num_rows, num_columns)
    embed_norm_kernel[grid](
        *ids,
        *tables,
        norm.weight,
        norm.bias,
        normed,
        *map(len, tables),
        num_rows,
        num_columns,
        norm.eps,
        *sizes,
    )
    return normed

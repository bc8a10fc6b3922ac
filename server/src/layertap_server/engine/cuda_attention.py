"""Attention over packed texts on CUDA: torch's own flash attention for texts of any lengths, in 16 bits.

The public name for it, `torch.nn.attention.varlen.varlen_attn`, takes a scale and a window only from
torch 2.11, and may choose cuDNN, which plans anew for shapes that it has not met: ours are always new.
The operator under it has kept its arguments since torch 2.8. That it does here what it should is found
out at load (cuda.py), not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from layertap_server.engine.packing import Packing
from layertap_server.engine.transfer import to_device


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where the texts of a batch lie, as the kernel wants it.

    The filling behind the texts is a text too, so that each row of the result is written; texts
    behind that are empty.
    """

    # (texts + 1,) int32, on the device: text i covers rows cu_seqlens[i] to cu_seqlens[i + 1].
    cu_seqlens: torch.Tensor
    # At least the rows of the longest.
    max_length: int

    @classmethod
    def of(cls, packing: Packing, device: torch.device) -> Sequences:
        starts = sequence_starts(packing, packing.num_rows, len(packing.works) + 1)
        return cls(to_device(starts, device), int(np.diff(starts).max()))


def sequence_starts(
    packing: Packing, num_rows: int, num_texts: int
) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """`cu_seqlens` for the texts in `num_rows` rows, with their filling and empty texts `num_texts` in all."""
    starts = np.full(num_texts + 1, num_rows, np.int32)
    starts[: len(packing.cu_seqlens)] = packing.cu_seqlens
    return starts


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Attention of each packed text to itself, (total, heads, head_dim) each, and the result too.

    In the type of `value`, float16 or bfloat16, also where rotary embeddings have left query and key
    in float32. Raises RuntimeError for what the kernel cannot do: other types, heads of more than 256
    or not a multiple of 8, devices before Ampere.
    """
    reach = -1 if window is None else window - 1
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        sequences.cu_seqlens,
        sequences.cu_seqlens,
        sequences.max_length,
        sequences.max_length,
        0.0,  # dropout
        False,  # causal
        False,  # returns no debug mask
        scale=scaling,
        window_size_left=reach,
        window_size_right=reach,
    )[0]
    return output

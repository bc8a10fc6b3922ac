"""The attention maps of one layer for one text: where they are written, and how kernel calls divide them so
that their scratch memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from layertap_server.engine.transfer import to_device

# Maps that are averaged or converted are first computed into float32 scratch memory. One kernel call uses at
# most this much of it, or half of the bytes of the layer's maps in the results, whichever is larger.
MAP_SCRATCH_BYTES = 2**21


@dataclass(frozen=True, slots=True)
class MapTap:
    """The attention maps of one layer for one text, and the tensor that they are written to."""

    # Index of the text in its packing, and the rows [start, end) that it covers there.
    text: int
    start: int
    end: int
    heads: tuple[int, ...]
    # None: every row.
    query_positions: tuple[int, ...] | None
    mean_over_heads: bool
    # (heads or 1, query positions, key positions)
    target: torch.Tensor
    # The heads' weights in the mean over heads; None: equal weights.
    head_counts: tuple[int, ...] | None = None
    # None: every column.
    key_positions: tuple[int, ...] | None = None

    @property
    def is_direct(self) -> bool:
        """Whether the kernel can write its maps directly into `target`: float32, not averaged and whole rows."""
        is_whole = self.key_positions is None and not self.mean_over_heads
        return is_whole and self.target.dtype is torch.float32

    @property
    def scratch_bytes(self) -> int:
        """Bytes of float32 scratch memory that its maps need in addition to `target`."""
        return 0 if self.is_direct else self.num_queries * self.row_bytes

    @property
    def num_queries(self) -> int:
        return int(self.target.shape[1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one query position's row of the maps of all requested heads, in float32."""
        return len(self.heads) * (self.end - self.start) * 4

    def pieces(self, max_bytes: int) -> Iterator[MapTap]:
        """Splits the tap by query position into taps whose float32 maps take at most `max_bytes` each. A
        single row that takes more than that is a tap of its own."""
        num_rows = max(max_bytes // self.row_bytes, 1)
        if num_rows >= self.num_queries:
            yield self
            return
        positions = self.query_positions or tuple(range(self.num_queries))
        for first in range(0, self.num_queries, num_rows):
            rows = slice(first, first + num_rows)
            yield replace(self, query_positions=positions[rows], target=self.target[:, rows])

    def write(self, weights: torch.Tensor) -> None:
        """Writes `weights` (heads, query positions, T) to the target: averaged over heads and only some columns,
        if requested.

        May change `weights` in place: the caller must not use it afterwards.
        """
        if self.head_counts is not None:
            counts = torch.tensor(self.head_counts, dtype=torch.float32)
            shares = (counts / counts.sum()).to(weights.device, non_blocking=True)
            weights = weights.float().mul_(shares[:, None, None]).sum(0, keepdim=True)
        elif self.mean_over_heads:
            weights = weights.mean(0, keepdim=True)
        if self.key_positions is not None:
            weights = weights[..., to_device(np.array(self.key_positions), weights.device)]
        self.target.copy_(weights)


def map_calls(taps: Sequence[MapTap]) -> Iterator[list[MapTap]]:
    """Divides the maps of one layer among kernel calls, so that the
    scratch memory of each call is bounded."""
    limit = max(MAP_SCRATCH_BYTES, sum(tap.target.nbytes for tap in taps) // 2)
    call: list[MapTap] = []
    scratch_bytes = 0
    for piece in chain.from_iterable(tap.pieces(limit) if tap.scratch_bytes else (tap,) for tap in taps):
        if call and scratch_bytes + piece.scratch_bytes > limit:
            yield call
            call, scratch_bytes = [], 0
        call.append(piece)
        scratch_bytes += piece.scratch_bytes
    if call:
        yield call

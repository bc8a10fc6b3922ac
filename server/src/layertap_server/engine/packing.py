"""Packing: the texts of a batch concatenated along one dimension, without padding between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from layertap_server.plan import Int64Array, Work

# oneDNN prepares and keeps a kernel for each number of rows that it meets: tens of milliseconds and some 3 MB
# for a model. So the rows are padded to one of a few sizes. This adds at most a sixteenth or, below 64
# tokens, at most 3 rows.
MIN_ROW_STEP = 4
MAX_FILL = 1 / 16


def fill_up(num_tokens: int, min_step: int = MIN_ROW_STEP, max_fill: float = MAX_FILL) -> int:
    """The number of rows that a batch of `num_tokens` is padded to."""
    octave = 1 << (num_tokens.bit_length() - 1)
    step = max(int(octave * max_fill), min_step)
    return -(-num_tokens // step) * step


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring texts of the same length: one attention call
    without a padding mask handles all of them."""

    start: int
    num_texts: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.num_texts * self.length


@dataclass(frozen=True)
class Packing:
    """A batch in packed order: sorted by length, so that texts of equal length are neighbours."""

    works: tuple[Work, ...]
    # For each packed text, its index in the batch as it was given.
    order: tuple[int, ...]
    # Text i covers rows cu_seqlens[i] to cu_seqlens[i + 1] of the packed (total, …) tensors.
    cu_seqlens: tuple[int, ...]
    cu_seqlens_array: Int64Array
    # Rows of each text.
    lengths: Int64Array

    @classmethod
    def of(cls, works: Sequence[Work]) -> Packing:
        lengths = [work.num_tokens for work in works]
        order = sorted(range(len(works)), key=lengths.__getitem__)
        packed_lengths = np.array([lengths[i] for i in order], np.int64)
        cu_seqlens = np.zeros(len(works) + 1, np.int64)
        np.cumsum(packed_lengths, out=cu_seqlens[1:])
        packed = tuple([works[i] for i in order])
        return cls(packed, tuple(order), tuple(cu_seqlens.tolist()), cu_seqlens, packed_lengths)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        runs: list[Run] = []
        for length, group in groupby(self.lengths.tolist()):
            start = runs[-1].end if runs else 0
            runs.append(Run(start, len(list(group)), length))
        return tuple(runs)

    @property
    def total_tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def num_rows(self) -> int:
        """Rows of the packed tensors, including the padding rows after the last text."""
        return fill_up(self.total_tokens)

    @property
    def num_padded_rows(self) -> int:
        """Rows of a padded pass, where every text is padded to the
        length of the longest, which is the last one."""
        return len(self.works) * self.works[-1].num_tokens

    def rows(self) -> Iterator[tuple[Work, int, int]]:
        """Each text with the rows [start, end) that it covers."""
        return zip(self.works, self.cu_seqlens, self.cu_seqlens[1:], strict=False)

    def input_ids(self) -> Int64Array:
        return np.concatenate([work.input_ids for work in self.works])

    def token_type_ids(self) -> Int64Array:
        if all(work.token_type_ids is None for work in self.works):
            return np.zeros(self.total_tokens, np.int64)
        return np.concatenate(
            [
                np.zeros(work.num_tokens, np.int64) if work.token_type_ids is None else work.token_type_ids
                for work in self.works
            ]
        )

    def of_each_row(self, of_each_text: Int64Array) -> Int64Array:
        """Expands one value for each text to one value for each of its rows: (texts,) to (total,)."""
        return np.repeat(of_each_text, self.lengths)

"""What to capture in one pass: at which layer, for which texts, and where to stop.

Hooks on the layers (hooks.py) hand each hidden state to the `Taps` of the batch under way, the attention
function its maps (on the padded pass, hooks too); rows are written at once to where the reply wants
them, so that no layer's full output outlives its use. Layers are counted as they are called, since
not every family numbers its modules, and ALBERT calls one module for all its layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from layertap_server.engine.packing import Packing
from layertap_server.engine.result_memory import RESULT_MEMORY
from layertap_server.engine.transfer import blocks_of, to_device
from layertap_server.plan import DType, OutputField, OutputPlan, Places, TensorSpec, Work

TORCH_DTYPES: dict[DType, torch.dtype] = {
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
    DType.INT8: torch.int8,
    DType.UINT8: torch.uint8,
}


# Maps that are averaged or converted wait in float32: together in at most this much, or in half of
# what a layer's maps take in the replies, where that is more.
MAP_SCRATCH_BYTES = 2**21


# Rows of a result that are put in their places at once: of as many, the indices take half a MiB.
PLACED_ROWS = 2**16


# (query, key, value, scaling, window) to the attention of each text to itself, (total, heads, head_dim) each.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, "int | None"], torch.Tensor]


class Part(NamedTuple):
    """What one text gets: some rows of a tensor that may hold the same of other texts."""

    block: torch.Tensor
    first: int
    last: int


class DepthReachedError(Exception):
    """Nothing above this layer is wanted by anyone in the batch."""


@dataclass(frozen=True, slots=True)
class MapTap:
    """One attention map of one text, and where in its reply it goes."""

    # Index of the text in its packing, and the rows [start, end) that it covers there.
    text: int
    start: int
    end: int
    heads: tuple[int, ...]
    # None: every row.
    query_positions: tuple[int, ...] | None
    mean_over_heads: bool
    # (heads or 1, query positions, T)
    target: torch.Tensor
    # The weights of the heads in their mean; None: all alike.
    head_counts: tuple[int, ...] | None = None

    @property
    def is_direct(self) -> bool:
        """Whether its maps are computed right into the target."""
        return self.target.dtype is torch.float32 and not self.mean_over_heads

    @property
    def scratch_bytes(self) -> int:
        """What its float32 maps take beside the target."""
        return 0 if self.is_direct else self.num_queries * self.row_bytes

    @property
    def num_queries(self) -> int:
        return int(self.target.shape[1])

    @property
    def row_bytes(self) -> int:
        """Of one row of the maps of all heads asked, in float32."""
        return len(self.heads) * (self.end - self.start) * 4

    def pieces(self, max_bytes: int) -> Iterator[MapTap]:
        """Itself in runs of rows whose float32 maps take at most `max_bytes` each, or are one row."""
        num_rows = max(max_bytes // self.row_bytes, 1)
        if num_rows >= self.num_queries:
            yield self
            return
        positions = self.query_positions or tuple(range(self.num_queries))
        for first in range(0, self.num_queries, num_rows):
            rows = slice(first, first + num_rows)
            yield replace(self, query_positions=positions[rows], target=self.target[:, rows])

    def write(self, weights: torch.Tensor) -> None:
        """`weights` is (heads, query positions, T); it is the caller's no more."""
        if self.head_counts is not None:
            counts = torch.tensor(self.head_counts, dtype=torch.float32)
            shares = (counts / counts.sum()).to(weights.device, non_blocking=True)
            weights = weights.float().mul_(shares[:, None, None]).sum(0, keepdim=True)
        elif self.mean_over_heads:
            weights = weights.mean(0, keepdim=True)
        self.target.copy_(weights)


def map_calls(taps: Sequence[MapTap]) -> Iterator[list[MapTap]]:
    """The maps of one layer in portions, one for each call of the kernel, whose scratch is bounded."""
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


def only_hidden_state(work: Work, last_index: int) -> int | None:
    """The one hidden state that is all a text wants; None where it wants anything else."""
    if len(work.specs) != 1 or work.plan.embeddings:
        return None
    plan = work.plan
    wanted = (last_index,) if plan.last_hidden_state else plan.hidden_states or ()
    return wanted[0] if len(wanted) == 1 and plan.hidden_places is None else None


def computed_shape(work: Work, spec: TensorSpec) -> tuple[int, ...]:
    """Of the tensor of a spec, without what is the same in several places of it."""
    plan = work.plan
    if not plan.repeated(spec.field):
        return spec.shape
    if spec.field is OutputField.HIDDEN_STATES:
        return len(plan.hidden_states or ()), *spec.shape[1:]
    assert plan.attentions is not None
    return plan.attentions.computed_shape(work.num_tokens)


def repeated_bytes(work: Work) -> int:
    """Of what is computed once and stands in several places of the result."""
    return sum(
        math.prod(computed_shape(work, spec)) * spec.dtype.itemsize
        for spec in work.specs
        if work.plan.repeated(spec.field)
    )


def put_in_places(computed: torch.Tensor, places: Sequence[Places | None], whole: torch.Tensor) -> None:
    """Fills `whole`, whose row (i, j, …) in its leading dimensions is the one of `computed` at the places of i, j, …"""
    repeated = [axis for axis, one in enumerate(places) if one is not None]
    if len(repeated) == 1:
        [axis] = repeated
        index = to_device(np.array(places[axis]), whole.device)
        torch.index_select(computed, axis, index, out=whole)
        return
    num_leading = len(places)
    asked, had = whole.shape[:num_leading], computed.shape[:num_leading]
    tables = [
        np.arange(number) if one is None else np.array(one) for number, one in zip(asked, places, strict=True)
    ]
    source, target = computed.flatten(num_leading).flatten(0, -2), whole.flatten(num_leading).flatten(0, -2)
    for first in range(0, len(target), PLACED_ROWS):
        last = min(first + PLACED_ROWS, len(target))
        indices = np.unravel_index(np.arange(first, last), tuple(asked))
        rows = np.ravel_multi_index(
            [table[index] for table, index in zip(tables, indices, strict=True)], tuple(had)
        )
        torch.index_select(source, 0, to_device(rows, source.device), out=target[first:last])


@dataclass(slots=True)
class Taps:
    """The captures of one batch."""

    packing: Packing
    num_layers: int
    device: torch.device
    # The number of last_hidden_state among the hidden states: L, or L + 1 where it is not hidden state L.
    last_index: int = -1
    # Of each text, in the order of its `Work.specs`; those of embeddings and poolers come later, by pooling.
    parts: list[list[Part | None]] = field(default_factory=list)
    # Hidden states (total, H) that pooling needs whole.
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    keep: set[int] = field(default_factory=set)
    # By text and number of the tensor: what was computed once and was asked for repeatedly.
    repeated: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    # Hidden-state index → (rows of the packed tensor, target).
    row_taps: dict[int, list[tuple[slice, torch.Tensor]]] = field(default_factory=lambda: defaultdict(list))
    map_taps: dict[int, list[MapTap]] = field(default_factory=lambda: defaultdict(list))
    # Rows of the batch's tokens in the padded tensors, flattened to (texts·T, H); None: it runs packed.
    token_rows: torch.Tensor | None = None
    # (texts, H), where the model's own forward gave them.
    pooler_outputs: torch.Tensor | None = None
    # What computes attention in this pass, where it is not the one of the device.
    attention: Attention | None = None
    deepest_hidden: int = -1
    deepest_attention: int = -1
    next_hidden: int = 0
    next_attention: int = 0

    def __post_init__(self) -> None:
        if self.last_index < 0:
            self.last_index = self.num_layers
        # Neighbours that want nothing but the same hidden state have it in one block, by one copy.
        alike: list[int] = []
        wanted_before: tuple[int, DType] | None = None
        for text, work in enumerate(self.packing.works):
            index = only_hidden_state(work, self.last_index)
            wanted = None if index is None else (index, work.specs[0].dtype)
            if alike and wanted != wanted_before:
                self._tap_alike(alike)
                alike = []
            if wanted is None:
                self._tap_text(text, work)
            else:
                alike.append(text)
            wanted_before = wanted
        if alike:
            self._tap_alike(alike)
        self.deepest_hidden = max([*self.row_taps, *self.keep], default=-1)
        self.deepest_attention = max(self.map_taps, default=-1)

    @property
    def buffers(self) -> list[list[torch.Tensor | None]]:
        """The parts as tensors, each in the shape of its spec."""
        return [
            [
                part and part.block[part.first : part.last].view(spec.shape)
                for part, spec in zip(parts, work.specs, strict=True)
            ]
            for parts, work in zip(self.parts, self.packing.works, strict=True)
        ]

    def _tap_text(self, text: int, work: Work) -> None:
        plan = work.plan
        for embedding in plan.embeddings:
            self.keep.update(embedding.layers)
        if plan.pooler_output:
            self.keep.add(self.last_index)
        parts: list[Part | None] = [None] * len(work.specs)
        self.parts.append(parts)
        num_pooled = len(plan.embeddings) + plan.pooler_output
        if len(work.specs) == num_pooled:
            return
        by_field: dict[OutputField, torch.Tensor] = {}
        for number, spec in enumerate(work.specs):
            if spec.field not in (OutputField.EMBEDDINGS, OutputField.POOLER_OUTPUT):
                shape = computed_shape(work, spec)
                by_field[spec.field] = buffer = self._buffer(shape, TORCH_DTYPES[spec.dtype])
                if plan.repeated(spec.field):
                    self.repeated[text, number] = buffer
                else:
                    parts[number] = Part(buffer, 0, len(buffer))
        start, end = self.packing.cu_seqlens[text : text + 2]
        self._tap_hidden_states(plan, slice(start, end), by_field)
        self._tap_attentions(plan, text, start, end, by_field)

    def _tap_alike(self, texts: list[int]) -> None:
        """Neighbours that want nothing but the same hidden state, as many as a block takes together."""
        works = self.packing.works
        for block in blocks_of(texts, lambda text: works[text].specs[0].nbytes):
            start, end = self.packing.cu_seqlens[block[0]], self.packing.cu_seqlens[block[-1] + 1]
            first = works[block[0]]
            spec, index = first.specs[0], only_hidden_state(first, self.last_index)
            assert index is not None
            rows = self._buffer((end - start, spec.shape[-1]), TORCH_DTYPES[spec.dtype])
            self.row_taps[index].append((slice(start, end), rows))
            for text in block:
                text_start, text_end = self.packing.cu_seqlens[text : text + 2]
                self.parts.append([Part(rows, text_start - start, text_end - start)])

    def _buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self.device.type == "cpu":
            return RESULT_MEMORY.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _tap_hidden_states(
        self, plan: OutputPlan, rows: slice, by_field: dict[OutputField, torch.Tensor]
    ) -> None:
        if plan.last_hidden_state:
            self.row_taps[self.last_index].append((rows, by_field[OutputField.LAST_HIDDEN_STATE]))
        for slot, index in enumerate(plan.hidden_states or ()):
            self.row_taps[index].append((rows, by_field[OutputField.HIDDEN_STATES][slot]))

    def _tap_attentions(
        self, plan: OutputPlan, text: int, start: int, end: int, by_field: dict[OutputField, torch.Tensor]
    ) -> None:
        asked = plan.attentions
        if asked is None:
            return
        for slot, layer in enumerate(asked.layers):
            self.map_taps[layer].append(
                MapTap(
                    text,
                    start,
                    end,
                    asked.heads,
                    asked.query_positions,
                    asked.mean_over_heads,
                    by_field[OutputField.ATTENTIONS][slot],
                    asked.head_counts,
                )
            )

    @property
    def hidden_size(self) -> int:
        """Of the hidden states that were kept."""
        return int(next(iter(self.kept.values())).shape[-1])

    def fill_repeated(self) -> None:
        """Once the pass has run: puts what was asked for repeatedly in its places, one tensor after the other."""
        if self.repeated:
            self.row_taps.clear()  # they hold what is let go of here
            self.map_taps.clear()
        while self.repeated:
            (text, number), computed = self.repeated.popitem()
            work = self.packing.works[text]
            spec = work.specs[number]
            whole = self._buffer(spec.shape, TORCH_DTYPES[spec.dtype])
            put_in_places(computed, work.plan.repeated(spec.field), whole)
            self.parts[text][number] = Part(whole, 0, len(whole))

    def float_rows(self, layer: int) -> torch.Tensor:
        """A hidden state that was kept, (total, H) float32: converted once for all that is pooled of it."""
        rows = self.kept[layer]
        if rows.dtype is not torch.float32:
            rows = self.kept[layer] = rows.float()
        return rows

    def write_hidden_state(self, index: int, hidden: torch.Tensor) -> None:
        """Takes hidden state `index` as the model gives it: (1, total, H), or padded (texts, T, H)."""
        if index not in self.row_taps and index not in self.keep:
            return
        packed = hidden[0] if self.token_rows is None else hidden.flatten(0, 1)[self.token_rows]
        for rows, target in self.row_taps.get(index, ()):
            target.copy_(packed[rows])
        if index in self.keep:
            self.kept[index] = packed

    def write_padded_maps(self, weights: torch.Tensor) -> None:
        """Takes the maps of the attention layer that ran now, (texts, heads, T, T)."""
        for tap in chain.from_iterable(self.begin_attention()):
            length = tap.end - tap.start
            positions = range(length) if tap.query_positions is None else tap.query_positions
            heads = to_device(np.array(tap.heads), self.device)[:, None]
            rows = to_device(np.array(positions), self.device)
            tap.write(weights[tap.text][heads, rows, :length])
        self.end_attention()

    # ------------------------------------------------------------ called by the pass, in its order

    def next_hidden_state(self, hidden: torch.Tensor) -> None:
        """Takes what each layer receives, hidden states 0 to L-1; ends the pass where it may.

        The model's last_hidden_state, after its final norm if it has one, is `last_index`.
        """
        index = self.next_hidden
        self.next_hidden += 1
        self.write_hidden_state(index, hidden)
        if index >= self.deepest_hidden and index > self.deepest_attention:
            raise DepthReachedError

    def begin_attention(self) -> Iterator[list[MapTap]]:
        """The maps wanted of the attention layer that runs now, in portions as `map_calls` has them."""
        layer = self.next_attention
        self.next_attention += 1
        return map_calls(self.map_taps.get(layer, ()))

    def begin_layers(self) -> list[list[MapTap]]:
        """In place of `begin_attention`, the maps wanted of each layer that may run now, one after the other:
        up to where a hidden state is wanted, or maps that are not computed right into their targets."""
        first = self.next_attention
        stops = [index for index in (*self.row_taps, *self.keep) if index > first]
        stops += [
            layer + 1
            for layer, taps in self.map_taps.items()
            if layer >= first and (layer == self.deepest_attention or not all(tap.is_direct for tap in taps))
        ]
        self.next_attention = min(stops, default=self.num_layers)
        self.next_hidden += self.next_attention - first - 1
        return [self.map_taps.get(layer, []) for layer in range(first, self.next_attention)]

    @property
    def attention_is_last(self) -> bool:
        """Whether nothing is wanted beyond the maps of the attention layer that runs now."""
        return self.next_attention > self.deepest_attention and self.deepest_hidden < self.next_attention

    def end_attention(self) -> None:
        if self.attention_is_last:
            raise DepthReachedError

"""What to capture in one pass: at which layer, for which texts, and where to stop.

Hooks on the layers (hooks.py) pass each hidden state to the `Taps` of the running batch. The attention
function passes the attention maps; in the padded pass, hooks do that too. Rows are copied to the result
tensors at once, so that no layer's full output is kept longer than needed. Layers are numbered by the order
of their calls, since not every family numbers its modules, and ALBERT calls one module for all its layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from layertap_server.engine.attention_maps import MapTap, map_calls
from layertap_server.engine.contacts import ContactHead
from layertap_server.engine.packing import Packing
from layertap_server.engine.repeats import computed_shape, put_in_places
from layertap_server.engine.result_memory import RESULT_MEMORY
from layertap_server.engine.transfer import blocks_of, to_device
from layertap_server.enums import DType, OutputField
from layertap_server.plan import OutputPlan, Work

TORCH_DTYPES: dict[DType, torch.dtype] = {
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
    DType.INT8: torch.int8,
    DType.UINT8: torch.uint8,
    DType.INT32: torch.int32,
}


# Outputs that are computed after the pass, from what it has kept: hidden states, and sums over attention maps.
COMPUTED_LATER = (
    OutputField.POOLER_OUTPUT,
    OutputField.EMBEDDINGS,
    OutputField.LOGITS,
    OutputField.LOGIT_IDS,
    OutputField.SPARSE_IDS,
    OutputField.SPARSE_WEIGHTS,
    OutputField.CONTACTS,
)


# (query, key, value, scaling, window) → output. Each text attends only to itself; the tensors are
# (total, heads, head_dim) each.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, "int | None"], torch.Tensor]


class Part(NamedTuple):
    """One result of one text: rows [first, last) of `block`, which may also hold rows of other texts."""

    block: torch.Tensor
    first: int
    last: int


class DepthReachedError(Exception):
    """Ends a pass: no text in the batch wants anything from the layers above this one."""


def only_hidden_state(work: Work, last_index: int) -> int | None:
    """The index of the hidden state, if a single one is all that a text wants; else None."""
    if len(work.specs) != 1 or work.plan.embeddings:
        return None
    plan = work.plan
    wanted = (last_index,) if plan.last_hidden_state else plan.hidden_states or ()
    is_whole = plan.hidden_places is None and plan.hidden_positions is None and plan.last_positions is None
    return wanted[0] if len(wanted) == 1 and is_whole else None


@dataclass(slots=True)
class Taps:
    """The captures of one batch."""

    packing: Packing
    num_layers: int
    device: torch.device
    # The index of last_hidden_state among the hidden states: L where it is hidden state L, else L + 1.
    last_index: int = -1
    # For each text its results, in the order of its `Work.specs`. The `COMPUTED_LATER` are filled in after the
    # pass, from what is kept.
    parts: list[list[Part | None]] = field(default_factory=list)
    # Whole hidden states (total, H) that pooling needs, by index; `keep` holds the indices to capture.
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    keep: set[int] = field(default_factory=set)
    # (text, index in its `Work.specs`) → the tensor with each slice
    # computed once, where the result repeats slices.
    repeated: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    # Hidden-state index → (rows of the packed tensor, target).
    row_taps: dict[int, list[tuple[slice | torch.Tensor, torch.Tensor]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    map_taps: dict[int, list[MapTap]] = field(default_factory=lambda: defaultdict(list))
    # Needed for contact maps. Text → the sums over its maps, which become its contact map.
    contact_head: ContactHead | None = None
    contact_sums: dict[int, torch.Tensor] = field(default_factory=dict)
    # The rows of the tokens in a padded tensor that is flattened to
    # (texts·T, H); None: the batch runs packed.
    token_rows: torch.Tensor | None = None
    # (texts, H), if the model's own forward returned them.
    pooler_outputs: torch.Tensor | None = None
    # Computes attention in this pass in place of the device's default.
    attention: Attention | None = None
    deepest_hidden: int = -1
    deepest_attention: int = -1
    next_hidden: int = 0
    next_attention: int = 0

    def __post_init__(self) -> None:
        if self.last_index < 0:
            self.last_index = self.num_layers
        for needs in {work.plan.scratch for work in self.packing.works}:
            self.keep |= needs.pooled_layers
            if needs.needs_last:
                self.keep.add(self.last_index)
        # Neighbouring texts that want nothing but the same hidden state share one block, filled by one copy.
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
        """The parts as tensors, each in the shape of its spec; None where pooling has not filled one in."""
        return [
            [
                part and part.block[part.first : part.last].view(spec.shape)
                for part, spec in zip(parts, work.specs, strict=True)
            ]
            for parts, work in zip(self.parts, self.packing.works, strict=True)
        ]

    def _tap_text(self, text: int, work: Work) -> None:
        plan = work.plan
        parts: list[Part | None] = [None] * len(work.specs)
        self.parts.append(parts)
        by_field: dict[OutputField, torch.Tensor] = {}
        for number, spec in enumerate(work.specs):
            if spec.field not in COMPUTED_LATER:
                shape = computed_shape(work, spec)
                by_field[spec.field] = buffer = self.new_buffer(shape, TORCH_DTYPES[spec.dtype])
                if plan.repeated(spec.field):
                    self.repeated[text, number] = buffer
                else:
                    parts[number] = Part(buffer, 0, len(buffer))
        start, end = self.packing.cu_seqlens[text : text + 2]
        if plan.contacts:
            self._tap_contacts(text, work, start, end)
        if by_field:
            self._tap_hidden_states(plan, start, end, by_field)
            self._tap_attentions(plan, text, start, end, by_field)

    def _tap_alike(self, texts: list[int]) -> None:
        """Captures the one hidden state that these neighbouring texts
        want, in shared blocks (`blocks_of`)."""
        works = self.packing.works
        for block in blocks_of(texts, lambda text: works[text].specs[0].nbytes):
            start, end = self.packing.cu_seqlens[block[0]], self.packing.cu_seqlens[block[-1] + 1]
            first = works[block[0]]
            spec, index = first.specs[0], only_hidden_state(first, self.last_index)
            assert index is not None
            rows = self.new_buffer((end - start, spec.shape[-1]), TORCH_DTYPES[spec.dtype])
            self.row_taps[index].append((slice(start, end), rows))
            for text in block:
                text_start, text_end = self.packing.cu_seqlens[text : text + 2]
                self.parts.append([Part(rows, text_start - start, text_end - start)])

    def new_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialized memory for results."""
        if self.device.type == "cpu":
            return RESULT_MEMORY.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _tap_hidden_states(
        self, plan: OutputPlan, start: int, end: int, by_field: dict[OutputField, torch.Tensor]
    ) -> None:
        if plan.last_hidden_state:
            rows = self._rows(start, end, plan.last_positions)
            self.row_taps[self.last_index].append((rows, by_field[OutputField.LAST_HIDDEN_STATE]))
        if plan.hidden_states:
            rows = self._rows(start, end, plan.hidden_positions)
            for slot, index in enumerate(plan.hidden_states):
                self.row_taps[index].append((rows, by_field[OutputField.HIDDEN_STATES][slot]))

    def _rows(self, start: int, end: int, positions: tuple[int, ...] | None) -> slice | torch.Tensor:
        """The rows of some positions of the text in rows [start, end); None: of all of them."""
        if positions is None:
            return slice(start, end)
        first, last = positions[0], positions[-1]
        if positions == tuple(range(first, last + 1)):
            return slice(start + first, start + last + 1)
        return to_device(np.array(positions) + start, self.device)

    def _tap_attentions(
        self, plan: OutputPlan, text: int, start: int, end: int, by_field: dict[OutputField, torch.Tensor]
    ) -> None:
        asked = plan.attentions
        if asked is None:
            return
        target, first = by_field[OutputField.ATTENTIONS], 0
        for slot, layer in enumerate(asked.layers):
            heads = asked.heads_of(layer)
            if asked.pairs is None:
                of_layer = target[slot]
            else:  # the pairs are ascending, so those of a layer follow each other
                of_layer = target[first : first + len(heads), 0]
                first += len(heads)
            self.map_taps[layer].append(
                MapTap(
                    text,
                    start,
                    end,
                    heads,
                    asked.query_positions,
                    asked.mean_over_heads,
                    of_layer,
                    asked.head_counts,
                    asked.key_positions,
                )
            )

    def _tap_contacts(self, text: int, work: Work, start: int, end: int) -> None:
        assert self.contact_head is not None
        shape = work.specs[-1].shape
        if work.specs[-1].dtype is DType.FLOAT32:
            sums = self.new_buffer(shape, torch.float32).zero_()
        else:
            sums = torch.zeros(shape, device=self.device)
        self.contact_sums[text] = sums
        for layer, tap in enumerate(self.contact_head.taps(work, text, start, end, sums)):
            self.map_taps[layer].append(tap)

    def fill_contacts(self) -> None:
        """Called after the pass: turns the sums over all maps into contact maps, freeing each before the next."""
        if self.contact_sums:
            self.map_taps.clear()  # the taps refer to the sums
        while self.contact_sums:
            assert self.contact_head is not None
            text, sums = self.contact_sums.popitem()
            contacts = self.contact_head.probabilities(sums)
            spec = self.packing.works[text].specs[-1]
            if spec.dtype is not DType.FLOAT32:
                contacts = self.new_buffer(spec.shape, TORCH_DTYPES[spec.dtype]).copy_(contacts)
            self.parts[text][-1] = Part(contacts, 0, len(contacts))

    @property
    def hidden_size(self) -> int:
        """The width of the kept hidden states."""
        return int(next(iter(self.kept.values())).shape[-1])

    def fill_repeated(self) -> None:
        """Called after the pass: expands the tensors in `repeated`,
        freeing each before the next is expanded."""
        if self.repeated:
            self.row_taps.clear()  # the taps refer to the tensors that are freed here
            self.map_taps.clear()
        while self.repeated:
            (text, number), computed = self.repeated.popitem()
            work = self.packing.works[text]
            spec = work.specs[number]
            whole = self.new_buffer(spec.shape, TORCH_DTYPES[spec.dtype])
            put_in_places(computed, work.plan.repeated(spec.field), whole)
            self.parts[text][number] = Part(whole, 0, len(whole))

    def float_rows(self, layer: int) -> torch.Tensor:
        """A kept hidden state, (total, H) float32. It is converted once, at the first call."""
        rows = self.kept[layer]
        if rows.dtype is not torch.float32:
            rows = self.kept[layer] = rows.float()
        return rows

    def write_hidden_state(self, index: int, hidden: torch.Tensor) -> None:
        """Captures hidden state `index`, which is (1, total, H), or padded (texts, T, H)."""
        if index not in self.row_taps and index not in self.keep:
            return
        packed = hidden[0] if self.token_rows is None else hidden.flatten(0, 1)[self.token_rows]
        for rows, target in self.row_taps.get(index, ()):
            target.copy_(packed[rows])
        if index in self.keep:
            self.kept[index] = packed

    def write_padded_maps(self, weights: torch.Tensor) -> None:
        """Captures the maps of the attention layer that has just run, (texts, heads, T, T)."""
        for tap in chain.from_iterable(self.begin_attention()):
            length = tap.end - tap.start
            positions = range(length) if tap.query_positions is None else tap.query_positions
            heads = to_device(np.array(tap.heads), self.device)[:, None]
            rows = to_device(np.array(positions), self.device)
            tap.write(weights[tap.text][heads, rows, :length])
        self.end_attention()

    # ------------------------------------------------ called during the pass, in the order of the layers

    def next_hidden_state(self, hidden: torch.Tensor) -> None:
        """Captures the input of the next layer: the calls of a pass see hidden states 0 to L-1 in this order.

        Raises `DepthReachedError` once nothing is wanted from the layers
        above. The model's last_hidden_state, after its final norm if it
        has one, does not come through here: its index is `last_index`.
        """
        index = self.next_hidden
        self.next_hidden += 1
        self.write_hidden_state(index, hidden)
        if index >= self.deepest_hidden and index > self.deepest_attention:
            raise DepthReachedError

    def begin_attention(self) -> Iterator[list[MapTap]]:
        """Moves on to the next attention layer; returns the maps
        wanted of it, one list for each kernel call."""
        layer = self.next_attention
        self.next_attention += 1
        return map_calls(self.map_taps.get(layer, ()))

    def begin_layers(self) -> list[list[MapTap]]:
        """Replaces `begin_attention` in an encoder that runs several layers in one call. Returns one list of
        maps for each layer to run.

        The call must end before the next layer whose input is wanted, after a layer whose maps are not
        written directly into their targets, and after the last layer of which maps are wanted.
        """
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
        """Whether nothing is wanted beyond the maps of the current attention layer."""
        return self.next_attention > self.deepest_attention and self.deepest_hidden < self.next_attention

    def end_attention(self) -> None:
        if self.attention_is_last:
            raise DepthReachedError

"""What to capture in one pass: at which layer, for which texts, and where to stop.

Hooks on the layers hand each hidden state to the `Taps` of the batch under way, the attention
function its maps; rows are written at once to where the reply wants them, so that no layer's full
output outlives its use. Layers are counted as they are called, since not every family numbers its
modules, and ALBERT calls one module for all its layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layertap_server.engine.packing import Packing
from layertap_server.plan import DType, OutputField, OutputPlan

TORCH_DTYPES: dict[DType, torch.dtype] = {
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
    DType.INT8: torch.int8,
    DType.UINT8: torch.uint8,
}


class DepthReachedError(Exception):
    """Nothing above this layer is wanted by anyone in the batch."""


@dataclass(frozen=True, slots=True)
class MapTap:
    """One attention map of one text, and where in its reply it goes."""

    # Index of the text in its packing, and the rows [start, end) that it covers there.
    text: int
    start: int
    end: int
    heads: list[int]
    # None: every row.
    query_positions: list[int] | None
    mean_over_heads: bool
    target: torch.Tensor

    def write(self, weights: torch.Tensor) -> None:
        """`weights` is (heads asked, query positions asked, T)."""
        self.target.copy_(weights.mean(0, keepdim=True) if self.mean_over_heads else weights)


@dataclass(slots=True)
class Taps:
    """The captures of one batch. Buffers are per text, in the order of its `Work.specs`; an
    embedding's is filled later, by pooling."""

    packing: Packing
    num_layers: int
    device: torch.device
    buffers: list[list[torch.Tensor | None]] = field(default_factory=list)
    # Hidden states (total, H) that pooling needs whole.
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    keep: set[int] = field(default_factory=set)
    # Hidden-state index → (rows of the packed tensor, target).
    row_taps: dict[int, list[tuple[slice, torch.Tensor]]] = field(default_factory=lambda: defaultdict(list))
    map_taps: dict[int, list[MapTap]] = field(default_factory=lambda: defaultdict(list))
    deepest_hidden: int = -1
    deepest_attention: int = -1
    next_hidden: int = 0
    next_attention: int = 0

    def __post_init__(self) -> None:
        for text, (work, start, end) in enumerate(self.packing.rows()):
            self.buffers.append(
                [
                    None
                    if spec.field in (OutputField.EMBEDDINGS, OutputField.POOLER_OUTPUT)
                    else torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device=self.device)
                    for spec in work.specs
                ]
            )
            by_field = dict(zip((spec.field for spec in work.specs), self.buffers[-1], strict=True))
            self._tap_hidden_states(work.plan, slice(start, end), by_field)
            self._tap_attentions(work.plan, text, start, end, by_field)
        self.deepest_hidden = max([*self.row_taps, *self.keep], default=-1)
        self.deepest_attention = max(self.map_taps, default=-1)

    def _tap_hidden_states(self, plan: OutputPlan, rows: slice, by_field: dict[OutputField, Any]) -> None:
        if plan.last_hidden_state:
            self.row_taps[self.num_layers].append((rows, by_field[OutputField.LAST_HIDDEN_STATE]))
        for slot, index in enumerate(plan.hidden_states or ()):
            self.row_taps[index].append((rows, by_field[OutputField.HIDDEN_STATES][slot]))
        if plan.pooler_output:
            self.keep.add(self.num_layers)
        for embedding in plan.embeddings:
            self.keep.update(embedding.layers)

    def _tap_attentions(
        self, plan: OutputPlan, text: int, start: int, end: int, by_field: dict[OutputField, Any]
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
                    list(asked.heads),
                    None if asked.query_positions is None else list(asked.query_positions),
                    asked.mean_over_heads,
                    by_field[OutputField.ATTENTIONS][slot],
                )
            )

    @property
    def hidden_indices(self) -> list[int]:
        """The hidden states that somebody wants, ascending."""
        return sorted({*self.row_taps, *self.keep})

    def write_hidden_state(self, index: int, hidden: torch.Tensor) -> None:
        """Takes hidden state `index`, (total, H)."""
        for rows, target in self.row_taps.get(index, ()):
            target.copy_(hidden[rows])
        if index in self.keep:
            self.kept[index] = hidden

    # ------------------------------------------------------------ called by the pass, in its order

    def next_hidden_state(self, hidden: torch.Tensor) -> None:
        """Takes the embedding output, then each layer's, (1, total, H); ends the pass where it may."""
        index = self.next_hidden
        self.next_hidden += 1
        if index == self.num_layers:
            return  # hidden state L is the model's last_hidden_state, after its final norm if it has one
        self.write_hidden_state(index, hidden[0])
        if index >= self.deepest_hidden and index > self.deepest_attention:
            raise DepthReachedError

    def begin_attention(self) -> Sequence[MapTap]:
        """The maps wanted of the attention layer that runs now."""
        layer = self.next_attention
        self.next_attention += 1
        return self.map_taps.get(layer, ())

    def end_attention(self) -> None:
        if self.next_attention > self.deepest_attention and self.deepest_hidden < self.next_attention:
            raise DepthReachedError


class LayerHooks:
    """Hooks on a model's layers that feed the `Taps` of the batch under way."""

    def __init__(self) -> None:
        self.taps: Taps | None = None

    def attach(self, layers: Iterable[nn.Module]) -> None:
        for layer in layers:
            layer.register_forward_pre_hook(self._before, with_kwargs=True)
            layer.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.taps is not None and self.taps.next_hidden == 0:
            self.taps.next_hidden_state(args[0] if args else kwargs["hidden_states"])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.taps is not None:
            self.taps.next_hidden_state(output[0] if isinstance(output, tuple) else output)

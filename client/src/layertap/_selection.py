"""Which layers, heads and positions a result holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layertap._types import Attentions, HiddenStates, Logits

if TYPE_CHECKING:
    from layertap._results import MaybeNone, Result


@dataclass(frozen=True, slots=True)
class Selection:
    """The layers, heads and positions that the axes of a result's arrays stand for, in the order of the arrays.

    Indices are as the caller named them: negative ones count from the end. Where none was named, all are
    listed. `hidden_states`, `attentions` and `logits` are None if the result does not have this output.

    - `last_hidden_state_positions`: the rows of `last_hidden_state`
    - `hidden_states.layers` and `.positions`: the first two axes of `hidden_states`
    - `attentions.layers`, `.heads`, `.query_positions` and `.key_positions`: the four axes of `attentions`.
      With `mean_over_heads`, `heads` are those that were named, or none for all. With `pairs`, the first axis
      stands for these, and `layers` and `heads` are empty.
    - `logits.positions`: the rows of `logits`, if the head scores tokens
    """

    last_hidden_state_positions: tuple[int, ...] = ()
    hidden_states: HiddenStates | MaybeNone = None
    attentions: Attentions | MaybeNone = None
    logits: Logits | MaybeNone = None


def selection_of(result: Result, asked: Any) -> Selection:
    """What the result holds; `asked` are the outputs that the request selected."""
    last, states, maps, logits = (
        getattr(result, name) for name in ("last_hidden_state", "hidden_states", "attentions", "logits")
    )
    rows: tuple[int, ...] = ()
    if last is not None:
        rows = _chosen(asked.last_hidden_state_positions, last.shape[0])
    of_states = of_maps = of_logits = None
    if states is not None:
        wanted = asked.hidden_states
        of_states = HiddenStates(
            _chosen(wanted.layers, states.shape[0]), _chosen(wanted.positions, states.shape[1])
        )
    if maps is not None:
        wanted = asked.attentions
        pairs = tuple((pair.layer, pair.head) for pair in wanted.pairs)
        of_maps = Attentions(
            layers=() if pairs else _chosen(wanted.layers, maps.shape[0]),
            heads=() if pairs else _chosen(wanted.heads, 0 if wanted.mean_over_heads else maps.shape[1]),
            mean_over_heads=wanted.mean_over_heads,
            query_positions=_chosen(wanted.query_positions, maps.shape[2]),
            key_positions=_chosen(wanted.key_positions, maps.shape[3]),
            pairs=pairs,
        )
    if logits is not None:
        positions = _chosen(asked.logits.positions, logits.shape[0] if logits.ndim > 1 else 0)
        of_logits = Logits(positions, asked.logits.top_k)
    return Selection(rows, of_states, of_maps, of_logits)


def _chosen(named: Iterable[int], size: int) -> tuple[int, ...]:
    return tuple(named) or tuple(range(size))

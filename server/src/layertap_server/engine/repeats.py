"""Outputs that ask for the same layer, head or row several times: each slice is computed once, and copied to
its places of the result after the pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from layertap_server.engine.transfer import to_device
from layertap_server.enums import OutputField
from layertap_server.output_plans import Places
from layertap_server.plan import TensorSpec, Work

# Rows that `put_in_places` copies in one step: the int64 indices of that many rows take half a MiB.
PLACED_ROWS = 2**16


def computed_shape(work: Work, spec: TensorSpec) -> tuple[int, ...]:
    """The shape in which the spec's tensor is computed: slices that the result repeats are computed once."""
    plan = work.plan
    if not plan.repeated(spec.field):
        return spec.shape
    if spec.field is OutputField.HIDDEN_STATES:
        return len(plan.hidden_states or ()), *spec.shape[1:]
    assert plan.attentions is not None
    return plan.attentions.computed_shape(work.num_tokens)


def repeated_bytes(work: Work) -> int:
    """Bytes of the tensors whose slices are computed once and then copied to several places of the result."""
    return sum(
        math.prod(computed_shape(work, spec)) * spec.dtype.itemsize
        for spec in work.specs
        if work.plan.repeated(spec.field)
    )


def put_in_places(computed: torch.Tensor, places: Sequence[Places | None], whole: torch.Tensor) -> None:
    """Fills `whole` so that whole[i, j, …] = computed[places[0][i], places[1][j], …].

    `places` has one entry for each leading dimension; None leaves that dimension's index unchanged.
    """
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

"""The padded pass: sub-batches of similar length, for the families that cannot run packed.

The model's own eager attention runs, so every encoder that transformers loads works here; results
are the same as the packed pass gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import Taps
from layertap_server.plan import Work

# A text joins a sub-batch when it is at least this share of the longest there.
MIN_LENGTH_RATIO = 0.8


def sub_batches(works: Sequence[Work]) -> Iterator[list[int]]:
    """Indices of works in groups of similar length, the longest texts first."""
    group: list[int] = []
    for index in sorted(range(len(works)), key=lambda i: -works[i].num_tokens):
        if group and works[index].num_tokens < MIN_LENGTH_RATIO * works[group[0]].num_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def run_padded(model: Any, packing: Packing, taps: Taps, pad_token_id: int, takes_types: bool) -> None:
    """One pass over a sub-batch, padded on the right to its longest text; feeds `taps`."""
    longest = max(work.num_tokens for work in packing.works)
    shape = (len(packing.works), longest)
    input_ids = np.full(shape, pad_token_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    token_type_ids = np.zeros(shape, np.int64)
    for row, work in enumerate(packing.works):
        input_ids[row, : work.num_tokens] = work.input_ids
        attention_mask[row, : work.num_tokens] = 1
        if work.token_type_ids is not None:
            token_type_ids[row, : work.num_tokens] = work.token_type_ids
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if takes_types:
        inputs["token_type_ids"] = token_type_ids
    on_device = {name: torch.from_numpy(array).to(taps.device) for name, array in inputs.items()}

    hidden_indices = taps.hidden_indices
    output = model(
        **on_device,
        output_hidden_states=any(index < taps.num_layers for index in hidden_indices),
        output_attentions=bool(taps.map_taps),
    )
    is_token = on_device["attention_mask"].bool()
    for index in hidden_indices:
        hidden = output.last_hidden_state if index == taps.num_layers else output.hidden_states[index]
        taps.write_hidden_state(index, hidden[is_token])
    for layer, map_taps in taps.map_taps.items():
        for tap in map_taps:
            num_tokens = tap.end - tap.start
            weights = output.attentions[layer][tap.text, tap.heads, :num_tokens, :num_tokens]
            tap.write(weights if tap.query_positions is None else weights[:, tap.query_positions])

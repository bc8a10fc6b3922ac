"""The padded pass: sub-batches of similar length, for the families that cannot run packed.

The model's own eager attention runs, so every encoder that transformers loads works here; results
are the same as the packed pass gives. Hidden states and maps are taken by hooks as they pass by, and
the pass ends at the deepest layer that anyone needs, as on the packed path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from layertap_server.engine.loading.reference import names_token_types
from layertap_server.engine.model import LoadedModel, on
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import DepthReachedError, Taps
from layertap_server.engine.transfer import to_device
from layertap_server.plan import Work

# A text joins a sub-batch when it is at least this share of the longest there. Less pads more, more calls
# more often: on natural text and small models, 0.65 is a tenth faster than 0.8, which is 1.5 times as fast as 1.0.
MIN_LENGTH_RATIO = 0.7


def sub_batches(works: Sequence[Work], *, alone: bool = False) -> Iterator[list[int]]:
    """Indices of works in groups of similar length, the longest texts first; those with token types apart from those
    without. `alone`: each by itself."""

    def has_types(index: int) -> bool:
        return works[index].token_type_ids is not None

    group: list[int] = []
    for index in sorted(range(len(works)), key=lambda i: (has_types(i), -works[i].num_tokens)):
        if group and (
            alone
            or works[index].num_tokens < MIN_LENGTH_RATIO * works[group[0]].num_tokens
            or has_types(index) != has_types(group[0])
        ):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def padded_inputs(loaded: LoadedModel, packing: Packing) -> dict[str, torch.Tensor]:
    """The arguments of the model's forward, each (texts, T), padded on the right to the longest text."""
    shape = (len(packing.works), max(work.num_tokens for work in packing.works))
    input_ids = np.full(shape, loaded.pad_token_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask}
    # Where types are compared with each other and have no table, none at all are not the same as all alike.
    has_types = names_token_types(loaded.model) or packing.works[0].token_type_ids is not None
    if has_types and loaded.facts.type_vocab_size > 0:
        arrays["token_type_ids"] = np.zeros(shape, np.int64)
    for row, work in enumerate(packing.works):
        input_ids[row, : work.num_tokens] = work.input_ids
        attention_mask[row, : work.num_tokens] = 1
        if work.token_type_ids is not None and "token_type_ids" in arrays:
            arrays["token_type_ids"][row, : work.num_tokens] = work.token_type_ids
    return {name: to_device(array, loaded.device) for name, array in arrays.items()}


def run_padded(loaded: LoadedModel, packing: Packing, taps: Taps) -> None:
    """One pass over a sub-batch, as deep as anyone in it needs; feeds `taps`."""
    longest = max(work.num_tokens for work in packing.works)
    rows = [row * longest + np.arange(work.num_tokens) for row, work in enumerate(packing.works)]
    taps.token_rows = to_device(np.concatenate(rows), loaded.device)
    inputs = padded_inputs(loaded, packing)
    if loaded.begin_anew is not None:
        loaded.begin_anew()
    if loaded.watched is None:
        run_whole(loaded, inputs, taps)
        return
    told = bool(taps.map_taps) and loaded.watched.gives_maps_if_told
    with on(loaded.device), loaded.hooks.feeding(taps), suppress(DepthReachedError):
        write_ends(loaded.model(**inputs, output_attentions=told), taps)


def write_ends(output: Any, taps: Taps) -> None:
    """What comes out behind the layers."""
    taps.write_hidden_state(taps.last_index, output.last_hidden_state)
    taps.pooler_outputs = getattr(output, "pooler_output", None)


def run_whole(loaded: LoadedModel, inputs: dict[str, torch.Tensor], taps: Taps) -> None:
    """The pass of a model whose layers were not found: all of them run, and all outputs are kept till the end."""
    output = loaded.model(
        **inputs, output_hidden_states=taps.deepest_hidden >= 0, output_attentions=bool(taps.map_taps)
    )
    for index, hidden in enumerate((output.hidden_states or ())[: taps.last_index]):
        # Some give rows of padding of their own behind the texts'.
        taps.write_hidden_state(index, hidden[:, : inputs["input_ids"].shape[1]])
    write_ends(output, taps)
    with suppress(DepthReachedError):
        for weights in output.attentions or ():
            taps.write_padded_maps(weights)

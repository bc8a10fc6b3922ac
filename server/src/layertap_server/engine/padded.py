"""The padded pass: sub-batches of similar length, for the families that cannot run packed.

The model runs with its own eager attention, so every encoder that transformers loads works here. The outputs
have the same form as those of the packed pass. Hooks capture hidden states and maps during the pass, and the
pass ends at the deepest layer that a text in the batch needs, as in the packed pass.
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

# A text joins a sub-batch if its length is at least this share of the longest one there. A smaller share
# means more padding, a larger one more passes: on natural text and small models, 0.65 is a tenth faster than
# 0.8, which is 1.5 times as fast as 1.0.
MIN_LENGTH_RATIO = 0.7


def sub_batches(works: Sequence[Work], *, alone: bool = False) -> Iterator[list[int]]:
    """Groups the indices of works by similar length, the longest texts first. Texts with token types and
    texts without them are never in the same group. With `alone`, each text is a group of its own."""

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
    # For a model that compares types with each other and has no table of them (XLNet), omitting the types is
    # not the same as giving all tokens one type. So they are passed only if a text has them.
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
    """One pass over a sub-batch, up to the deepest layer that a text
    in it needs; writes the captures to `taps`."""
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
    """Captures the outputs of the model's forward: last_hidden_state and pooler_output."""
    taps.write_hidden_state(taps.last_index, output.last_hidden_state)
    taps.pooler_outputs = getattr(output, "pooler_output", None)


def run_whole(loaded: LoadedModel, inputs: dict[str, torch.Tensor], taps: Taps) -> None:
    """The pass of a model whose layers were not found: all layers
    run, and the library keeps all outputs until the end."""
    output = loaded.model(
        **inputs, output_hidden_states=taps.deepest_hidden >= 0, output_attentions=bool(taps.map_taps)
    )
    for index, hidden in enumerate((output.hidden_states or ())[: taps.last_index]):
        # Some models pad their input further, and return the rows of that padding as well.
        taps.write_hidden_state(index, hidden[:, : inputs["input_ids"].shape[1]])
    write_ends(output, taps)
    with suppress(DepthReachedError):
        for weights in output.attentions or ():
            taps.write_padded_maps(weights)

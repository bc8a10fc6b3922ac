"""The packed pass: the library's own model code over texts laid end to end."""

from __future__ import annotations

from layertap_server.engine.cuda_attention import Sequences
from layertap_server.engine.model import LoadedModel
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import Taps


def run_packed(loaded: LoadedModel, packing: Packing, taps: Taps) -> None:
    """One pass over a batch, as deep as anyone in it needs; feeds `taps`."""
    loaded.run_layers(taps, {**loaded.packed_inputs(packing), "taps": taps})


def run_varlen(loaded: LoadedModel, packing: Packing, taps: Taps) -> None:
    """The same with CUDA's attention for texts of any lengths, in 16 bits."""
    taps.sequences = Sequences.of(packing, taps.device)
    run_packed(loaded, packing, taps)

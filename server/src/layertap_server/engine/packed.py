"""The packed pass: the library's own model code over texts that are concatenated without padding."""

from __future__ import annotations

from layertap_server.engine.model import LoadedModel
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import Taps


def run_packed(loaded: LoadedModel, packing: Packing, taps: Taps) -> None:
    """One pass over a batch, up to the deepest layer that a text in
    it needs; writes the captures to `taps`."""
    rows = loaded.rows_of(packing).to(loaded.device, non_blocking=True)
    loaded.run_layers(taps, {**loaded.inputs_of(rows), "taps": taps})

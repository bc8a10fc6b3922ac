"""The packed pass: the library's own model code over texts laid end to end."""

from __future__ import annotations

from layertap_server.engine.model import LoadedModel
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import DepthReachedError, Taps


def run_packed(loaded: LoadedModel, packing: Packing, taps: Taps) -> None:
    """One pass over a batch, as deep as anyone in it needs; feeds `taps`."""
    inputs = loaded.packed_inputs(packing)
    loaded.hooks.taps = taps
    try:
        output = loaded.model(**inputs, taps=taps)
        taps.write_hidden_state(taps.num_layers, output.last_hidden_state[0])
    except DepthReachedError:
        pass
    finally:
        loaded.hooks.taps = None

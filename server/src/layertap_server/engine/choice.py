"""Which engine a loaded model runs on."""

from __future__ import annotations

from layertap_server.engine.engine import Engine
from layertap_server.engine.model import LoadedModel


def engine_for(loaded: LoadedModel) -> Engine:
    """The engine of the model's device."""
    if loaded.device.type == "cpu":
        return Engine(loaded)
    from layertap_server.engine.cuda.engine import CudaEngine  # imported only here, since it imports Triton

    return CudaEngine(loaded)

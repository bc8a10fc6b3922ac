"""Which engine a loaded model runs on."""

from __future__ import annotations

from layertap_server.engine.cuda import CudaEngine
from layertap_server.engine.engine import Engine
from layertap_server.engine.model import LoadedModel


def engine_for(loaded: LoadedModel) -> Engine:
    """The engine of the model's device."""
    return CudaEngine(loaded) if loaded.device.type == "cuda" else Engine(loaded)

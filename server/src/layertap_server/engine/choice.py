"""Which engine a loaded model runs on."""

from __future__ import annotations

import torch

from layertap_server.engine.cuda import CudaEngine
from layertap_server.engine.engine import Engine
from layertap_server.engine.lanes import LaneEngine
from layertap_server.engine.model import LoadedModel


def engine_for(loaded: LoadedModel) -> Engine:
    """The engine of the model's device; on a CPU with as many lanes as torch has threads."""
    if loaded.device.type == "cuda":
        return CudaEngine(loaded)
    num_threads = torch.get_num_threads()
    if loaded.facts.packed and not loaded.runs_alone and num_threads > 1:
        return LaneEngine(loaded, num_threads)
    return Engine(loaded)

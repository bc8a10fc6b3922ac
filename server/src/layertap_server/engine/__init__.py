"""The engine: one forward pass for one batch. The only package of the server that imports torch."""

import os

# In GNU's OpenMP, a thread that waits for the other threads spins, by default for so long that it takes the
# core from the event loop. This number of spins is longer than the others take when nothing delays them. The
# variable is read once, when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
# Allows fused multiply-add. Triton 3.9 warns if this is not set.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from layertap_server.engine.choice import engine_for
from layertap_server.engine.engine import Engine
from layertap_server.engine.loading.checkpoint import ModelLoadError
from layertap_server.engine.loading.load import load_model, read_configurations
from layertap_server.engine.model import LoadedModel

__all__ = ["Engine", "LoadedModel", "ModelLoadError", "engine_for", "load_model", "read_configurations"]

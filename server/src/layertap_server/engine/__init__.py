"""The engine: one forward pass for one batch. The only room that imports torch."""

import os

# GNU's OpenMP lets a thread that waits for the others spin, by default so long that it takes the core
# from the event loop; this is longer than what the others take when nothing disturbs them. Read once,
# when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
# Triton 3.9 warns where nobody has said whether multiplications and additions may be done in one step; they may.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from layertap_server.engine.choice import engine_for
from layertap_server.engine.engine import Engine
from layertap_server.engine.loading.checkpoint import ModelLoadError
from layertap_server.engine.loading.load import load_model, read_configurations
from layertap_server.engine.model import LoadedModel

__all__ = ["Engine", "LoadedModel", "ModelLoadError", "engine_for", "load_model", "read_configurations"]

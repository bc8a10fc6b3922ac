"""The engine: one forward pass for one batch. The only room that imports torch."""

from layertap_server.engine.checkpoint import ModelLoadError
from layertap_server.engine.cuda import engine_for
from layertap_server.engine.engine import Engine
from layertap_server.engine.loading import load_model
from layertap_server.engine.model import LoadedModel

__all__ = ["Engine", "LoadedModel", "ModelLoadError", "engine_for", "load_model"]

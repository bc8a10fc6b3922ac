"""The engine: one forward pass for one batch. The only room that imports torch."""

from layertap_server.engine.engine import Engine
from layertap_server.engine.loading import ModelLoadError, load_model
from layertap_server.engine.model import LoadedModel

__all__ = ["Engine", "LoadedModel", "ModelLoadError", "load_model"]

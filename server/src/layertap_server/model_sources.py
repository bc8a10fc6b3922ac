"""Where a server gets its models from: engines in this process, or in others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from layertap_server.config import Config
from layertap_server.model_loading import check_configurations, load
from layertap_server.serving import ServedModel

T = TypeVar("T")


class ModelSource(Protocol):
    """Where a server gets its models from."""

    async def load(self, models: dict[str, ServedModel], on_change: Callable[[], None]) -> None:
        """Adds the models to `models` and starts them; returns when all are ready. `on_change` is called on
        the event loop when the state of one changes."""


class LocalModels:
    """Models whose engines run in this process."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def load(self, models: dict[str, ServedModel], on_change: Callable[[], None]) -> None:
        named = self._config.models()
        if len(named) > 1:
            await in_thread(check_configurations, list(named.values()), self._config)
        for name, source in named.items():
            model = await in_thread(load, name, source, self._config)
            models[name] = model
            model.start(on_change)


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Calls the function in a thread that ends afterwards. OpenMP keeps a pool of threads for each thread
    that has computed; with more of these than cores, they would sleep between steps instead of waiting
    actively."""
    with ThreadPoolExecutor(1, thread_name_prefix="load") as loader:
        return await asyncio.get_running_loop().run_in_executor(loader, function, *arguments)

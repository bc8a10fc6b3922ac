"""The real server in this process, on a free port of 127.0.0.1, for as long as a test wants it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layertap_server.app import Server
from layertap_server.config import Config

START_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready; `call` runs a coroutine function on its event loop."""

    address: str
    server: Server
    loop: asyncio.AbstractEventLoop

    def call(self, function: Any, *args: Any) -> Any:
        async def on_loop() -> Any:
            result = function(*args)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(on_loop(), self.loop).result(START_TIMEOUT_S)


@contextmanager
def serve(models: Mapping[str, str | Path], **settings: Any) -> Iterator[Running]:
    """Serves `models` (public name → folder) until the block ends; yields when it is ready."""
    settings.setdefault("grace_s", 5.0)
    # A fixed size instead of a measured one, so that tests know what fits into a batch.
    settings.setdefault("max_batch_tokens", 2048)
    # CI runs some tests on each of the two gRPC servers.
    settings.setdefault("grpc_server", os.environ.get("LAYERTAP_GRPC_SERVER", "auto"))
    config = Config(model=tuple(f"{name}={source}" for name, source in models.items()), port=0, **settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()

    async def start() -> Server:
        server = Server(config)
        await server.startup()
        return server

    try:
        server = asyncio.run_coroutine_threadsafe(start(), loop).result(START_TIMEOUT_S)
        try:
            yield Running(server.address, server, loop)
        finally:
            asyncio.run_coroutine_threadsafe(server.shutdown(), loop).result(START_TIMEOUT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

"""The real server in this process, on a free port of 127.0.0.1, for as long as a test wants it."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from layertap_server import engine_host
from layertap_server.app import Server
from layertap_server.config import Config
from layertap_server.link.arena import MAX_BYTES, WritableArena, create_arena
from layertap_server.link.engine_side import FrontLink
from layertap_server.local_model import LocalModel
from layertap_server.model_sources import LocalModels
from layertap_server.processes.engine import engine_server
from layertap_server.processes.front import LinkedModels
from layertap_server.processes.life import create_life
from layertap_server.scheduling import calibration
from layertap_server.scheduling.calibration import Calibrated
from layertap_server.serving import ServedModel

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 60
# CI also runs the tests of the service with a link between the API and the engine, as between processes.
IS_LINKED = os.environ.get("LAYERTAP_TEST_LINK") == "1"


class LinkedToSelf:
    """A `ModelSource`: models behind a link, whose other end is in this process as well."""

    def __init__(self, config: Config, models: dict[str, LocalModel]) -> None:
        self._config, self._models = config, models

    async def load(self, models: dict[str, ServedModel], on_change: Callable[[], None]) -> None:
        from layertap_server.engine.result_memory import RESULT_MEMORY

        descriptor, arena = the_arena()
        RESULT_MEMORY.use(arena, len(arena))
        local: dict[str, ServedModel] = {}

        def changed() -> None:
            server.tell_states()

        await LocalModels(self._config).load(local, changed)
        self._models.update(local)  # type: ignore[arg-type]
        server = engine_server(self._models, self._config, arena)
        loop = asyncio.get_running_loop()
        front = LinkedModels(self._config, lambda: None)
        ours, theirs = socket.socketpair()
        front.connect(ours.detach(), os.dup(descriptor), create_life())
        await loop.create_unix_connection(lambda: FrontLink(server), sock=theirs)
        await front.load(models, on_change)


@lru_cache(maxsize=1)
def the_arena() -> tuple[int, WritableArena]:
    """One for all servers of this process: the memory of results is one, too."""
    descriptor = create_arena(MAX_BYTES)
    return descriptor, WritableArena(descriptor)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready; `call` runs a coroutine function on its event loop."""

    address: str
    server: Server
    loop: asyncio.AbstractEventLoop
    # The models with their engines. They are those of the server's service, or stand behind a link.
    models: Mapping[str, LocalModel]

    def call(self, function: Any, *args: Any) -> Any:
        async def on_loop() -> Any:
            result = function(*args)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(on_loop(), self.loop).result(START_TIMEOUT_S)


def uncalibrated(engine: Any, facts: Any, cost: Any, largest: int) -> Calibrated:
    return Calibrated(largest, getattr(engine, "num_cores", 1))


@contextmanager
def serve(
    models: Mapping[str, str | Path], *, is_calibrated: bool = True, **settings: Any
) -> Iterator[Running]:
    """Serves `models` (public name → folder) until the block ends; yields when it is ready.

    Without calibration, each core takes batches of its own wherever it can, and the time of a batch is known
    only once some have run.
    """
    settings.setdefault("grace_s", 5.0)
    # A fixed size instead of a measured one, so that tests know what fits into a batch.
    settings.setdefault("max_batch_tokens", 2048)
    # CI runs some tests on each of the two gRPC servers.
    settings.setdefault("grpc_server", os.environ.get("LAYERTAP_GRPC_SERVER", "auto"))
    config = Config(model=tuple(f"{name}={source}" for name, source in models.items()), port=0, **settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()

    local: dict[str, LocalModel] = {}

    async def start() -> Server:
        if IS_LINKED:
            server = Server(config, source=LinkedToSelf(config, local))
            await server.startup()
        else:
            server = Server(config)
            await server.startup()
            local.update(server.service.models)  # type: ignore[arg-type]
        return server

    async def stop(server: Server) -> None:
        await server.shutdown()
        if IS_LINKED:  # the server has ended its end of the link only
            for model in local.values():
                await model.stop(config.grace_s)

    try:
        with pytest.MonkeyPatch.context() as patched:
            # Each size of batches is measured twice, instead of for two seconds in all.
            patched.setattr(calibration, "CALIBRATION_S", 0.0)
            if not is_calibrated:
                patched.setattr(engine_host, "calibrate", uncalibrated)
            server = asyncio.run_coroutine_threadsafe(start(), loop).result(START_TIMEOUT_S)
        try:
            yield Running(server.address, server, loop, local)
        finally:
            asyncio.run_coroutine_threadsafe(stop(server), loop).result(STOP_TIMEOUT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(STOP_TIMEOUT_S)
        if thread.is_alive():  # what hangs on the loop would else hang the test, which no timeout ends
            faulthandler.dump_traceback()
            raise AssertionError("the server's event loop did not end")
        loop.close()

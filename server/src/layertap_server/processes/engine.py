"""The engine process: loads the models, and computes what the fronts ask for."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from layertap_server.api.budget import ByteBudget
from layertap_server.app import look_less_for_garbage, share_the_interpreter
from layertap_server.config import Config
from layertap_server.engine_samples import engine_samples
from layertap_server.link.arena import WritableArena
from layertap_server.link.engine_side import EngineServer, FrontLink
from layertap_server.link.plans import VERSION, facts_to_json
from layertap_server.link.records import max_plans
from layertap_server.local_model import LocalModel
from layertap_server.metrics import Sample, gauge
from layertap_server.model_loading import check_configurations, load
from layertap_server.model_sources import in_thread
from layertap_server.processes.child import CANNOT_START, run_child
from layertap_server.processes.control import Control, Message
from layertap_server.processes.life import Life
from layertap_server.serving import EngineState
from layertap_server.start_checks import StartError

logger = logging.getLogger(__name__)

# The status with which the process ends when it can no longer compute.
LOST = 4


class EngineProcess:
    """A `Child`. Its links may be given to it before the models are loaded."""

    def __init__(self, config: Config, start: Message, control: Control) -> None:
        """The descriptors of `start` are those of the arena and of this process's life. Called on the main
        thread."""
        self._config = config
        self._control = control
        self._arena, life = start["descriptors"]
        self._life = Life(life)
        os.close(life)
        if not self._life.hold():
            logger.info(
                "without robust mutexes in the C library, fronts notice the end of this process later"
            )
        self._models: dict[str, LocalModel] = {}
        self._early_links: list[socket.socket] = []
        self._server: EngineServer | None = None
        self._connecting: set[asyncio.Task[Any]] = set()
        self._stopping = asyncio.Event()

    def on_link(self, message: Message, descriptors: list[int]) -> None:
        end = socket.socket(fileno=descriptors[0])
        if self._server is None:
            self._early_links.append(end)
        else:
            self._connect(self._server, end)

    def _connect(self, server: EngineServer, end: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connecting = loop.create_task(loop.create_unix_connection(lambda: FrontLink(server), sock=end))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    def stop(self) -> None:
        self._stopping.set()

    def samples(self) -> Iterator[Sample]:
        for name, model in self._models.items():
            yield from engine_samples(name, model.host)
        if self._server is not None:
            held = self._server.budget.reserved_bytes
            yield gauge(
                "engine_held_result_bytes", "Bytes of results that are computed or lent to fronts", held
            )

    async def run(self) -> int:
        begun = time.monotonic()
        loading = asyncio.create_task(self._load())
        told_to_stop = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({loading, told_to_stop}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            os._exit(0)  # the thread that loads cannot be interrupted
        try:
            self._server = await loading
        except StartError as error:
            logger.error("%s", error)
            return CANNOT_START
        for end in self._early_links:
            self._connect(self._server, end)
        logger.info("engine process %d is ready in %.1f s", os.getpid(), time.monotonic() - begun)
        self._control.send({"type": "ready"})
        await told_to_stop
        return await self._end(self._server)

    async def _load(self) -> EngineServer:
        config = self._config
        arena = WritableArena(self._arena)
        os.close(self._arena)
        await self._load_models(arena)
        look_less_for_garbage()
        share_the_interpreter()
        return engine_server(self._models, config, arena)

    async def _load_models(self, arena: WritableArena) -> None:
        # The memory of results must be the arena's before a model is loaded, which already runs batches.
        await in_thread(use_arena, arena)
        named = self._config.models()
        if len(named) > 1:
            await in_thread(check_configurations, list(named.values()), self._config)
        for name, source in named.items():
            self._add(name, await in_thread(load, name, source, self._config))

    def _add(self, name: str, model: LocalModel) -> None:
        self._models[name] = model
        model.start(self._changed)

    def _changed(self) -> None:
        if self._server is not None:
            self._server.tell_states()
        if any(model.state is EngineState.LOST for model in self._models.values()):
            self._stopping.set()

    async def _end(self, server: EngineServer) -> int:
        """Ends the engines; returns the exit status. The supervisor stops the fronts before."""
        is_lost = any(model.state is EngineState.LOST for model in self._models.values())
        for link in list(server.links):
            link.close()
        if is_lost:
            logger.critical("an engine has failed for good; the process ends")
            return LOST
        ended = [await model.stop(self._config.grace_s) for model in self._models.values()]
        return 0 if all(ended) else 1


def engine_server(models: Mapping[str, LocalModel], config: Config, arena: WritableArena) -> EngineServer:
    """What fronts can connect to."""
    described = []
    for name, model in models.items():
        tokenizer = model.tokenization.tokenizer.to_dict()
        if tokenizer is None:
            logger.info("%s: its tokenizer has parts in Python; each front loads it with transformers", name)
        described.append({"facts": facts_to_json(model.facts), "tokenizer": tokenizer})
    # torch copies the results of other devices into memory of its own.
    may_lend = any(model.facts.device == "cpu" for model in models.values())
    return EngineServer(
        [model.host for model in models.values()],
        {"version": VERSION, "models": described},
        arena if may_lend else None,
        ByteBudget(config.max_inflight_result_bytes),
        config.max_result_bytes,
        max_plans(config.max_inputs_per_request),
    )


def use_arena(arena: WritableArena) -> None:
    """Blocking; imports torch."""
    from layertap_server.engine.result_memory import RESULT_MEMORY

    RESULT_MEMORY.use(arena, len(arena))


if __name__ == "__main__":
    sys.exit(run_child(EngineProcess))

"""A front process: the gRPC server, without torch and without transformers. Its models compute in an engine
process."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from layertap_server.api.samples import service_samples
from layertap_server.app import Server
from layertap_server.config import Config
from layertap_server.link.arena import ReadableArena
from layertap_server.link.front_side import EngineLink, LinkedModel
from layertap_server.link.plans import VERSION, facts_from_json
from layertap_server.link.records import max_plans
from layertap_server.metrics import Sample
from layertap_server.model_facts import ModelFacts
from layertap_server.model_sources import in_thread
from layertap_server.processes.child import CANNOT_START, run_child
from layertap_server.processes.control import Control, Message
from layertap_server.processes.life import Life
from layertap_server.rpc.security import exposure_warning
from layertap_server.serving import EngineState, ServedModel
from layertap_server.start_checks import StartError
from layertap_server.tokenization.tokenizer_loading import (
    LoadedTokenizer,
    load_tokenizer,
    tokenizer_from,
)
from layertap_server.tokenization.worker import Tokenization

logger = logging.getLogger(__name__)


class LinkedModels:
    """A `ModelSource`: the models of an engine process, over the link that the supervisor gives."""

    def __init__(self, config: Config, on_link_lost: Callable[[], object]) -> None:
        """`on_link_lost` is called when a link has ended."""
        self._config = config
        self._on_link_lost = on_link_lost
        self._link: EngineLink | None = None
        self._models: list[LinkedModel] = []
        # The models and tokenizers as the first engine process described them.
        self._described: Any = None
        # The states of the engines by number, as told last over the present link.
        self._states: dict[int, EngineState] = {}
        self._said_hello: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._connecting: set[asyncio.Task[Any]] = set()

    async def load(self, models: dict[str, ServedModel], on_change: Callable[[], None]) -> None:
        hello = await self._said_hello
        for number, described in enumerate(hello["models"]):
            facts = facts_from_json(described["facts"])
            tokenization = await in_thread(tokenization_of, facts, described["tokenizer"], self._config)
            self._models.append(LinkedModel(number, facts, tokenization))
        for model in self._models:
            model.start(on_change)
            models[model.facts.name] = model
        self._attach()

    def connect(self, link: int, arena: int, life: int) -> None:
        """Takes descriptors: this end of a link, and the arena and the life of the engine process."""
        memory, of_engine = ReadableArena(arena), Life(life)
        os.close(arena)
        os.close(life)
        end = socket.socket(fileno=link)
        loop = asyncio.get_running_loop()
        limit = max_plans(self._config.max_inputs_per_request)

        def has_said_hello(link: EngineLink, hello: Any) -> None:
            of_engine.watch(lambda: loop.call_soon_threadsafe(link.abort), lambda: not link.is_lost)
            self._has_said_hello(link, hello)

        def connected() -> EngineLink:
            return EngineLink(memory, limit, has_said_hello, self._has_state, self._is_lost)

        connecting = loop.create_task(loop.create_unix_connection(connected, sock=end))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    def _has_said_hello(self, link: EngineLink, hello: Any) -> None:
        if hello["version"] != VERSION:
            logger.critical("the engine process is of another version: the package has been replaced")
            os._exit(1)  # the supervisor starts this process again, from the new package
        if self._described not in (None, hello["models"]):
            # With the former tokenizer and facts, answers of the new model would be wrong.
            logger.critical("the new engine process serves a model that has changed; starting again with it")
            os._exit(1)
        self._described = hello["models"]
        self._link, self._states = link, {}
        if not self._said_hello.done():
            self._said_hello.set_result(hello)
        self._attach()

    def _has_state(self, number: int, state: EngineState) -> None:
        self._states[number] = state
        self._attach()

    def _is_lost(self, link: EngineLink) -> None:
        if self._link is link:
            self._link = None
            self._attach()
        self._on_link_lost()

    def _attach(self) -> None:
        """Tells the models their link and state."""
        for number, model in enumerate(self._models):
            # An engine that is lost for its process is started again by the supervisor.
            is_up = self._link is not None and self._states.get(number) is EngineState.UP
            model.attach(self._link, EngineState.UP if is_up else EngineState.RESTARTING)


class FrontProcess:
    """A `Child`."""

    def __init__(self, config: Config, start: Message, control: Control) -> None:
        self._control = control
        self._warns = start["name"] == "front 0"  # once for all fronts
        self._models = LinkedModels(config, lambda: control.send({"type": "link lost"}))
        self._server = Server(config, source=self._models, shares_port=True)

    def on_link(self, message: Message, descriptors: list[int]) -> None:
        self._models.connect(*descriptors)

    def stop(self) -> None:
        self._server.request_stop()

    def samples(self) -> Iterator[Sample]:
        if self._server.is_listening:
            yield from service_samples(self._server.service, self._server.lag)

    async def run(self) -> int:
        begun = time.monotonic()
        starting = asyncio.create_task(self._server.startup())
        told_to_stop = asyncio.create_task(self._server.wait())
        await asyncio.wait({starting, told_to_stop}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            return 0  # nothing was accepted
        try:
            await starting
        except StartError as error:
            logger.error("%s", error)
            return CANNOT_START
        if self._warns and (warning := exposure_warning(self._server.config)):
            logger.warning(warning)
        logger.info("front process %d is ready in %.1f s", os.getpid(), time.monotonic() - begun)
        self._control.send({"type": "ready"})
        await told_to_stop
        await self._server.shutdown()
        return 1 if self._server.failed else 0


def tokenization_of(facts: ModelFacts, described: dict[str, Any] | None, config: Config) -> Tokenization:
    """Blocking. Imports transformers only for a tokenizer that has parts in Python."""
    tokenizer: LoadedTokenizer
    if described is None:
        source = config.models()[facts.name]
        logger.info("%s: loading its tokenizer, which has parts in Python, with transformers", facts.name)
        tokenizer = load_tokenizer(source, config.trust_remote_code, facts.tokenizer)
    else:
        tokenizer = tokenizer_from(described)
    return Tokenization(tokenizer, max_tokens=facts.max_tokens, max_queue_chars=config.max_queue_chars)


if __name__ == "__main__":
    sys.exit(run_child(FrontProcess))

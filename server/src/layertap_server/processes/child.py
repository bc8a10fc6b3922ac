"""What front and engine processes have in common: their start, their control channel, and their end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Protocol

import uvloop

from layertap_server.config import Config, ConfigError
from layertap_server.logs import set_up_logging
from layertap_server.metrics import Sample
from layertap_server.processes.control import Control, Message

logger = logging.getLogger(__name__)

# The statuses of a process that cannot start with these settings, or these models.
WRONG_SETTING, CANNOT_START = 2, 3
# The period of a process's samples, which are also its sign of life.
SAMPLES_S = 0.25
# How long a process may go on after the supervisor is gone, in addition to the grace period.
ORPHAN_S = 3.0


def config_to_json(config: Config) -> dict[str, Any]:
    return asdict(config)


def config_from_json(data: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
    }
    return Config(**values)


class Child(Protocol):
    """One process of the server. All methods are called on its event loop."""

    def on_link(self, message: Message, descriptors: list[int]) -> None:
        """The supervisor gives it its end of a link."""

    def stop(self) -> None:
        """It is to finish what it has accepted, and to end. May be called again."""

    def samples(self) -> Iterable[Sample]: ...

    async def run(self) -> int:
        """Runs until it is stopped; returns the exit status."""


MakeChild = Callable[[Config, Message, Control], Child]


def run_child(make: MakeChild) -> int:
    """The main function of a process that the supervisor has started: `argv[1]` is the descriptor of its end
    of the control channel, on which its settings come first."""
    # A terminal, or a service manager, signals the whole group. The supervisor alone decides what follows.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end = socket.socket(fileno=int(sys.argv[1]))
    status = uvloop.run(serve(make, end))
    logging.shutdown()
    # At a regular exit, Python would wait for threads that cannot be ended, of the tokenizer or the engine.
    os._exit(status)


async def serve(make: MakeChild, end: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    child: Child | None = None
    running: asyncio.Task[int] | None = None
    started = loop.create_future()
    grace_s = 0.0

    def on_message(message: Message, descriptors: list[int]) -> None:
        nonlocal child, grace_s, running
        kind = message["type"]
        if kind == "start":
            config = config_from_json(message["config"])
            grace_s = config.grace_s
            set_up_logging(config.log_level, message["name"])
            try:
                child = make(config, message | {"descriptors": descriptors}, control)
            except ConfigError as error:
                logger.error("%s", error)
                os._exit(WRONG_SETTING)
            running = loop.create_task(child.run())
            started.set_result(None)
        elif child is None:
            logger.error("a control message came before the settings: %s", kind)
        elif kind == "link":
            child.on_link(message, descriptors)
        elif kind == "stop":
            child.stop()

    def on_end() -> None:
        logger.error("the supervisor is gone; finishing what is accepted")
        leave_after(grace_s + ORPHAN_S)
        if child is None:
            os._exit(1)
        child.stop()

    control = Control(end, on_message, on_end)
    await started
    assert child is not None
    assert running is not None
    samples = loop.create_task(send_samples(control, child.samples))
    try:
        status = await running
    except ConfigError as error:
        logger.error("%s", error)
        status = WRONG_SETTING
    samples.cancel()
    control.send({"type": "samples", "samples": list(child.samples())})
    return status if control.is_open else 1


async def send_samples(control: Control, collect: Callable[[], Iterable[Sample]]) -> None:
    while True:
        control.send({"type": "samples", "samples": list(collect())})
        await asyncio.sleep(SAMPLES_S)


def leave_after(seconds: float) -> None:
    """Ends the process at the latest after this time, even if its event loop hangs."""

    def leave() -> None:
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=leave, name="leave", daemon=True).start()

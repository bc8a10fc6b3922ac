"""The death of an engine process is noticed by its mutex, in all fronts, and only its death."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from layertap_server.config import Config
from layertap_server.enums import DType
from layertap_server.errors import RequestError
from layertap_server.link import records
from layertap_server.link.arena import create_arena
from layertap_server.link.plans import VERSION
from layertap_server.plan import OutputPlan, Work
from layertap_server.processes.front import LinkedModels
from layertap_server.processes.life import Life, create_life
from layertap_server.scheduling.fair_queue import Priority
from server.support import WAIT_S

HOLDS = (
    "import sys\n"
    "from layertap_server.processes.life import Life\n"
    "life = Life(int(sys.argv[1]))\n"
    "print(life.hold(), flush=True)\n"
    "sys.stdin.read()"
)


@contextmanager
def holder(life: int) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the mutex."""
    command = [sys.executable, "-c", HOLDS, str(life)]
    with subprocess.Popen(
        command, pass_fds=(life,), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        try:
            assert one.stdout is not None
            assert one.stdout.readline() == "True\n"
            yield one
        finally:
            one.kill()


def test_all_who_watch_are_told_of_its_death_and_of_nothing_else() -> None:
    life = create_life()
    with holder(life) as engine:
        lives = [Life(life) for _ in range(5)]
        os.kill(engine.pid, signal.SIGSTOP)
        assert not any(one._has_died(0.0) for one in lives)
        told = [threading.Event() for _ in lives]
        for one, event in zip(lives, told, strict=True):
            one.watch(event.set, lambda: True)
        assert not any(event.is_set() for event in told)
        engine.kill()
        assert all(event.wait(WAIT_S) for event in told)
        late = threading.Event()
        Life(life).watch(late.set, lambda: True)
        assert late.wait(WAIT_S)


def test_who_does_not_need_it_stops_watching() -> None:
    life = create_life()
    with holder(life):
        before = threading.active_count()
        Life(life).watch(pytest.fail, lambda: False)
        for thread in threading.enumerate():
            if thread.name == "life of the engine":
                thread.join(WAIT_S)
        assert threading.active_count() == before


def without(missing: str) -> Any:
    names = ("attr_init", "attr_setpshared", "attr_setrobust", "_init", "_lock")
    functions = {f"pthread_mutex{name}": lambda *_: 0 for name in names if name != missing}
    return SimpleNamespace(**functions)


def refuses(*_: Any) -> int:
    return 95


@pytest.mark.parametrize(
    "library",
    [
        without("attr_setrobust"),
        SimpleNamespace(**{**vars(without("")), "pthread_mutexattr_setrobust": refuses}),
    ],
)
def test_without_such_mutexes_nobody_watches(library: Any) -> None:
    life = create_life()
    assert not Life(life, library).hold()
    before = threading.active_count()
    Life(life).watch(pytest.fail, lambda: True)
    assert threading.active_count() == before


async def test_waiting_calls_fail_before_the_socket_of_the_dead_process_is_closed() -> None:
    """This process keeps the engine's end of the link open."""
    life = create_life()
    lost = asyncio.Event()
    models = LinkedModels(Config(), lost.set)
    ours, theirs = socket.socketpair()
    with holder(life) as engine, theirs:
        models.connect(ours.detach(), create_arena(1 << 16), life)
        theirs.setblocking(False)
        hello = records.json_record(records.Type.HELLO, {"version": VERSION, "models": []})
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(theirs, hello)
        await asyncio.wait_for(models._said_hello, WAIT_S)
        link = models._link
        assert link is not None
        plan = OutputPlan(DType.FLOAT32, last_hidden_state=True)
        work = Work(np.ones(3, np.int64), None, plan, plan.specs(3, 8))
        waiting = asyncio.create_task(link.compute(0, [work], Priority.NORMAL, None, "c"))
        await asyncio.wait_for(loop.sock_recv(theirs, 1), WAIT_S)
        engine.kill()
        with pytest.raises(RequestError) as raised:
            await asyncio.wait_for(waiting, WAIT_S)
        assert raised.value.reason == "ENGINE_DOWN"
        await asyncio.wait_for(lost.wait(), WAIT_S)
        assert models._link is None

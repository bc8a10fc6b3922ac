"""The supervisor: starts the processes of the server, watches them, starts them again, and stops them in order.

It imports neither gRPC nor torch, so that hardly anything in it can fail.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from layertap_server.config import Config
from layertap_server.link.arena import create_arena
from layertap_server.logs import set_up_logging
from layertap_server.metrics import MetricsServer, Sample, counter, serve_metrics
from layertap_server.processes.child import CANNOT_START, WRONG_SETTING, config_to_json
from layertap_server.processes.control import Control, Message, socket_pair
from layertap_server.processes.life import create_life
from layertap_server.processes.merged_samples import MergedSamples
from layertap_server.processes.port import ReservedPort
from layertap_server.start_checks import StartError, check_start

logger = logging.getLogger(__name__)

# The modules that the processes run.
FRONT, ENGINE = "layertap_server.processes.front", "layertap_server.processes.engine"
# A process that has given no sign of life for this long is killed; it gives four each second. The time in
# which the supervisor itself did not run does not count.
SILENCE_S = 10.0
CHECK_S = 0.5
# The time from the end of a process to its next start: it doubles with each end soon after the start.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 5.0
LONG_LIFE_S = 60.0
# If the engine process has ended this many times within a minute, the server ends.
MAX_DEATHS, DEATHS_WINDOW_S = 3, 60.0
# The time, after the grace period, in which a process that was told to stop ends by itself.
LAST_S = 3.0
# Of the results that may be in memory at the same time, what one front may promise: twice its share, so that
# fronts with more traffic than others are not held back, but not less than this.
MIN_FRONT_BYTES = 2**26


@dataclass(eq=False, slots=True)
class Process:
    """One process of the server; `name` stays when it is started again."""

    name: str
    module: str
    config: Config
    running: asyncio.subprocess.Process | None = None
    control: Control | None = None
    is_ready: bool = False
    started_s: float = 0.0
    heard_s: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    num_starts: int = 0
    deaths_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_DEATHS))
    # Whether it was told to stop, so that its end is no fault.
    is_stopping: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    watching: asyncio.Task[None] | None = None

    @property
    def is_engine(self) -> bool:
        return self.module != FRONT


class Supervisor:
    """All of it runs on the event loop."""

    def __init__(self, config: Config, num_fronts: int, engine: str = ENGINE) -> None:
        """`engine` is the module that an engine process runs."""
        self._config = config
        self._port = ReservedPort(config.host, config.port)
        self._samples = MergedSamples()
        self._metrics: MetricsServer | None = None
        self._stopping = asyncio.Event()
        self._told_s: float | None = None
        self._first_ready = asyncio.Event()
        self.status = 0
        # The arena and the life of the present engine process: fronts are given them with each link.
        self._shared: list[int] = []
        own = replace(config, port=self._port.port, metrics_port=0)
        self._engine = Process("engine", engine, own)
        self._fronts = [
            Process(f"front {number}", FRONT, front_config(own, number, num_fronts))
            for number in range(num_fronts)
        ]

    @property
    def _all(self) -> list[Process]:
        return [*self._fronts, self._engine]

    async def run(self) -> int:
        """Serves until it is told to stop, or the engine is lost for good; returns the exit status."""
        begun = time.monotonic()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        if self._config.metrics_port:
            self._metrics = serve_metrics(self._collect, self._config)
        checking = loop.create_task(self._check_life())
        for process in self._all:
            await self._start(process)
        ready = loop.create_task(self._first_ready.wait())
        told = loop.create_task(self._stopping.wait())
        await asyncio.wait({ready, told}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
            logger.info(
                "serving on %s:%d, ready in %.1f s, with %d front processes",
                host,
                self._port.port,
                time.monotonic() - begun,
                len(self._fronts),
            )
        ready.cancel()
        await told
        logger.info("stopping: accepted requests have %.0f s to finish", self._config.grace_s)
        await self._drain()
        checking.cancel()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
        self._port.release()
        logger.info("stopped")
        return self.status

    def stop(self) -> None:
        """Begins to drain. A second call, a second or more after the first, ends all processes at once."""
        now = time.monotonic()
        if self._told_s is None:
            self._told_s = now
            self._stopping.set()
        elif now - self._told_s >= 1.0:
            logger.warning("second signal to stop; exiting at once")
            for process in self._all:
                kill(process)
            os._exit(1)

    # ---------------------------------------------------------------------------- processes

    async def _start(self, process: Process) -> None:
        ours, theirs = socket_pair()
        if process.is_engine:
            for descriptor in self._shared:
                os.close(descriptor)
            self._shared = [create_arena(self._config.max_inflight_result_bytes), create_life()]
        process.is_ready = False
        process.ended = asyncio.Event()
        process.num_starts += 1
        process.started_s = process.heard_s = time.monotonic()
        try:
            process.running = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                process.module,
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
            )
        finally:
            theirs.close()
        process.control = Control(ours, lambda message, _: self._receive(process, message), lambda: None)
        process.control.send(
            {
                "type": "start",
                "name": process.name,
                "config": config_to_json(process.config),
            },
            self._shared if process.is_engine else (),
        )
        process.watching = asyncio.get_running_loop().create_task(self._watch(process))
        for front in self._fronts if process.is_engine else [process]:
            self._link(front)

    def _link(self, front: Process) -> None:
        """Connects the front and the engine process, if both are there."""
        of_front, of_engine = front.control, self._engine.control
        if of_front is None or of_engine is None:
            return
        ours, theirs = socket.socketpair()
        with ours, theirs:
            of_front.send({"type": "link"}, [ours.fileno(), *self._shared])
            of_engine.send({"type": "link"}, [theirs.fileno()])

    def _receive(self, process: Process, message: Message) -> None:
        process.heard_s = time.monotonic()
        kind = message["type"]
        if kind == "samples":
            samples = [
                Sample(title, text, is_counter, tuple((name, value) for name, value in labels), number)
                for title, text, is_counter, labels, number in message["samples"]
            ]
            self._samples.put(process.name, samples)
        elif kind == "ready":
            process.is_ready = True
            if all(one.is_ready for one in self._all):
                self._first_ready.set()
        elif kind == "link lost" and not process.is_stopping and self._engine.control is not None:
            # The engine's end is shown by its control channel as well; then this does nothing.
            self._link(process)

    async def _watch(self, process: Process) -> None:
        """Waits for the end of the process, and starts it again unless the server is stopping."""
        assert process.running is not None
        assert process.control is not None
        status = await process.running.wait()
        process.control.close()
        process.control = None
        self._samples.end(process.name)
        process.ended.set()
        if process.is_stopping or self._stopping.is_set():
            if status != 0:
                logger.error("the process '%s' ended with %s", process.name, words(status))
                self.status = 1
            return
        if not self._first_ready.is_set():  # what keeps one from starting would keep it from it again
            if status not in (WRONG_SETTING, CANNOT_START):  # else it has said why
                logger.error("the process '%s' ended with %s while starting", process.name, words(status))
            self._give_up(WRONG_SETTING if status == WRONG_SETTING else 1)
            return
        now = time.monotonic()
        process.deaths_s.append(now)
        if process.is_engine and is_frequent(process.deaths_s, now):
            logger.critical("the engine process has ended %d times within a minute", MAX_DEATHS)
            self._give_up(1)
            return
        lived_s = now - process.started_s
        process.pause_s = FIRST_PAUSE_S if lived_s >= LONG_LIFE_S else min(process.pause_s * 2, MAX_PAUSE_S)
        logger.error(
            "the process '%s' ended with %s after %.1f s; starting it again",
            process.name,
            words(status),
            lived_s,
        )
        await asyncio.sleep(process.pause_s)
        if not self._stopping.is_set():
            await self._start(process)

    def _give_up(self, status: int) -> None:
        self.status = status
        self._stopping.set()

    async def _check_life(self) -> None:
        """Kills a process that hangs: that has been ready, and gives no sign of life."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_S)
            now = time.monotonic()
            missed_s = max(now - before - CHECK_S, 0.0)
            before = now
            for process in self._all:
                process.heard_s += missed_s
                if process.is_ready and process.control is not None and now - process.heard_s > SILENCE_S:
                    logger.critical(
                        "the process '%s' has given no sign of life for %.0f s, and is killed",
                        process.name,
                        SILENCE_S,
                    )
                    process.is_ready = False
                    kill(process)

    async def _drain(self) -> None:
        """Stops the fronts, which finish what they have accepted, and then the engine process."""
        for processes in (self._fronts, [self._engine]):
            for process in processes:
                process.is_stopping = True
                if process.control is not None:
                    process.control.send({"type": "stop"})
            await asyncio.gather(*[self._end(process) for process in processes])

    async def _end(self, process: Process) -> None:
        """Waits for the end of a process that was told to stop; kills it if that takes too long."""
        if process.running is None or process.running.returncode is not None:
            return
        try:
            await asyncio.wait_for(process.ended.wait(), self._config.grace_s + LAST_S)
        except asyncio.TimeoutError:
            logger.error("the process '%s' does not end, and is killed", process.name)
            self.status = 1
            kill(process)
            await process.ended.wait()

    def _collect(self) -> Iterator[Sample]:
        yield from self._samples.collect()
        for process in self._all:
            text = "Restarts of a process of the server"
            yield counter("process_restarts", text, max(process.num_starts - 1, 0), process=process.name)


def front_config(config: Config, number: int, num_fronts: int) -> Config:
    """The settings of one front: limits that hold for the whole server are shared out."""
    share = max(2 * config.max_inflight_result_bytes // num_fronts, MIN_FRONT_BYTES, config.max_result_bytes)
    return replace(
        config,
        fronts=str(num_fronts),
        unix_socket=config.unix_socket if number == 0 else "",  # it cannot be shared
        max_queue_chars=max(config.max_queue_chars // num_fronts, 1),
        max_inflight_result_bytes=min(share, config.max_inflight_result_bytes),
        max_concurrent_rpcs=-(-config.max_concurrent_rpcs // num_fronts),
    )


def is_frequent(deaths_s: deque[float], now: float) -> bool:
    return len(deaths_s) == MAX_DEATHS and now - deaths_s[0] < DEATHS_WINDOW_S


def kill(process: Process) -> None:
    if process.running is not None and process.running.returncode is None:
        process.running.kill()


def words(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def run(config: Config, num_fronts: int, engine: str = ENGINE) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status."""
    set_up_logging(config.log_level, "supervisor")

    async def serve() -> int:
        check_start(config)
        return await Supervisor(config, num_fronts, engine).run()

    try:
        return asyncio.run(serve())
    except StartError as error:
        logger.error("%s", error)
        return 1

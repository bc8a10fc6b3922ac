"""Starts a server from a `Config`, serves, drains it, and returns the exit status."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import uvloop
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from layertap_server.api.early_rejection import EarlyRejection
from layertap_server.api.samples import service_samples
from layertap_server.api.service import SERVICE_NAME, EncoderService, Phase
from layertap_server.config import Config
from layertap_server.engine_samples import engine_samples
from layertap_server.local_model import LocalModel
from layertap_server.logs import set_up_logging
from layertap_server.metrics import LoopLag, MetricsServer, Sample, serve_metrics
from layertap_server.model_sources import LocalModels, ModelSource
from layertap_server.rpc.choice import create_server
from layertap_server.rpc.reflection import add_reflection
from layertap_server.rpc.security import Guard, exposure_warning, server_credentials
from layertap_server.serving import EngineState
from layertap_server.start_checks import StartError, check_start

logger = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# New objects, less those freed, between two runs of Python's garbage collector: as many as several full
# batches create.
GC_THRESHOLD = 20_000
# The time that gRPC has, when it stops, for what it has begun to send.
LAST_S = 0.1
# The time after the grace period in which callers get the error that their work was given up, and threads
# end.
GIVE_UP_S = 1.0
# A second signal within this time counts as the first one, which was sent both to the process and to its
# group.
SAME_SIGNAL_S = 1.0
# The interpreter's switch interval: a running thread is asked to release the interpreter after this time.
SWITCH_S = 1e-3


class Server:
    """The gRPC server of a process. `startup` returns when it is ready; `shutdown` drains it."""

    def __init__(
        self,
        config: Config,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        source: ModelSource | None = None,
        *,
        shares_port: bool = False,
    ) -> None:
        """`interceptors` see every call, for tracing for example. With `shares_port`, other processes may
        listen on the same port; the kernel gives each connection to one of them."""
        self.config = config
        self._interceptors = interceptors
        self._source = source or LocalModels(config)
        self._shares_port = shares_port
        self.address = ""
        # Whether it has begun to take calls; `service` and `lag` are there from then on.
        self.is_listening = False
        self._guard = Guard.from_config(config)
        # Whether the exit status is to be 1: an engine is lost, accepted work was given up, or a thread did
        # not end.
        self.failed = False
        # Whether threads of engines or tokenizers still run, which cannot be ended.
        self.leaves_threads = False
        self._stopping = asyncio.Event()
        self._told_to_stop_s: float | None = None
        self._metrics: MetricsServer | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._gc_threshold = gc.get_threshold()

    async def startup(self) -> None:
        """Listens at once, and answers UNAVAILABLE while the models are loaded and warmed up. Returns when it
        serves."""
        begun = time.monotonic()
        if not self._shares_port:
            check_start(self.config)
        await self._listen()
        self.lag = LoopLag()
        self.is_listening = True
        try:
            if self.config.metrics_port:
                self._metrics = serve_metrics(self.samples, self.config)
            await self._source.load(self.service.models, self._engine_changed)
            look_less_for_garbage()
            share_the_interpreter()
        except BaseException:
            self.lag.close()
            if self._metrics is not None:
                await asyncio.to_thread(self._metrics.close)
            await self._grpc.stop(None)
            self.remove_unix_socket()
            raise
        self.service.phase = Phase.SERVING
        await self._tell_health()
        if not self._shares_port:  # else the supervisor tells it, for all processes
            logger.info("serving on %s, ready in %.1f s", self.address, time.monotonic() - begun)

    async def wait(self) -> None:
        """Returns when the server is told to stop."""
        await self._stopping.wait()

    def request_stop(self) -> None:
        """Asks the server to stop."""
        self._stopping.set()

    def stop(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        """As `request_stop`. A second call, `SAME_SIGNAL_S` or more after the first, ends the process at
        once."""
        now = clock_s()
        if self._told_to_stop_s is None:
            self._told_to_stop_s = now
            self.request_stop()
        elif now - self._told_to_stop_s >= SAME_SIGNAL_S:
            logger.warning("second signal to stop; exiting at once")
            os._exit(1)

    async def shutdown(self) -> None:
        """Sets the health to NOT_SERVING, so that balancers send requests elsewhere; then waits until
        accepted work is done; then stops listening at a moment without traffic.

        Returns soon after the grace period even if something still runs then. `failed` is set if the grace
        period was too short, and `leaves_threads` if the process must not wait for its threads.
        """
        deadline = time.monotonic() + self.config.grace_s
        draining = asyncio.create_task(self.service.drain())
        await asyncio.sleep(0)  # it has begun
        await self._tell_health()
        if not (await asyncio.wait([draining], timeout=max(self.config.grace_s, LAST_S)))[0]:
            logger.error(
                "requests are unfinished after grace_s, %.1f s; they fail with UNAVAILABLE",
                self.config.grace_s,
            )
            self.failed = True
            for model in self.service.models.values():
                model.give_up(
                    "the server is shutting down, and this request was not finished in time; try another server"
                )
            await asyncio.wait([draining], timeout=GIVE_UP_S)
            draining.cancel()
        await self.service.quiet(deadline)
        # The calls that are open now are not accepted work: a client that watches the health, for example,
        # would keep its call open for as long as it can.
        await self._grpc.stop(min(max(deadline - time.monotonic(), 0.0), LAST_S))
        for model in self.service.models.values():
            if not await model.stop(max(deadline - time.monotonic(), GIVE_UP_S)):
                logger.error(
                    "%s: a forward pass or the tokenizer is still running; exiting without waiting for it",
                    model.facts.name,
                )
                self.failed = self.leaves_threads = True
        self.lag.close()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
        gc.unfreeze()
        gc.set_threshold(*self._gc_threshold)
        self.remove_unix_socket()

    def remove_unix_socket(self) -> None:
        if self.config.unix_socket:
            Path(self.config.unix_socket).unlink(missing_ok=True)

    def samples(self) -> Iterator[Sample]:
        """The metrics of this process. Called on a thread of the metrics server."""
        yield from service_samples(self.service, self.lag)
        for name, model in list(self.service.models.items()):
            if isinstance(model, LocalModel):
                yield from engine_samples(name, model.host)

    async def _listen(self) -> None:
        config = self.config
        options = [
            ("grpc.max_receive_message_length", config.max_message_bytes),
            # The service checks the size of its replies itself, with an error message that says what to do.
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", int(self._shares_port)),
        ]
        if config.max_connection_age_s:
            options += [
                ("grpc.max_connection_age_ms", milliseconds(config.max_connection_age_s)),
                ("grpc.max_connection_age_grace_ms", milliseconds(config.grace_s)),
            ]
        if config.keepalive_s:
            options += [
                ("grpc.keepalive_time_ms", milliseconds(config.keepalive_s)),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        try:
            self._grpc = await create_server(
                config.grpc_server, options, self._interceptors, config.max_concurrent_rpcs or None
            )
        except RuntimeError as error:
            raise StartError(f"--grpc-server fast: {error}; give stock or auto") from error
        self.service = EncoderService(config, self._guard)
        self._grpc.add_generic_rpc_handlers((self.service.handlers(),))
        if hasattr(self._grpc, "early_checks"):
            self._grpc.early_checks[f"/{SERVICE_NAME}/Encode"] = EarlyRejection(self.service)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        await self._tell_health()
        channelz.add_channelz_servicer(self._grpc)
        add_reflection([SERVICE_NAME], self._grpc)

        host = f"[{config.host}]" if ":" in config.host else config.host
        port = self._bind(f"{host}:{config.port}")
        self.address = f"{host}:{port}"
        if config.unix_socket:
            self._bind(f"unix:{config.unix_socket}")
        await self._grpc.start()

    def _bind(self, address: str) -> int:
        credentials = server_credentials(self.config)
        try:
            if credentials is None:
                return int(self._grpc.add_insecure_port(address))
            return int(self._grpc.add_secure_port(address, credentials))
        except RuntimeError as error:
            raise cannot_listen(address) from error

    async def _tell_health(self) -> None:
        """Sets the health to the state of now; of calls that overlap, the last one sets it last."""
        for name in ("", SERVICE_NAME):
            states = {model.state for model in self.service.models.values()}
            serves = states == {EngineState.UP} and self.service.phase is Phase.SERVING
            await self._health.set(name, SERVING if serves else NOT_SERVING)

    def _engine_changed(self) -> None:
        """Sets the health to NOT_SERVING while a model cannot answer, for the balancers. If an engine is
        lost, the server shuts down, so that its supervisor can start a new process."""
        if any(model.state is EngineState.LOST for model in self.service.models.values()):
            logger.critical("an engine has failed for good; shutting down")
            self.failed = True
            self._stopping.set()
        telling = asyncio.get_running_loop().create_task(self._tell_health())
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)


def milliseconds(seconds: float) -> int:
    """As gRPC takes it: a positive number that fits into 32 bits."""
    return min(max(round(seconds * 1000), 1), 2**31 - 1)


def look_less_for_garbage() -> None:
    """Excludes the objects that exist now from garbage collection, and makes collections rarer. The loaded
    objects stay alive anyway, and a collection over all of them would stop the event loop for a quarter of a
    second. And each batch of small requests creates more objects than the default threshold."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def share_the_interpreter() -> None:
    """Shortens the interpreter's switch interval. The thread of a core that has finished a batch needs the
    interpreter for a moment to begin the next one; with the default interval, the core is idle for 5 ms while
    the event loop writes the replies of the last batch."""
    sys.setswitchinterval(SWITCH_S)


def cannot_listen(address: str) -> StartError:
    return StartError(
        f"cannot listen on {address}: it is in use, or not an address of this machine; choose another --host or --port"
    )


async def serve(config: Config) -> int:
    server = Server(config)
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, server.stop)
    starting = asyncio.create_task(server.startup())
    told_to_stop = asyncio.create_task(server.wait())
    await asyncio.wait({starting, told_to_stop}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        logger.info("signal to stop while loading; exiting")
        server.remove_unix_socket()
        os._exit(0)  # nothing was accepted, and the thread that loads cannot be interrupted
    await starting
    if warning := exposure_warning(config):
        logger.warning(warning)
    await told_to_stop
    logger.info("stopping: accepted requests have %.0f s to finish", config.grace_s)
    await server.shutdown()
    logger.info("stopped")
    status = 1 if server.failed else 0
    if server.leaves_threads:
        # At a regular exit, Python would wait for the tokenizer's thread, and would end an engine's thread
        # inside native code, which ends the process by SIGABRT.
        logging.shutdown()
        os._exit(status)
    return status


def run(config: Config) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status. Raises `ConfigError` before anything is
    loaded."""
    set_up_logging(config.log_level)
    try:
        return uvloop.run(serve(config))
    except StartError as error:
        logger.error("%s", error)
        return 1

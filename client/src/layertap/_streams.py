"""The calls of one `Client.stream`: one on each connection that it uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import grpc

from layertap._connections import Connection, Connections
from layertap._pipeline import Pipeline
from layertap._transport import TimeLimit
from layertap._types import Input
from layertap.errors import LayertapError
from layertap.v1 import encoder_pb2 as pb

# The number of messages that a reader reads before the first of them is taken.
READ_AHEAD = 2


class Streams:
    """The EncodeStream calls of one stream, numbered from 0. Only one thread uses this object.

    That thread reads the messages of a single call itself. If there are several, each has a reader, a thread
    that puts its messages into `_inbox`, and that is never more than READ_AHEAD messages ahead: flow control
    slows the server down for a slow caller.

    `located` makes the LayertapError for an error of gRPC on a connection.
    """

    def __init__(
        self,
        connections: Connections,
        metadata: tuple[tuple[str, str], ...],
        limit: TimeLimit,
        located: Callable[[grpc.RpcError, Connection], LayertapError],
    ) -> None:
        self._connections = connections
        self._metadata = metadata
        self._limit = limit
        self._located = located
        self._lanes: list[_Lane] = []
        self._inbox: SimpleQueue[tuple[_Lane, bytes | Exception | None]] = SimpleQueue()

    def send(self, lane: int, message: pb.EncodeStreamRequest, delay_s: float = 0.0) -> None:
        """Queues a message for call number `lane`, which the next `receive` starts if it is new. The message
        and all later ones of the call are sent no earlier than in `delay_s` seconds."""
        if lane == len(self._lanes):
            self._lanes.append(_Lane())
        self._lanes[lane].outbox.put(message, delay_s)

    def receive(self) -> bytes | None:
        """The next message from the server on any of the calls. None: the server ended a call.

        Raises:
            LayertapError: a call failed.
        """
        for lane in self._lanes:
            if lane.call is None:
                self._start(lane)
        if len(self._lanes) == 1:
            lane = self._lanes[0]
            try:
                message: bytes | None = next(lane.call, None)
            except grpc.RpcError as error:
                raise self._located(error, lane.connection) from error
            return message
        for lane in self._lanes:
            if lane.reader is None:
                lane.reader = Thread(target=lane.read, args=[self._inbox], daemon=True)
                lane.reader.start()
        lane, got = self._inbox.get()
        lane.permits.put(True)
        if isinstance(got, grpc.RpcError):
            raise self._located(got, lane.connection) from got
        if isinstance(got, Exception):
            raise got
        return got

    def _start(self, lane: _Lane) -> None:
        used = [one.connection for one in self._lanes if one.connection is not None]
        lane.connection = self._connections.take(without=used)
        lane.call = lane.connection.stub.EncodeStream(
            iter(lane.outbox), timeout=self._limit.left_s, metadata=self._metadata
        )

    def finish(self) -> None:
        """Ends the calls. Every request was answered, so errors at the end do not matter."""
        for lane in self._lanes:
            lane.outbox.end()
        for lane in self._lanes:
            if lane.reader is not None:
                lane.permits.put(False)
                lane.reader.join()
            elif lane.call is not None:
                with suppress(grpc.RpcError):
                    next(lane.call, None)

    def close(self) -> None:
        """Cancels the calls that have not ended."""
        for lane in self._lanes:
            if lane.call is not None:
                lane.call.cancel()
            lane.outbox.end()
            lane.permits.put(False)
            if lane.connection is not None:
                self._connections.release(lane.connection)


class _Lane:
    """One call."""

    def __init__(self) -> None:
        self.outbox = _Outbox()
        self.connection: Any = None
        self.call: Any = None
        self.reader: Thread | None = None
        # For the reader: True to read one message, False to end.
        self.permits: SimpleQueue[bool] = SimpleQueue()
        for _ in range(READ_AHEAD):
            self.permits.put(True)

    def read(self, inbox: SimpleQueue[tuple[_Lane, bytes | Exception | None]]) -> None:
        """Runs in the reader: puts the messages of the call, and then its end or its error, into `inbox`."""
        while self.permits.get():
            try:
                message = next(self.call, None)
            except Exception as error:
                inbox.put((self, error))
                return
            inbox.put((self, message))
            if message is None:
                return


class _Outbox:
    """The queue of messages to send. gRPC's own thread iterates over it until `end` is called."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[tuple[float, pb.EncodeStreamRequest] | None] = SimpleQueue()
        self._ended = Event()

    def put(self, message: pb.EncodeStreamRequest, delay_s: float = 0.0) -> None:
        """Queues a message. It and all later messages are sent no earlier than in `delay_s` seconds."""
        self._messages.put((time.monotonic() + delay_s, message))

    def end(self) -> None:
        self._ended.set()
        self._messages.put(None)

    def __iter__(self) -> Iterator[pb.EncodeStreamRequest]:
        while (item := self._messages.get()) is not None:
            not_before, message = item
            if (delay_s := not_before - time.monotonic()) > 0 and self._ended.wait(delay_s):
                return
            yield message


def fill(pipeline: Pipeline, source: Iterator[Input] | None, streams: Streams) -> Iterator[Input] | None:
    """Queues the messages that may be sent now. Returns the source, or None if it has no more inputs."""
    for delay_s, refused in pipeline.take_refused():
        streams.send(pipeline.lane_of(refused), refused, delay_s)
    while source is not None and (count := pipeline.num_wanted):
        group: list[Input] = []
        failure: Exception | None = None
        try:
            for value in source:
                group.append(value)
                if len(group) == count:
                    break
        except Exception as error:  # raised by the caller's iterable: reported after the earlier results
            failure = error
        for request in pipeline.submit(group):
            streams.send(pipeline.lane_of(request), request)
        if failure is not None:
            pipeline.fail(failure)
        if len(group) < count:
            source = None
    return source

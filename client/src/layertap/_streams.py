"""The calls of one `Client.stream`: one on each connection that it uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
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
# Inputs that were read are sent after this time, also where a request could have more of them.
SLOW_S = 0.01


class Streams:
    """The EncodeStream calls of one stream, numbered from 0. Only one thread uses this object.

    That thread reads the messages of a single call itself. If there are several, or if it does not wait for
    messages (`arrived`), each has a reader, a thread that puts its messages into `_inbox`, and that is never
    more than READ_AHEAD messages ahead: flow control slows the server down for a slow caller.

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
        self._start_calls()
        if len(self._lanes) == 1 and self._lanes[0].reader is None:
            lane = self._lanes[0]
            try:
                message: bytes | None = next(lane.call, None)
            except grpc.RpcError as error:
                raise self._located(error, lane.connection) from error
            return message
        self._start_readers()
        return self._take(*self._inbox.get())

    def next_one(self) -> Iterator[bytes | None]:
        """The next message alone, as `receive` returns it."""
        yield self.receive()

    def arrived(self) -> Iterator[bytes | None]:
        """The messages that have arrived, as `receive` returns them, without waiting for any."""
        self._start_calls()
        self._start_readers()
        with suppress(Empty):
            while True:
                yield self._take(*self._inbox.get_nowait())

    def _take(self, lane: _Lane, got: bytes | Exception | None) -> bytes | None:
        lane.permits.put(True)
        if isinstance(got, grpc.RpcError):
            raise self._located(got, lane.connection) from got
        if isinstance(got, Exception):
            raise got
        return got

    def _start_calls(self) -> None:
        for lane in self._lanes:
            if lane.call is None:
                self._start(lane)

    def _start_readers(self) -> None:
        for lane in self._lanes:
            if lane.reader is None:
                lane.reader = Thread(target=lane.read, args=[self._inbox], daemon=True)
                lane.reader.start()

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


class Inputs:
    """The inputs of a stream, in groups. They are read on the caller's thread."""

    def __init__(self, inputs: Iterable[Input]) -> None:
        self._source = iter(inputs)
        self.has_more = True
        # Whether the last group took so long to read that it may be smaller than wanted.
        self.is_slow = False
        # What the caller's iterable raised; it then has no more.
        self.failure: Exception | None = None

    def take(self, count: int) -> list[Input]:
        """The next inputs: `count`, or those that were read in `SLOW_S`; fewer at the end."""
        group: list[Input] = []
        until = time.monotonic() + SLOW_S
        try:
            for value in self._source:
                group.append(value)
                self.is_slow = time.monotonic() > until
                if self.is_slow or len(group) == count:
                    return group
        except Exception as error:  # reported after the earlier results
            self.failure = error
        self.has_more = False
        return group


def fill(pipeline: Pipeline, inputs: Inputs, streams: Streams) -> Iterable[bytes | None]:
    """Queues the messages that may be sent now. Returns the messages to process before more is sent; where the
    caller's iterable is slow, these are no more than have arrived."""
    for delay_s, refused in pipeline.take_refused():
        streams.send(pipeline.lane_of(refused), refused, delay_s)
    while inputs.has_more and (count := pipeline.num_wanted):
        for request in pipeline.submit(inputs.take(count)):
            streams.send(pipeline.lane_of(request), request)
        if inputs.failure is not None:
            pipeline.fail(inputs.failure)
        if inputs.is_slow and inputs.has_more:
            return streams.arrived()
    return streams.next_one()

"""As `_streams`, for `AsyncClient.stream`."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeAlias

import grpc

from layertap._connections import Connection, Connections
from layertap._pipeline import Pipeline
from layertap._transport import TimeLimit
from layertap._types import Input
from layertap.errors import LayertapError
from layertap.v1 import encoder_pb2 as pb


class Streams:
    """The EncodeStream calls of one stream, numbered from 0.

    A single call is read by the caller's task. If there are several, each has a task that reads its next
    message, and no more than that: flow control slows the server down for a slow caller.

    `located` makes the LayertapError for an error of gRPC on a connection.
    """

    def __init__(
        self,
        connections: Connections,
        metadata: tuple[tuple[str, str], ...],
        limit: TimeLimit,
        located: Callable[[grpc.RpcError, Connection], Awaitable[LayertapError]],
    ) -> None:
        self._connections = connections
        self._metadata = metadata
        self._limit = limit
        self._located = located
        self._lanes: list[_Lane] = []
        # Those whose next message was read, and not yet returned.
        self._readable: deque[_Lane] = deque()

    def send(self, lane: int, message: pb.EncodeStreamRequest, delay_s: float = 0.0) -> None:
        """Queues a message for call number `lane`, which the next `receive` starts if it is new. The message
        and all later ones of the call are sent no earlier than in `delay_s` seconds."""
        if lane == len(self._lanes):
            self._lanes.append(_Lane())
        self._lanes[lane].outbox.put_nowait((time.monotonic() + delay_s, message))

    async def receive(self) -> bytes | None:
        """The next message from the server on any of the calls. None: the server ended a call.

        Raises:
            LayertapError: a call failed.
        """
        for lane in self._lanes:
            if lane.call is None:
                self._start(lane)
        if len(self._lanes) == 1:
            lane = self._lanes[0]
            got = await _next(lane.messages)
        else:
            lane = await self._next_readable()
            got, lane.reading = lane.reading.result(), None
        if isinstance(got, grpc.RpcError):
            raise await self._located(got, lane.connection) from got
        return got

    def _start(self, lane: _Lane) -> None:
        used = [one.connection for one in self._lanes if one.connection is not None]
        lane.connection = self._connections.take(without=used)
        lane.call = lane.connection.stub.EncodeStream(
            _messages(lane.outbox), timeout=self._limit.left_s, metadata=self._metadata
        )
        lane.messages = aiter(lane.call)

    async def _next_readable(self) -> _Lane:
        for lane in self._lanes:
            if lane.reading is None:
                lane.reading = asyncio.create_task(_next(lane.messages))
        if not self._readable:
            await asyncio.wait([lane.reading for lane in self._lanes], return_when=asyncio.FIRST_COMPLETED)
            self._readable.extend(lane for lane in self._lanes if lane.reading.done())
        return self._readable.popleft()

    async def finish(self) -> None:
        """Ends the calls. Every request was answered, so errors at the end do not matter."""
        for lane in self._lanes:
            lane.outbox.put_nowait(None)
        for lane in self._lanes:
            if lane.messages is not None:
                await (lane.reading or _next(lane.messages))

    def close(self) -> None:
        """Cancels the calls that have not ended."""
        for lane in self._lanes:
            if lane.call is not None:
                lane.call.cancel()
            if lane.reading is not None:
                lane.reading.cancel()
            if lane.connection is not None:
                self._connections.release(lane.connection)


# Messages with the times before which they, and all later ones, are not sent. None ends the stream.
_Outbox: TypeAlias = "asyncio.Queue[tuple[float, pb.EncodeStreamRequest] | None]"


class _Lane:
    """One call."""

    def __init__(self) -> None:
        self.outbox: _Outbox = asyncio.Queue()
        self.connection: Any = None
        self.call: Any = None
        self.messages: Any = None
        self.reading: Any = None  # the task that reads the next message


async def _next(messages: AsyncIterator[bytes]) -> bytes | grpc.RpcError | None:
    """The next message, None at the end, or the error of the call: a task that is dropped may not raise."""
    try:
        return await anext(messages, None)
    except grpc.RpcError as error:
        return error


async def _messages(outbox: _Outbox) -> AsyncIterator[pb.EncodeStreamRequest]:
    while (item := await outbox.get()) is not None:
        not_before, message = item
        if (delay_s := not_before - time.monotonic()) > 0:
            await asyncio.sleep(delay_s)
        yield message


async def aiter_of(inputs: Iterable[Input] | AsyncIterable[Input]) -> AsyncIterator[Input]:
    """The inputs, one after the other."""
    if isinstance(inputs, AsyncIterable):
        async for value in inputs:
            yield value
    else:
        for value in inputs:
            yield value


async def fill(
    pipeline: Pipeline, source: AsyncIterator[Input] | None, streams: Streams
) -> AsyncIterator[Input] | None:
    """Queues the messages that may be sent now. Returns the source, or None if it has no more inputs."""
    for delay_s, refused in pipeline.take_refused():
        streams.send(pipeline.lane_of(refused), refused, delay_s)
    while source is not None and (count := pipeline.num_wanted):
        group: list[Input] = []
        failure: Exception | None = None
        try:
            async for value in source:
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

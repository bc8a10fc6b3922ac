"""As `_streams`, for `AsyncClient.stream`."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from layertap._connections import Connection, Connections
from layertap._pipeline import Pipeline
from layertap._streams import SLOW_S
from layertap._transport import TimeLimit
from layertap._types import Input
from layertap.errors import LayertapError
from layertap.v1 import encoder_pb2 as pb

# The number of inputs that are read before the first of them is taken.
READ_AHEAD = 16


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
        # The call of `receive` that waits while inputs are read.
        self._receiving: asyncio.Task[bytes | None] | None = None

    def send(self, lane: int, message: pb.EncodeStreamRequest, delay_s: float = 0.0) -> None:
        """Queues a message for call number `lane`, which the next `receive` starts if it is new. The message
        and all later ones of the call are sent no earlier than in `delay_s` seconds."""
        if lane == len(self._lanes):
            self._lanes.append(_Lane())
        self._lanes[lane].outbox.put_nowait((time.monotonic() + delay_s, message))

    async def receive_or(self, getting: asyncio.Task[Any] | None) -> tuple[bytes | None] | None:
        """As `receive`, in a tuple; or None once the other task is done, or at once without one."""
        self._start_calls()
        if self._receiving is None:
            self._receiving = asyncio.create_task(self.receive())
        others = set() if getting is None else {getting}
        timeout = 0.0 if getting is None else None
        await asyncio.wait({self._receiving, *others}, return_when=asyncio.FIRST_COMPLETED, timeout=timeout)
        return (await self.next_one(),) if self._receiving.done() else None

    async def next_one(self) -> bytes | None:
        """As `receive`, which `receive_or` may have begun."""
        if self._receiving is None:
            return await self.receive()
        receiving, self._receiving = self._receiving, None
        return await receiving

    async def receive(self) -> bytes | None:
        """The next message from the server on any of the calls. None: the server ended a call.

        Raises:
            LayertapError: a call failed.
        """
        self._start_calls()
        if len(self._lanes) == 1:
            lane = self._lanes[0]
            got = await _next(lane.messages)
        else:
            lane = await self._next_readable()
            got, lane.reading = lane.reading.result(), None
        if isinstance(got, grpc.RpcError):
            raise await self._located(got, lane.connection) from got
        return got

    def _start_calls(self) -> None:
        for lane in self._lanes:
            if lane.call is None:
                self._start(lane)

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
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving.add_done_callback(_forget)
        for lane in self._lanes:
            if lane.call is not None:
                lane.call.cancel()
            if lane.reading is not None:
                lane.reading.cancel()
            if lane.connection is not None:
                self._connections.release(lane.connection)


@dataclass(frozen=True, slots=True)
class _Read:
    """One input, or the end of the inputs."""

    value: Any = None
    failure: Exception | None = None  # with `is_end`: what the caller's iterable raised
    is_end: bool = False


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


def _forget(task: asyncio.Task[Any]) -> None:
    """An error that nobody waits for any more is no news."""
    if not task.cancelled():
        task.exception()


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


class Inputs:
    """As `_streams.Inputs`. An async iterable is read by a task of its own, which is a few inputs ahead, so that
    results can be handed out while its next input takes long."""

    def __init__(self, inputs: Iterable[Input] | AsyncIterable[Input]) -> None:
        self.has_more = True
        self.is_slow = False
        self.failure: Exception | None = None
        self._plain: Iterator[Input] | None = None
        self._read: asyncio.Queue[_Read] = asyncio.Queue(READ_AHEAD)
        self._reader: asyncio.Task[None] | None = None
        # Gets the next of `_read`.
        self.getting: asyncio.Task[_Read] | None = None
        if isinstance(inputs, AsyncIterable):
            self._reader = asyncio.create_task(self._read_all(inputs))
        else:
            self._plain = iter(inputs)

    async def _read_all(self, inputs: AsyncIterable[Input]) -> None:
        failure: Exception | None = None
        try:
            async for value in inputs:
                await self._read.put(_Read(value))
        except Exception as error:
            failure = error
        await self._read.put(_Read(failure=failure, is_end=True))

    async def take(self, count: int) -> list[Input]:
        """The next inputs: `count`, or those that were read in `SLOW_S`, which may be none; fewer at the end."""
        group: list[Input] = []
        until = time.monotonic() + SLOW_S
        self.is_slow = False
        while len(group) < count and not self.is_slow:
            one = self._next_plain() if self._plain is not None else await self._next(until)
            if one is None:
                self.is_slow = True
            elif one.is_end:
                self.has_more, self.failure = False, one.failure
                break
            else:
                group.append(one.value)
                self.is_slow = time.monotonic() > until
        return group

    def _next_plain(self) -> _Read:
        assert self._plain is not None
        try:
            return _Read(next(self._plain))
        except StopIteration:
            return _Read(is_end=True)
        except Exception as error:
            return _Read(failure=error, is_end=True)

    async def _next(self, until: float) -> _Read | None:
        """The next one that was read; None if there is none until then."""
        if self.getting is None:
            if not self._read.empty():
                return self._read.get_nowait()
            self.getting = asyncio.create_task(self._read.get())
        await asyncio.wait({self.getting}, timeout=max(until - time.monotonic(), 0.0))
        if not self.getting.done():
            return None
        one, self.getting = self.getting.result(), None
        return one

    async def wait(self) -> None:
        """Until there is an input to take, or the end."""
        if self.getting is not None:
            await asyncio.wait({self.getting})

    def close(self) -> None:
        """Ends the tasks."""
        for task in (self._reader, self.getting):
            if task is not None:
                task.cancel()


async def fill(pipeline: Pipeline, inputs: Inputs, streams: Streams) -> bool:
    """Queues the messages that may be sent now. Returns whether more inputs are wanted, which the caller's
    iterable does not have yet."""
    for delay_s, refused in pipeline.take_refused():
        streams.send(pipeline.lane_of(refused), refused, delay_s)
    while inputs.has_more and (count := pipeline.num_wanted):
        for request in pipeline.submit(await inputs.take(count)):
            streams.send(pipeline.lane_of(request), request)
        if inputs.failure is not None:
            pipeline.fail(inputs.failure)
        if inputs.is_slow and inputs.has_more:
            return pipeline.num_wanted > 0
    return False

"""One EncodeStream seen from the caller, without I/O: what may be sent next, what a frame completes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from layertap import errors
from layertap._codec import decode_results, decode_timing, input_message
from layertap._landing import Landing, Memory
from layertap._types import Input, Result, Timing
from layertap._wire import Buffer, parse_frame
from layertap.v1 import encoder_pb2 as pb

MAX_INPUTS_IN_FLIGHT = 128
MAX_BYTES_IN_FLIGHT = 64 << 20
# A request carries several inputs while their results are small: fewer messages for the same work.
MAX_GROUP_INPUTS = 16
GROUP_BYTES = 1 << 20
# A request that the server is too busy for is sent again when the server says, for this long in all.
MAX_BUSY_S = 60.0
# Callers that were refused together do not all come back together.
_BUSY_SPREAD = 0.25
# An input's result is taken to be this large until the first ones have come.
_FIRST_GUESS_BYTES = 16 << 20


@dataclass(slots=True)
class _Request:
    """One request in flight: the inputs `first` to `first + num_inputs` of the stream."""

    first: int
    num_inputs: int
    message: pb.EncodeStreamRequest
    busy_s: float = 0.0  # how long the server had it wait before it was sent again
    landings: dict[int, Landing] = field(default_factory=dict)
    results: list[Result] | None = None  # filled when the request has ended well


class Pipeline:
    """Keeps a bounded amount of work in flight: inputs, and the bytes that their results are expected
    to have, going by those that came before. What waits for its turn (`ordered`) counts as well, so a
    slow reader holds no more than that either. A server that is too busy is sent no more than it took,
    until it has answered more.

    `template` is the request without inputs; no request gets more than `max_inputs` of them.
    """

    def __init__(self, template: pb.EncodeRequest, *, ordered: bool, max_inputs: int) -> None:
        self._template = template
        self._ordered = ordered
        self._max_group_inputs = min(MAX_GROUP_INPUTS, max_inputs)
        self._requests: dict[int, _Request] = {}  # by id, in the order asked
        self._memory = Memory()
        self._next_id = 0
        self._num_inputs = 0
        self._num_in_flight = 0
        self._expected_bytes = _FIRST_GUESS_BYTES
        self._max_inputs_in_flight = MAX_INPUTS_IN_FLIGHT
        self._refused: list[tuple[float, pb.EncodeStreamRequest]] = []

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._requests

    @property
    def num_wanted(self) -> int:
        """How many inputs to submit now, for one request; 0 when enough is in flight."""
        if self._num_in_flight and (
            self._num_in_flight >= self._max_inputs_in_flight
            or self._num_in_flight * self._expected_bytes >= MAX_BYTES_IN_FLIGHT
        ):
            return 0
        return max(1, min(GROUP_BYTES // self._expected_bytes, self._max_group_inputs))

    def submit(self, inputs: Sequence[Input]) -> Iterator[pb.EncodeStreamRequest]:
        """The messages that ask for these inputs."""
        group: list[pb.Input] = []
        group_bytes = 0
        for index, value in enumerate(inputs, self._num_inputs):
            message = input_message(value, index)
            # The servers' limit on messages counts whole requests: long texts go one by one.
            if group and group_bytes + message.ByteSize() > GROUP_BYTES:
                yield self._request(group)
                group, group_bytes = [], 0
            group.append(message)
            group_bytes += message.ByteSize()
        if group:
            yield self._request(group)

    def _request(self, group: Sequence[pb.Input]) -> pb.EncodeStreamRequest:
        message = pb.EncodeStreamRequest(
            request_id=self._next_id, request=self._template, accepts_whole=True, accepts_grouped=True
        )
        message.request.inputs.extend(group)
        self._requests[self._next_id] = _Request(self._num_inputs, len(group), message)
        self._next_id += 1
        self._num_inputs += len(group)
        self._num_in_flight += len(group)
        return message

    def receive(self, message: bytes) -> Iterator[tuple[int, Result]]:
        """The results, with their inputs' indices, that can be handed out now that this message came,
        a serialized EncodeStreamResponse.

        Raises:
            LayertapError: the frame ends a request with an error.
            InternalError: the frame does not follow the contract.
        """
        frame, data = parse_frame(message)
        if frame.WhichOneof("frame") != "grouped":
            yield from self._receive(frame, data)
            return
        for one in frame.grouped.frames:
            yield from self._receive(one, one.chunk.data)

    def _receive(self, frame: pb.EncodeStreamResponse, data: Buffer) -> Iterator[tuple[int, Result]]:
        try:
            request = self._requests[frame.request_id]
            match frame.WhichOneof("frame"):
                case "header":
                    request.landings[frame.header.input_index] = Landing(frame.header.result, self._memory)
                case "chunk":
                    request.landings[frame.chunk.input_index].land(frame.chunk, data)
                case "end" if frame.end.status.code:
                    self._refuse(request, errors.from_status(frame.end.status, request.first))
                case "end":
                    self._complete(request, decode_timing(frame.end.timing))
                case "whole":
                    self._complete_whole(request, frame.whole)
                case _:
                    raise ValueError("it is empty")
        except (KeyError, IndexError, ValueError) as error:
            text = f"the server sent a frame that does not follow the contract: {error}"
            raise errors.InternalError(text) from error
        if request.results is not None:
            yield from self._hand_out(frame.request_id)

    def _refuse(self, request: _Request, error: errors.LayertapError) -> None:
        """Has it sent again when the server says so; else raises the error."""
        if not isinstance(error, errors.ResourceExhausted) or error.retry_after_s is None:
            raise error
        delay_s = error.retry_after_s * (1 + _BUSY_SPREAD * random.random())
        request.busy_s += delay_s
        if request.busy_s > MAX_BUSY_S:
            raise error
        request.landings.clear()
        self._refused.append((delay_s, request.message))
        num_refused = sum(one.num_inputs for one in self._requests.values() if one.busy_s)
        self._max_inputs_in_flight = max(self._num_in_flight - num_refused, 1)

    def take_refused(self) -> list[tuple[float, pb.EncodeStreamRequest]]:
        """The messages to send again, each with the seconds to wait before that."""
        refused, self._refused = self._refused, []
        return refused

    def _complete(self, request: _Request, timing: Timing) -> None:
        request.results = [request.landings[index].result(timing) for index in range(request.num_inputs)]
        for landing in request.landings.values():
            # Large results count at once, small ones have to come for a while: the window opens slowly.
            size = max(1, landing.num_bytes)
            self._expected_bytes = max(size, self._expected_bytes // 2)
        request.landings.clear()
        self._grow(request)

    def _complete_whole(self, request: _Request, reply: pb.EncodeResponse) -> None:
        if len(reply.results) != request.num_inputs:
            raise ValueError(f"{len(reply.results)} results for {request.num_inputs} inputs")
        request.results = decode_results(reply)
        size = max(1, reply.ByteSize() // request.num_inputs)
        self._expected_bytes = max(size, self._expected_bytes // 2)
        self._grow(request)

    def _grow(self, request: _Request) -> None:
        self._max_inputs_in_flight = min(
            self._max_inputs_in_flight + request.num_inputs, MAX_INPUTS_IN_FLIGHT
        )

    def _hand_out(self, request_id: int) -> Iterator[tuple[int, Result]]:
        while (request := self._requests.get(request_id)) is not None and request.results is not None:
            if self._ordered and request_id != next(iter(self._requests)):
                return
            del self._requests[request_id]
            for index, result in enumerate(request.results, request.first):
                self._num_in_flight -= 1
                yield index, result
            if not self._ordered:
                return
            request_id += 1

    def finish(self) -> None:
        """Raises InternalError if the stream has ended and something is unanswered."""
        if self._requests:
            raise errors.InternalError(
                f"the server ended the stream with {len(self._requests)} requests unanswered"
            )

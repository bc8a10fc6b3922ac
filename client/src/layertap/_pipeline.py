"""The client's side of an EncodeStream, without I/O: the requests to send, and the complete results."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from layertap import errors
from layertap._arguments import OnError
from layertap._landing import Landing, Memory
from layertap._replies import decode_results, decode_timing
from layertap._requests import input_message
from layertap._results import Result, Timing
from layertap._types import Input
from layertap._unary import Limits
from layertap._wire import Buffer, parse_frame
from layertap.errors import LayertapError
from layertap.v1 import encoder_pb2 as pb

MAX_INPUTS_IN_FLIGHT = 128
MAX_BYTES_IN_FLIGHT = 64 << 20
# A further lane is used for each so many inputs.
LANE_INPUTS = 16
# While results are small, one request carries several inputs, so that fewer messages are needed.
MAX_GROUP_INPUTS = 16
GROUP_BYTES = 1 << 20
# A request that the server rejects because it is busy is sent again after the delay that the server asks for,
# as long as its delays add up to no more than this.
MAX_BUSY_S = 60.0
# Each delay is increased by a random share up to this, so that clients that were rejected at the same time do
# not all return at the same time.
_BUSY_SPREAD = 0.25
# The assumed size of a result until the first results have arrived.
_FIRST_GUESS_BYTES = 16 << 20


@dataclass(slots=True, eq=False)
class _Request:
    """One request to the server, for the stream's inputs from `first` to `first + num_inputs`.

    If the request failed as a whole, `parts` are the requests of one input each that replaced it.
    """

    first: int
    num_inputs: int
    message: pb.EncodeStreamRequest
    lane: int = 0
    whole: _Request | None = None  # the request that this is a part of
    busy_s: float = 0.0  # the sum of the delays before it was sent again
    landings: dict[int, Landing] = field(default_factory=dict)
    outcomes: list[Result | LayertapError] | None = None  # set when the request has ended
    parts: list[_Request] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error that ends the stream after the results of all inputs before `index` were handed out."""

    index: int
    error: Exception


class Pipeline:
    """Limits the work in flight: the number of inputs, and the expected size of their results in bytes,
    estimated from earlier results. Results that wait for earlier ones (`ordered`) count as in flight, so
    memory is bounded for a slow reader too. If the server is busy, no more is in flight than it accepted;
    the limit grows again as results arrive.

    If an input fails, the others do not. With `on_error="return"`, its error is handed out in its place.
    With "raise", the first failure ends the stream, after the results of all earlier inputs. Errors that
    do not belong to one input end the stream in both cases.

    The requests may be sent on several calls: `max_lanes`, numbered from 0. A request goes to the lane with the
    fewest inputs in flight. The limits are those of all lanes together.

    `template` is the request without inputs. A request has at most `max_inputs` inputs, and a message at
    most `max_message_bytes`. `max_tokens` is used only in an error message. `locate` adds the address and
    the time limit to an error of the server.
    """

    def __init__(
        self,
        template: pb.EncodeRequest,
        *,
        ordered: bool,
        max_inputs: int,
        max_message_bytes: int = 0,
        max_tokens: int = 0,
        on_error: OnError = "raise",
        locate: Callable[[LayertapError], None] | None = None,
        max_lanes: int = 1,
    ) -> None:
        self._asked = template
        self._template = pb.EncodeRequest()
        self._template.CopyFrom(template)
        self._template.fail_each_alone = True
        self._ordered = ordered
        self._returns_errors = on_error == "return"
        self._locate = locate
        self._limits = Limits(max_inputs, max_message_bytes, max_tokens)
        self._max_group_inputs = min(MAX_GROUP_INPUTS, max_inputs)
        # The requests whose results are not handed out yet, by their first input, in the order of the inputs;
        # those that the server has not answered, by request_id; those that can be handed out, in the order in
        # which they ended.
        self._requests: dict[int, _Request] = {}
        self._in_flight: dict[int, _Request] = {}
        self._complete_requests: deque[_Request] = deque()
        self._memory = Memory()
        # The number of inputs in flight on each lane that has been used.
        self._lanes = [0]
        self._max_lanes = max_lanes
        self._next_id = 0
        self._num_inputs = 0
        self._num_in_flight = 0
        self._expected_bytes = _FIRST_GUESS_BYTES
        self._max_inputs_in_flight = MAX_INPUTS_IN_FLIGHT
        self._refused: list[tuple[float, pb.EncodeStreamRequest]] = []
        self._failure: _Failure | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._requests

    @property
    def num_wanted(self) -> int:
        """The number of inputs to submit now in one request; 0 if enough is in flight."""
        if self._failure is not None:
            return 0
        if self._num_in_flight and (
            self._num_in_flight >= self._max_inputs_in_flight
            or self._num_in_flight * self._expected_bytes >= MAX_BYTES_IN_FLIGHT
        ):
            return 0
        return max(1, min(GROUP_BYTES // self._expected_bytes, self._max_group_inputs))

    def submit(self, inputs: Sequence[Input]) -> Iterator[pb.EncodeStreamRequest]:
        """The messages to send for these inputs."""
        template_bytes = self._template.ByteSize()
        # Half of the server's limit leaves enough space for the template and the enclosing message.
        max_bytes = min(GROUP_BYTES, self._limits.max_message_bytes // 2 or GROUP_BYTES)
        group: list[pb.Input] = []
        group_bytes = 0
        for index, value in enumerate(inputs, self._num_inputs):
            try:
                message = input_message(value, index)
                size = self._limits.check_size(index, message, template_bytes)
            except (TypeError, ValueError) as error:
                if group:
                    yield self._request(group)
                    group, group_bytes = [], 0
                if not self._returns_errors:
                    self.fail(error)
                    return
                self._answer_here(error)
                continue
            # The server limits the size of a whole message, so long texts are sent in messages of their own.
            if group and group_bytes + size > max_bytes:
                yield self._request(group)
                group, group_bytes = [], 0
            group.append(message)
            group_bytes += size
        if group:
            yield self._request(group)

    def _request(self, group: Sequence[pb.Input]) -> pb.EncodeStreamRequest:
        request = _Request(self._num_inputs, len(group), self._message(group), self._take_lane(len(group)))
        self._requests[request.first] = request
        self._in_flight[request.message.request_id] = request
        self._num_inputs += len(group)
        self._num_in_flight += len(group)
        return request.message

    def _message(self, group: Sequence[pb.Input]) -> pb.EncodeStreamRequest:
        message = pb.EncodeStreamRequest(
            request_id=self._next_id, request=self._template, accepts_whole=True, accepts_grouped=True
        )
        message.request.inputs.extend(group)
        self._next_id += 1
        return message

    def _take_lane(self, num_inputs: int) -> int:
        """The lane for a request with this number of inputs."""
        lanes = self._lanes
        lane = min(range(len(lanes)), key=lanes.__getitem__)
        if lanes[lane] and len(lanes) < self._max_lanes and self._num_inputs >= LANE_INPUTS * len(lanes):
            lane = len(lanes)
            lanes.append(0)
        lanes[lane] += num_inputs
        return lane

    def lane_of(self, message: pb.EncodeStreamRequest) -> int:
        """The lane on which to send this message. No lane is used before all those with a lower number."""
        return self._in_flight[message.request_id].lane

    def _take_out(self, request: _Request) -> None:
        """Removes a request that the server has answered from those in flight."""
        del self._in_flight[request.message.request_id]
        self._lanes[request.lane] -= request.num_inputs

    def _answer_here(self, error: Exception) -> None:
        """Answers the next input with an error, without asking the server."""
        own = errors.InvalidArgument(str(error), input_index=self._num_inputs)
        own.__cause__ = error
        request = _Request(self._num_inputs, 1, pb.EncodeStreamRequest(), outcomes=[own])
        self._requests[request.first] = request
        self._complete_requests.append(request)
        self._num_inputs += 1
        self._num_in_flight += 1

    def fail(self, error: Exception) -> None:
        """The next input could not be read: the stream ends with this error, after all earlier results."""
        self._end_with(self._num_inputs, error)

    def _end_with(self, index: int, error: Exception) -> None:
        if self._failure is None or index < self._failure.index:
            self._failure = _Failure(index, error)

    def receive(self, message: bytes) -> Iterator[tuple[int, Result | LayertapError]]:
        """Processes a message, a serialized EncodeStreamResponse, and yields the results that can be handed
        out now, as (index, result).

        Raises:
            Exception: the error that ends the stream, after all earlier results.
            InternalError: the message does not follow the contract.
        """
        frame, data = parse_frame(message)
        if frame.WhichOneof("frame") != "grouped":
            self._receive(frame, data)
        else:
            for one in frame.grouped.frames:
                self._receive(one, one.chunk.data)
        yield from self.ready()

    def _receive(self, frame: pb.EncodeStreamResponse, data: Buffer) -> None:
        try:
            request = self._in_flight[frame.request_id]
            match frame.WhichOneof("frame"):
                case "header":
                    request.landings[frame.header.input_index] = Landing(
                        frame.header.result, self._memory, self._asked
                    )
                case "chunk":
                    request.landings[frame.chunk.input_index].land(frame.chunk, data)
                case "end" if frame.end.status.code:
                    self._end_badly(request, errors.from_status(frame.end.status, request.first))
                case "end":
                    self._complete(request, decode_timing(frame.end.timing))
                case "whole":
                    self._complete_whole(request, frame.whole)
                case _:
                    raise ValueError("it is empty")
        except (KeyError, IndexError, ValueError) as error:
            text = f"the server sent a frame that does not follow the contract: {error}"
            raise errors.InternalError(text) from error

    def _end_badly(self, request: _Request, error: LayertapError) -> None:
        """Handles a request that failed as a whole. It is sent again, after a delay or in parts; or the error
        belongs to its only input; or the error ends the stream."""
        request.landings.clear()
        if self._locate is not None:
            self._locate(error)
        if isinstance(error, errors.ResourceExhausted) and error.retry_after_s is not None:
            delay_s = error.retry_after_s * (1 + _BUSY_SPREAD * random.random())
            request.busy_s += delay_s
            if request.busy_s <= MAX_BUSY_S:
                self._refused.append((delay_s, request.message))
                num_refused = sum(one.num_inputs for one in self._in_flight.values() if one.busy_s)
                self._max_inputs_in_flight = max(self._num_in_flight - num_refused, 1)
                return
        elif errors.is_of_one_input(error):
            if request.num_inputs > 1:
                self._split(request)
            else:
                error.input_index = request.first
                self._end(request, [error])
            return
        self._take_out(request)
        self._end_with((request.whole or request).first, error)

    def _split(self, request: _Request) -> None:
        """Sends each input of the request in a request of its own. This is needed if the server does not
        support `fail_each_alone` and one input fails, or if the results together are too large."""
        self._take_out(request)
        for index, one in enumerate(request.message.request.inputs, request.first):
            part = _Request(index, 1, self._message([one]), self._take_lane(1), whole=request)
            request.parts.append(part)
            self._in_flight[part.message.request_id] = part
            self._refused.append((0.0, part.message))

    def take_refused(self) -> list[tuple[float, pb.EncodeStreamRequest]]:
        """The messages to send again, each with the seconds to wait before that."""
        refused, self._refused = self._refused, []
        return refused

    def _complete(self, request: _Request, timing: Timing) -> None:
        landings = [request.landings[index] for index in range(request.num_inputs)]
        outcomes = [landing.outcome(timing, index) for index, landing in enumerate(landings, request.first)]
        for landing in landings:
            # The estimate rises at once and falls slowly: after a small result, the next may be large.
            size = max(1, landing.num_bytes)
            self._expected_bytes = max(size, self._expected_bytes // 2)
        request.landings.clear()
        self._end(request, outcomes)

    def _complete_whole(self, request: _Request, reply: pb.EncodeResponse) -> None:
        if len(reply.results) != request.num_inputs:
            raise ValueError(f"{len(reply.results)} results for {request.num_inputs} inputs")
        size = max(1, reply.ByteSize() // request.num_inputs)
        self._expected_bytes = max(size, self._expected_bytes // 2)
        self._end(request, decode_results(reply, request.first, self._asked))

    def _end(self, request: _Request, outcomes: list[Result | LayertapError]) -> None:
        self._take_out(request)
        self._max_inputs_in_flight = min(
            self._max_inputs_in_flight + request.num_inputs, MAX_INPUTS_IN_FLIGHT
        )
        request.outcomes = outcomes
        whole = request.whole or request
        if all(part.outcomes is not None for part in whole.parts):
            if whole.parts:
                whole.outcomes = [outcome for part in whole.parts for outcome in part.outcomes or ()]
            self._complete_requests.append(whole)
        if not self._returns_errors:
            for index, outcome in enumerate(outcomes, request.first):
                if isinstance(outcome, LayertapError):
                    self._end_with(index, outcome)

    def ready(self) -> Iterator[tuple[int, Result | LayertapError]]:
        """Yields the results that can be handed out now, as (index, result).

        Raises:
            Exception: the error that ends the stream, after all earlier results.
        """
        while (request := self._next_ready()) is not None:
            del self._requests[request.first]
            for index, outcome in enumerate(request.outcomes or (), request.first):
                self._num_in_flight -= 1
                if (not isinstance(outcome, LayertapError) or self._returns_errors) and not (
                    self._ordered and self._is_past_the_end(index)
                ):
                    yield index, outcome
        end = self._failure
        if end is not None and not any(first < end.index for first in self._requests):
            raise end.error

    def _next_ready(self) -> _Request | None:
        if not self._ordered:
            return self._complete_requests.popleft() if self._complete_requests else None
        self._complete_requests.clear()
        request = next(iter(self._requests.values()), None)
        if request is None or request.outcomes is None or self._is_past_the_end(request.first):
            return None
        return request

    def _is_past_the_end(self, index: int) -> bool:
        return self._failure is not None and index >= self._failure.index

    def finish(self) -> None:
        """Must be called at the end of the stream. Raises InternalError if a request was not answered."""
        if self._requests:
            raise errors.InternalError(
                f"the server ended the stream with {len(self._requests)} requests unanswered"
            )

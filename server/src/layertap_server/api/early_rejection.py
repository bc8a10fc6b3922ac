"""While calls are refused for load, a first look at each one that comes, on gRPC's own thread.

Above capacity most are told no, hundreds of times a second. So it takes the event loop no wake-up, and
them no wait for it; and who has to wait for long anyway may wait for company first.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

import grpc

from layertap.v1 import encoder_pb2 as pb
from layertap_server.api.parsing import LARGE_REQUEST_BYTES, parse
from layertap_server.api.service import EncoderService, Phase, deadline_of, refusal
from layertap_server.api.validation import known_enum
from layertap_server.errors import RequestError
from layertap_server.rpc.call import Call, Refusal
from layertap_server.scheduling.fair_queue import Priority

# The part of a call's wait that it may spend waiting for company, and how long at most.
BATCHING_SHARE, MAX_BATCHING_S = 1 / 16, 0.05
# That a deadline is out of reach holds for whoever asks for the same: for the first part of the wait, and with no more
# time left, give or take the last part of it. Predictions err by more.
CACHED_SHARE, MAX_CACHED_S, LEFT_SHARE = 1 / 16, 0.05, 1 / 64
MAX_CACHED = 256

# What a wait depends on: model, type on the wire, outputs, priority and client.
Asked = tuple[str, int, bytes, int, str]


@dataclass(frozen=True, slots=True)
class CachedRejection:
    """What those who have at most so many seconds left are told until then, by the monotonic clock."""

    refusal: Refusal
    max_left_s: float
    until_s: float


class EarlyRejection:
    """At `Encode` calls; on gRPC's thread only."""

    def __init__(self, service: EncoderService) -> None:
        self._service = service
        # How many calls wait for company, by model, priority and client.
        self._held: defaultdict[str, Counter[tuple[Priority, str]]] = defaultdict(Counter)
        self._cached: dict[Asked, CachedRejection] = {}

    def __call__(self, data: bytes, call: Call, num_held: int) -> Refusal | float:
        """A refusal, or for how many seconds the call may wait for company, beside so many that do."""
        service = self._service
        if not service.is_overloaded or service.phase is not Phase.SERVING or len(data) > LARGE_REQUEST_BYTES:
            return 0.0
        try:
            client = service.client_of(call)
            request = parse(pb.EncodeRequest, data)
            if not request.inputs:
                return 0.0
            outputs = request.outputs.SerializeToString()
            asked = request.model, request.wire_dtype, outputs, request.priority, client.name
            model = service.model_for(request.model, client)
            if not model.scheduler.is_idle and (told := self._cached_for(asked, call)):
                return told
            if not num_held:  # all have begun
                self._held.clear()
            priority = known_enum(Priority, request.priority, Priority.NORMAL, "priority")
            pending, deadline_ns = self._held[model.facts.name], deadline_of(call)
            wait_ns = service.answering.check(model, request, priority, client.name, deadline_ns, pending)
        except RequestError as error:
            if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                return 0.0  # told on the usual way
            service.bandwidth.note_call()
            service.count_refusal(error)
            told = refusal(error)
            if error.reason == "DEADLINE_UNREACHABLE":
                self._keep(asked, call, told, error.retry_after_s or 0.0)
            return told
        if not 0 < wait_ns < math.inf:
            return 0.0
        pending[priority, client.name] += 1
        return min(wait_ns / 1e9 * BATCHING_SHARE, MAX_BATCHING_S)

    def _cached_for(self, asked: Asked, call: Call) -> Refusal | None:
        """What another was told just now, where it holds for this call too."""
        cached = self._cached.get(asked)
        if cached is None or time.monotonic() > cached.until_s:
            return None
        left_s = call.time_remaining()
        if left_s is None or left_s > cached.max_left_s:
            return None
        self._service.bandwidth.note_call()
        self._service.count_refused("DEADLINE_UNREACHABLE")
        return cached.refusal

    def _keep(self, asked: Asked, call: Call, told: Refusal, wait_s: float) -> None:
        left_s = call.time_remaining()
        assert left_s is not None
        if len(self._cached) >= MAX_CACHED:
            self._cached.clear()
        until_s = time.monotonic() + min(wait_s * CACHED_SHARE, MAX_CACHED_S)
        self._cached[asked] = CachedRejection(told, left_s + min(wait_s * LEFT_SHARE, MAX_CACHED_S), until_s)

"""Checks `Encode` calls on gRPC's thread, before the event loop, while the server refuses calls for load.

Above capacity the server refuses most calls, hundreds a second. A refusal from here needs no wake-up of the
event loop, and its caller does not wait for the loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from layertap.v1 import encoder_pb2 as pb
from layertap_server.api.field_values import known_enum
from layertap_server.api.parsing import LARGE_REQUEST_BYTES, parse
from layertap_server.api.service import EncoderService, Phase, deadline_of, refusal
from layertap_server.errors import Refusal, RequestError
from layertap_server.scheduling.fair_queue import Priority

if TYPE_CHECKING:  # it uses private names of gRPC, which a version may lack
    from layertap_server.rpc.call import Call

# A refusal for an unreachable deadline is repeated to calls that ask for the same. It is kept for
# `CACHED_SHARE` of the predicted wait, `MAX_CACHED_S` at most, and applies to calls with no more time left
# than the refused one had, plus `LEFT_SHARE` of the predicted wait, again `MAX_CACHED_S` at most. Predictions
# of the wait are less accurate than that.
CACHED_SHARE, MAX_CACHED_S, LEFT_SHARE = 1 / 16, 0.05, 1 / 64
MAX_CACHED = 256

# What a predicted wait depends on: model, `wire_dtype`, serialized `outputs`, priority and client name.
Asked = tuple[str, int, bytes, int, str]


@dataclass(frozen=True, slots=True)
class CachedRejection:
    """A refusal for calls with at most `max_left_s` to their deadline; valid until `until_s` (monotonic)."""

    refusal: Refusal
    max_left_s: float
    until_s: float


class EarlyRejection:
    """The `EarlyCheck` of `Encode` calls. Used on gRPC's thread only.

    At three times capacity it halves a refusal's processor time, from 413 to 189 µs; without the cached
    rejections it is 263 µs (`make bench-mechanisms`).
    """

    def __init__(self, service: EncoderService) -> None:
        self._service = service
        self._cached: dict[Asked, CachedRejection] = {}

    def __call__(self, data: bytes, call: Call) -> Refusal | None:
        """The refusal of a call that is certain to be refused for load; None for any other."""
        service = self._service
        if not service.is_overloaded or service.phase is not Phase.SERVING or len(data) > LARGE_REQUEST_BYTES:
            return None
        try:
            client = service.client_of(call)
            request = parse(pb.EncodeRequest, data)
            if not request.inputs:
                return None
            outputs = request.outputs.SerializeToString()
            asked = request.model, request.wire_dtype, outputs, request.priority, client.name
            model = service.model_for(request.model, client)
            if not model.is_idle and (told := self._cached_for(asked, call)):
                return told
            priority = known_enum(Priority, request.priority, Priority.NORMAL, "priority")
            service.answering.check(model, request, priority, client.name, deadline_of(call))
        except RequestError as error:
            if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                return None  # the handler runs into the same error and reports it
            service.bandwidth.note_call()
            service.count_refusal(error)
            told = refusal(error)
            if error.reason == "DEADLINE_UNREACHABLE":
                self._keep(asked, call, told, error.retry_after_s or 0.0)
            return told
        return None

    def _cached_for(self, asked: Asked, call: Call) -> Refusal | None:
        """The refusal of a recent call that asked for the same, if it applies to this call too."""
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

"""The errors of requests, as a gRPC status with google.rpc details.

There is one constructor for each row of the documented error table, and every status that a caller may get is
made here. The module uses no type of the engine or the scheduler.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "layertap"
# Limits of single texts in an error, as UTF-8. Within them, a status stays well below the limit of a header.
MAX_MESSAGE_BYTES, MAX_FIELD_BYTES, MAX_NAME_BYTES = 768, 256, 192
CUT_MARK = " […] "

logger = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S")
# A status that ends a call: code, details, trailing metadata.
Refusal = tuple[grpc.StatusCode, str, Sequence[tuple[str, Any]]]
FieldViolation = tuple[str, str]  # (field path as in the contract, description with the remedy)


class RequestError(Exception):
    """The error of a request that gets no result, with everything that its caller is told."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.code = code
        self.reason = reason
        # Shortened here, since many messages contain names that callers chose. A status travels in headers of
        # at most 8 KiB: its message percent-encoded, as three bytes for each that is not ASCII, and once more
        # in the details, base64-encoded, as four bytes for three.
        self.message = shortened(message, MAX_MESSAGE_BYTES)
        super().__init__(self.message)
        self.violations = tuple(
            (shortened(field, MAX_FIELD_BYTES), shortened(description, MAX_MESSAGE_BYTES))
            for field, description in violations
        )
        self.retry_after_s = retry_after_s
        self.metadata = {key: shortened(value, MAX_FIELD_BYTES) for key, value in (metadata or {}).items()}

    def to_status(self) -> status_pb2.Status:
        """The google.rpc.Status: always with ErrorInfo; with BadRequest and RetryInfo where they apply."""
        details = [error_info(self.reason, self.metadata) if self.metadata else bare_error_info(self.reason)]
        if self.violations:
            details.append(
                packed(
                    error_details_pb2.BadRequest(
                        field_violations=[
                            error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
                            for field, description in self.violations
                        ]
                    )
                )
            )
        if self.retry_after_s is not None:
            seconds, nanos = divmod(int(self.retry_after_s * 1e9), 10**9)
            delay = duration_pb2.Duration(seconds=seconds, nanos=nanos)
            details.append(packed(error_details_pb2.RetryInfo(retry_delay=delay)))
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=details)


def shortened(text: str, max_bytes: int) -> str:
    """The text, or its beginning and its end if it has more than `max_bytes` bytes as UTF-8."""
    if len(text) * 4 <= max_bytes or len(data := text.encode(errors="replace")) <= max_bytes:
        return text
    kept = (max_bytes - len(CUT_MARK.encode())) // 2
    begin, end = data[:kept].decode(errors="ignore"), data[-kept:].decode(errors="ignore")
    return begin + CUT_MARK + end


def quoted(name: str) -> str:
    """A name that a caller chose, in quotes, shortened to leave room for the rest of the message."""
    return f"'{shortened(name, MAX_NAME_BYTES)}'"


def listed(names: Iterable[str]) -> str:
    """The names in quotes; of many, the first that fit into `MAX_NAME_BYTES`, and how many others."""
    all_names = list(names)
    shown: list[str] = []
    for name in all_names:
        if sum(map(len, shown)) + len(name.encode(errors="replace")) > MAX_NAME_BYTES and shown:
            return f"{', '.join(shown)} and {len(all_names) - len(shown)} more"
        shown.append(quoted(name))
    return ", ".join(shown)


def packed(detail: Message) -> any_pb2.Any:
    """As `Any.Pack`, in a third of the time: above capacity, hundreds of requests a second are refused."""
    return any_pb2.Any(
        type_url="type.googleapis.com/" + detail.DESCRIPTOR.full_name, value=detail.SerializeToString()
    )


def error_info(reason: str, metadata: Mapping[str, str]) -> any_pb2.Any:
    return packed(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))


@lru_cache(maxsize=64)
def bare_error_info(reason: str) -> any_pb2.Any:
    """Cached: the message is shared by all errors with this reason, so do not modify it."""
    return error_info(reason, {})


def invalid_argument(field: str, description: str, *, reason: str) -> RequestError:
    """Bad input; `field` is its path in the contract, such as `inputs[3].text`."""
    return RequestError(
        grpc.StatusCode.INVALID_ARGUMENT,
        reason,
        f"{field}: {description}",
        violations=[(field, description)],
    )


def too_many_inputs(max_inputs: int) -> RequestError:
    return invalid_argument(
        "inputs",
        f"there are more than {max_inputs}, the limit for one request; split the request",
        reason="TOO_MANY_INPUTS",
    )


def malformed(message: str) -> RequestError:
    """The bytes of a request are not a valid protobuf message of the contract."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST", message)


def model_not_found(name: str, known: Sequence[str]) -> RequestError:
    message = f"no model named {quoted(name)} is served; available models: {listed(known) or 'none'}"
    return RequestError(
        grpc.StatusCode.NOT_FOUND,
        "MODEL_NOT_FOUND",
        message,
        metadata={"model": name, "served": ",".join(known)},
    )


def conflicting(field: str, message: str) -> RequestError:
    """Two fields of a request exclude each other; `field` is one of them."""
    return invalid_argument(field, message, reason="CONFLICTING_FIELDS")


def output_unavailable(reason: str, field: str, message: str) -> RequestError:
    """The model has no such output: NO_POOLER, NO_ATTENTIONS, NO_OFFSETS, NO_HEAD, NO_SPARSE, NO_CONTACTS."""
    return RequestError(grpc.StatusCode.FAILED_PRECONDITION, reason, message, violations=[(field, message)])


def reply_too_large(num_bytes: int, limit_bytes: int, *, streamed: bool) -> RequestError:
    """The reply is over its limit. Its exact size is known before anything is computed."""
    if streamed:
        reason, limit = "RESULT_TOO_LARGE", "max_result_bytes"
        remedy = "request fewer inputs, layers, heads or rows, or a smaller wire_dtype"
    else:
        reason, limit = "REPLY_TOO_LARGE", "max_message_bytes"
        remedy = "use EncodeStream, fewer outputs or a smaller wire_dtype"
    return RequestError(
        grpc.StatusCode.OUT_OF_RANGE,
        reason,
        f"the reply would be {num_bytes} bytes, over the limit of {limit_bytes} ({limit}); {remedy}",
        metadata={"reply_bytes": str(num_bytes), "limit_bytes": str(limit_bytes)},
    )


def overloaded(reason: str, message: str, retry_after_s: float) -> RequestError:
    """QUEUE_FULL, RESULT_BYTES_FULL, DEADLINE_UNREACHABLE."""
    return RequestError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message, retry_after_s=max(retry_after_s, 0.001)
    )


def out_of_memory(num_tokens: int, result_bytes: int) -> RequestError:
    """One input that does not fit into memory even alone."""
    return RequestError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "OUT_OF_MEMORY",
        f"an input of {num_tokens} tokens with a result of {result_bytes} bytes does not fit into the device's "
        "memory, even alone in a batch; request fewer attention layers, heads or rows, fewer hidden states, or shorten it",
        metadata={"input_tokens": str(num_tokens), "result_bytes": str(result_bytes)},
    )


def deadline_exceeded() -> RequestError:
    return RequestError(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE_EXCEEDED",
        "the deadline passed while the request was queued; nothing was computed",
    )


def unavailable(reason: str, message: str, retry_after_s: float) -> RequestError:
    """LOADING, DRAINING, ENGINE_DOWN."""
    return RequestError(grpc.StatusCode.UNAVAILABLE, reason, message, retry_after_s=retry_after_s)


def draining() -> RequestError:
    return unavailable("DRAINING", "the server is shutting down; try another", 1.0)


def unauthenticated(reason: str, message: str) -> RequestError:
    """MISSING_CREDENTIALS, INVALID_CREDENTIALS."""
    return RequestError(grpc.StatusCode.UNAUTHENTICATED, reason, message)


def permission_denied(reason: str, message: str) -> RequestError:
    """MODEL_NOT_ALLOWED."""
    return RequestError(grpc.StatusCode.PERMISSION_DENIED, reason, message)


def internal(cause: BaseException) -> RequestError:
    """An unexpected error: the caller gets an id, and the log gets the exception under the same id."""
    error_id = secrets.token_hex(8)
    logger.error("internal error %s", error_id, exc_info=cause)
    return RequestError(
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        f"internal error {error_id}; the server's log has the details",
        metadata={"error_id": error_id},
    )


def as_request_error(error: BaseException) -> RequestError:
    return error if isinstance(error, RequestError) else internal(error)


def kept(function: Callable[[int, S], T]) -> Callable[[int, S], T | RequestError]:
    """Wraps `function` to return the `RequestError` that it raises for an item, in place of a result."""

    def call(index: int, item: S) -> T | RequestError:
        try:
            return function(index, item)
        except RequestError as error:
            return error.with_traceback(None)  # the traceback would keep the item alive

    return call

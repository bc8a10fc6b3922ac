"""The exceptions of the SDK, and the one place where gRPC statuses become them.

LayertapError
├── InvalidArgument       a field of the request is wrong: see `violations`
├── NotFound              no such model
├── FailedPrecondition    the model has no such output
├── OutOfRange            the result is over the server's limits
├── ResourceExhausted     the server is busy: see `retry_after_s`
├── DeadlineExceeded      the timeout passed
├── Unavailable           no server answers, or it is loading or shutting down
├── Unauthenticated       no credentials, or wrong ones
├── PermissionDenied      this caller may not use that model
├── Cancelled             the call was cancelled
└── InternalError         the server's fault, or an answer that does not follow the contract
"""

# ruff: noqa: N818  (the names are those of the gRPC codes)
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class LayertapError(Exception):
    """A call that the server, or the way to it, answered with an error.

    `code` is the gRPC status, `reason` the server's constant name for the cause (UPPER_SNAKE, empty
    when it gave none), `violations` pairs of a request field and what is wrong with it,
    `retry_after_s` how long the server asks to wait before another try (None: it does not ask for
    one), `metadata` further facts by name.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        violations: tuple[tuple[str, str], ...] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.reason = reason
        self.violations = violations
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        # A server may have put the description into the message already.
        more = (f"  {field}: {text}" for field, text in self.violations if text not in self.message)
        return "\n".join([self.message, *more])


class InvalidArgument(LayertapError):
    """A field of the request is wrong; `violations` names each."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(LayertapError):
    """The server has no model of that name."""

    code = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(LayertapError):
    """The model has no such output: no pooler, or no attentions."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class OutOfRange(LayertapError):
    """The result is over the server's limits."""

    code = grpc.StatusCode.OUT_OF_RANGE


class ResourceExhausted(LayertapError):
    """The server takes no more work now; `retry_after_s` says when to come again."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(LayertapError):
    """The timeout passed before the answer came."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unavailable(LayertapError):
    """No server answers at the address, or it is loading or shutting down."""

    code = grpc.StatusCode.UNAVAILABLE


class Unauthenticated(LayertapError):
    """The server wants credentials, and got none or wrong ones."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(LayertapError):
    """The server knows the caller, who may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Cancelled(LayertapError):
    """The call was cancelled before its answer came."""

    code = grpc.StatusCode.CANCELLED


class InternalError(LayertapError):
    """The server failed, or its answer does not follow the contract."""

    code = grpc.StatusCode.INTERNAL


_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_CLASSES: dict[grpc.StatusCode, type[LayertapError]] = {
    kind.code: kind for kind in LayertapError.__subclasses__()
}


def from_status(status: status_pb2.Status, first_input: int = 0) -> LayertapError:
    """The exception for a google.rpc.Status with a code other than OK.

    `first_input` is the index, among the caller's inputs, of the request's first one: the server
    counts `inputs[i]` within the request.
    """

    def recount(text: str) -> str:
        return re.sub(r"\binputs\[(\d+)\]", lambda found: f"inputs[{int(found[1]) + first_input}]", text)

    info, request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for message in (info, request, retry):
            detail.Unpack(message)
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _CLASSES.get(code, LayertapError)(
        recount(status.message) or code.name,
        code=code,
        reason=info.reason,
        violations=tuple((recount(one.field), one.description) for one in request.field_violations),
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        metadata=info.metadata,
    )


def from_rpc_error(error: grpc.RpcError) -> LayertapError:
    """The exception for what a call of grpc or grpc.aio raised."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                status.ParseFromString(value)
            except DecodeError:
                status.Clear()
    # What the transport says decides; the details only add to it.
    status.code, status.message = error.code().value[0], error.details() or status.message
    return from_status(status)


@contextmanager
def transport_errors() -> Iterator[None]:
    """Turns every gRPC error raised inside into a LayertapError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error

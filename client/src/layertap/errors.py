"""The exceptions of the SDK, and their creation from gRPC statuses.

LayertapError
├── InvalidArgument       a field of the request is wrong: see `violations`
├── NotFound              the server has no such model
├── FailedPrecondition    the model has no such output
├── OutOfRange            the result exceeds the server's limits
├── ResourceExhausted     the server is busy: see `retry_after_s`
├── DeadlineExceeded      the timeout passed
├── Unavailable           no server answers, or it is loading or shutting down
├── Unauthenticated       the credentials are missing or wrong
├── PermissionDenied      this client may not use that model
├── Cancelled             the call was cancelled
└── InternalError         the server failed, or its answer does not follow the contract
"""

# ruff: noqa: N818  (the names are those of the gRPC codes)
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from layertap._results import Result

_DETAILS_KEY = "grpc-status-details-bin"
_INPUT = re.compile(r"\binputs\[(\d+)\]")


class LayertapError(Exception):
    """A call that failed, in the server or on the way to it.

    `code` is the gRPC status code. `reason` is the server's constant for the cause, in UPPER_SNAKE (empty if
    it gave none). `violations` are pairs of a request field and what is wrong with it. `retry_after_s` is
    the delay in seconds after which the server suggests another attempt (None: it suggests none).
    `metadata` has further details by name.

    `input_index` is the index, from 0, of the input that failed among the caller's inputs; None if the error
    does not belong to one input. `results` has the results of the same `encode` call that were received
    before it failed, by index.
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
        input_index: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.reason = reason
        self.violations = violations
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})
        self.input_index = input_index
        self.results: dict[int, Result] = {}

    def __str__(self) -> str:
        # The server's message may already contain the description.
        more = (f"  {field}: {text}" for field, text in self.violations if text not in self.message)
        text = "\n".join([self.message, *more])
        if self.input_index is None or f"inputs[{self.input_index}]" in text:
            return text
        return f"inputs[{self.input_index}]: {text}"


class InvalidArgument(LayertapError):
    """A field of the request is wrong; `violations` names each."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(LayertapError):
    """The server has no model of this name."""

    code = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(LayertapError):
    """The model has no such output, for example no pooler or no attentions."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class OutOfRange(LayertapError):
    """The result exceeds the server's limits."""

    code = grpc.StatusCode.OUT_OF_RANGE


class ResourceExhausted(LayertapError):
    """The server is busy; `retry_after_s` says when to try again."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(LayertapError):
    """The timeout passed before the answer arrived."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unavailable(LayertapError):
    """No server answers at the address, or it is loading or shutting down."""

    code = grpc.StatusCode.UNAVAILABLE


class Unauthenticated(LayertapError):
    """The server requires credentials, and they are missing or wrong."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(LayertapError):
    """The client is authenticated, but has no permission for this call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Cancelled(LayertapError):
    """The call was cancelled before its answer arrived."""

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

    `first_input` is the index of the request's first input among the caller's inputs. The server counts
    `inputs[i]` within the request; the exception counts among the caller's inputs.
    """
    return _from_status(status, lambda index: index + first_input)


def of_input(status: status_pb2.Status, index: int) -> LayertapError:
    """The exception for the status of one input, with the index `index` among the caller's inputs.

    Every `inputs[i]` in its texts refers to this input, and is renumbered.
    """
    error = _from_status(status, lambda _: index)
    error.input_index = index
    return error


def _from_status(status: status_pb2.Status, number: Callable[[int], int]) -> LayertapError:
    def recount(text: str) -> str:
        return _INPUT.sub(lambda found: f"inputs[{number(int(found[1]))}]", text)

    info, request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for message in (info, request, retry):
            detail.Unpack(message)
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    violations = tuple((recount(one.field), one.description) for one in request.field_violations)
    named = [found for field, _ in violations if (found := _INPUT.match(field))]
    return _CLASSES.get(code, LayertapError)(
        recount(status.message) or code.name,
        code=code,
        reason=info.reason,
        violations=violations,
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        metadata=info.metadata,
        input_index=int(named[0][1]) if named else None,
    )


def is_of_one_input(error: LayertapError) -> bool:
    """Whether a single input may have caused the error, so that the others may succeed without it."""
    return (
        error.input_index is not None
        # One input may have caused these too; older servers do not say which one.
        or isinstance(error, OutOfRange | InternalError)
        or error.reason == "OUT_OF_MEMORY"
    )


def is_without_cause(error: LayertapError) -> bool:
    """Whether the deadline passed on the client's side, so that the server may not have been reached."""
    return isinstance(error, DeadlineExceeded) and not error.reason


def from_rpc_error(error: grpc.RpcError, first_input: int = 0) -> LayertapError:
    """The exception for an error of grpc or grpc.aio; `first_input` as in `from_status`."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                status.ParseFromString(value)
            except DecodeError:
                status.Clear()
    # The code and message of the call have precedence over those in the details.
    status.code, status.message = error.code().value[0], error.details() or status.message
    return from_status(status, first_input)


def locate(error: LayertapError, address: str, seconds: float | None, connection: str = "") -> None:
    """Adds the address, the time limit and the reason for a missing connection to the message."""
    if isinstance(error, Unavailable):
        error.message = f"{address}: {error.message}"
    if isinstance(error, DeadlineExceeded):
        after = "" if seconds is None else f" after {seconds:g} s"
        if connection:
            error.message = f"Deadline Exceeded: no connection to {address}{after}: {connection}"
        elif error.reason:
            error.message += f" ({address}{after})"
        else:
            error.message = (
                f"Deadline Exceeded: no answer from {address}{after}; "
                "increase `timeout`, or request less at once"
            )

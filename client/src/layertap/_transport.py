"""One connection to a server: TLS, the bearer token, retries and channel options."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeAlias

import grpc

from layertap import _arguments
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub

PathLike: TypeAlias = "str | os.PathLike[str]"
HealthStatus: TypeAlias = Literal["SERVING", "NOT_SERVING", "UNKNOWN"]

# The standard health service. Its messages have one field each, and are read without generated code: the
# empty request asks for the whole server, and the reply is an enum number with the tag 0x08.
HEALTH_CHECK = "/grpc.health.v1.Health/Check"


def health_status(reply: bytes) -> HealthStatus:
    """The status in a reply of the health service."""
    names: dict[bytes, HealthStatus] = {b"\x08\x01": "SERVING", b"\x08\x02": "NOT_SERVING"}
    return names.get(reply, "UNKNOWN")


_SERVICE = pb.DESCRIPTOR.services_by_name["EncoderService"].full_name
# No RPC of the contract has side effects, so any may be sent again. UNAVAILABLE is the status of a server that
# does not accept work at the moment, and of a call whose connection was lost: that call may have been begun. The
# server's pushback (grpc-retry-pushback-ms) replaces the backoff, or ends the retries.
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": _SERVICE}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


@dataclass(frozen=True, slots=True)
class TLS:
    """The files for a TLS connection, all of them PEM.

    `ca` has the trusted root certificates (None: gRPC's default roots). `certificate` and `key` are this
    client's own, if the server requires a client certificate; give both or neither. `server_name` is the
    name in the server's certificate, if it is not that of the address.

    Raises:
        TypeError, ValueError: an argument has a wrong type, or only one of `certificate` and `key` is given.
    """

    ca: PathLike | None = None
    certificate: PathLike | None = None
    key: PathLike | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        for name in ("ca", "certificate", "key"):
            path = getattr(self, name)
            if path is not None and not isinstance(path, str | os.PathLike):
                raise _arguments.wrong_type(f"TLS.{name}", path, "give the path of a PEM file")
        _arguments.optional_text("TLS.server_name", self.server_name)
        for given, missing in (("certificate", "key"), ("key", "certificate")):
            if getattr(self, given) is not None and getattr(self, missing) is None:
                raise ValueError(f"TLS({given}=…) without {missing}: give both, or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is not PEM or has the wrong content, or the key does not match the certificate.
        """
        contents = {name: _read(name, getattr(self, name)) for name in ("ca", "certificate", "key")}
        import ssl

        # gRPC reports wrong files only when it connects, and aborts the process for some. Python's ssl module
        # is used here to check them first.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Short keys are not rejected here: whether a key is long enough is decided when connecting.
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        if contents["ca"] is not None:
            _check_pem("ca", self.ca, contents["ca"], _CERTIFICATE)
            try:
                context.load_verify_locations(self.ca)
            except ssl.SSLError as error:
                raise ValueError(f"TLS.ca: {self.ca} has no readable certificate: {error}") from error
        if (
            contents["certificate"] is not None
            and self.certificate is not None
            and contents["key"] is not None
        ):
            _check_pem("certificate", self.certificate, contents["certificate"], _CERTIFICATE)
            _check_pem("key", self.key, contents["key"], _KEY)
            try:
                context.load_cert_chain(self.certificate, self.key, password=_no_password)
            except ssl.SSLError as error:
                text = f"TLS.key: {self.key} does not belong to {self.certificate}, or one of them is damaged"
                raise ValueError(f"{text}: {error}") from error
        return grpc.ssl_channel_credentials(
            contents["ca"], private_key=contents["key"], certificate_chain=contents["certificate"]
        )


_CERTIFICATE = ("-----BEGIN CERTIFICATE-----", "-----BEGIN TRUSTED CERTIFICATE-----")
_KEY = tuple(f"-----BEGIN {kind}PRIVATE KEY-----" for kind in ("", "RSA ", "EC ", "ENCRYPTED "))


def _read(name: str, path: PathLike | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise type(error)(error.errno, f"TLS.{name}: {error.strerror}", str(path)) from error


def _check_pem(name: str, path: PathLike | None, content: bytes, begins: tuple[str, ...]) -> None:
    if not any(begin.encode() in content for begin in begins):
        raise ValueError(f"TLS.{name}: {path} is not a PEM file with {begins[0]!r}")


def _no_password() -> str:
    raise ValueError("TLS.key is encrypted: gRPC needs a key without a passphrase")


TLSLike: TypeAlias = "TLS | grpc.ChannelCredentials | bool | None"


def credentials(tls: TLSLike) -> grpc.ChannelCredentials | None:
    """The channel credentials; None for a connection without TLS."""
    if tls is None or tls is False:
        return None
    if tls is True:
        return TLS().credentials()
    if isinstance(tls, TLS):
        return tls.credentials()
    if not isinstance(tls, grpc.ChannelCredentials):
        raise _arguments.wrong_type("tls", tls, "give True, a TLS or gRPC channel credentials")
    return tls


def channel_options(tls: TLSLike, max_message_bytes: int | None) -> list[tuple[str, Any]]:
    """Options for a channel of grpc or grpc.aio. Without `max_message_bytes`, replies have no limit."""
    max_message_bytes = _arguments.max_message_bytes(max_message_bytes)
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", _SERVICE_CONFIG),
        ("grpc.max_receive_message_length", -1 if max_message_bytes is None else max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # The largest HTTP/2 frame from the server. gRPC's default of 16 KiB costs both sides more CPU time.
        ("grpc.http2.max_frame_size", 256 << 10),
        # By default a stream has no deadline: pings detect a server that is gone. gRPC servers close the
        # connection of clients that ping more often than every five minutes.
        ("grpc.keepalive_time_ms", 330_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # gRPC's default is two minutes: a server that is back would be noticed that late.
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # By default, channels with equal options share one connection.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if isinstance(tls, TLS) and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of every call."""
    token = _arguments.token(token)
    return () if token is None else (("authorization", f"Bearer {token}"),)


def stub_of(channel: Any) -> Any:
    """The service's stub on a channel of grpc or grpc.aio. Encode and EncodeStream return serialized replies,
    which `_wire` parses."""
    stub: Any = EncoderServiceStub(channel)  # type: ignore[no-untyped-call]
    stub.Encode = channel.unary_unary(
        f"/{_SERVICE}/Encode", request_serializer=pb.EncodeRequest.SerializeToString
    )
    stub.EncodeStream = channel.stream_stream(
        f"/{_SERVICE}/EncodeStream", request_serializer=pb.EncodeStreamRequest.SerializeToString
    )
    return stub


class TimeLimit:
    """The time limit of a call, shared by all messages that it needs; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end_s = None if seconds is None else time.monotonic() + seconds

    @property
    def left_s(self) -> float | None:
        """The remaining seconds. With 0, gRPC answers DEADLINE_EXCEEDED."""
        return None if self._end_s is None else max(self._end_s - time.monotonic(), 0.0)


# A method outside of the service, so that the retry policy does not apply: without a connection, it fails at
# once, with the reason.
_PROBE = "/layertap.Probe/Probe"
_PROBE_S = 0.1


def connection_failure(channel: grpc.Channel) -> str:
    """Why this channel has no connection; empty if it has one, or is still connecting.

    The error of a call whose time limit passes during a retry does not say this.
    """
    states: SimpleQueue[grpc.ChannelConnectivity] = SimpleQueue()
    put = states.put
    with suppress(Empty, ValueError):  # a closed channel
        channel.subscribe(put)
        try:
            state = states.get(timeout=_PROBE_S)
        finally:
            channel.unsubscribe(put)
        if state is not grpc.ChannelConnectivity.READY:
            try:
                channel.unary_unary(_PROBE)(b"", timeout=_PROBE_S)
            except grpc.RpcError as error:
                return _reason(error)
    return ""


async def aio_connection_failure(channel: grpc.aio.Channel) -> str:
    """As `connection_failure`, for a channel of grpc.aio."""
    if channel.get_state() is not grpc.ChannelConnectivity.READY:
        try:
            await channel.unary_unary(_PROBE)(b"", timeout=_PROBE_S)
        except grpc.RpcError as error:
            return _reason(error)
    return ""


def _reason(error: Any) -> str:
    return error.details() or "" if error.code() is grpc.StatusCode.UNAVAILABLE else ""

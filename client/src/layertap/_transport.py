"""How to reach a server: TLS, the bearer token, retries and the channel's options."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

import grpc

from layertap import _arguments
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub

PathLike: TypeAlias = "str | os.PathLike[str]"

_SERVICE = pb.DESCRIPTOR.services_by_name["EncoderService"].full_name
# Every RPC of the contract may be sent twice; UNAVAILABLE alone promises that nothing was begun.
# The server's pushback (grpc-retry-pushback-ms) replaces the backoff, or ends the tries.
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
    """How to secure the connection; every file is PEM.

    `ca`: who signs servers (None: the roots that gRPC brings). `certificate` and `key`: this client's
    own, where the server demands one; both or neither. `server_name`: the name to expect in the
    server's certificate, where it is not the address's.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or `certificate` and `key` do not come
            together.
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
        """The files, read.

        Raises:
            OSError: one cannot be read.
            ValueError: one is no PEM, or holds something else, or the key is not the certificate's.
        """
        contents = {name: _read(name, getattr(self, name)) for name in ("ca", "certificate", "key")}
        import ssl

        # gRPC finds faults only when it connects, and ends the process at some; Python's own TLS says them.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Whether keys are long enough is for the two that connect to say.
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        if contents["ca"] is not None:
            _check_pem("ca", self.ca, contents["ca"], _CERTIFICATE)
            try:
                context.load_verify_locations(self.ca)
            except ssl.SSLError as error:
                raise ValueError(
                    f"TLS.ca: {self.ca} holds no certificate that can be read: {error}"
                ) from error
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
                text = f"TLS.key: {self.key} is not the key of {self.certificate}, or one of them is damaged"
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
        raise ValueError(f"TLS.{name}: {path} is no PEM file with {begins[0]!r} in it")


def _no_password() -> str:
    raise ValueError("TLS.key is encrypted: gRPC reads only a key without a passphrase")


TLSLike: TypeAlias = "TLS | grpc.ChannelCredentials | bool | None"


def credentials(tls: TLSLike) -> grpc.ChannelCredentials | None:
    """The channel's credentials; None for a plain connection."""
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
    """Options for a channel of grpc or grpc.aio; without a limit, what the server sends is accepted."""
    max_message_bytes = _arguments.max_message_bytes(max_message_bytes)
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", _SERVICE_CONFIG),
        ("grpc.max_receive_message_length", -1 if max_message_bytes is None else max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # The largest HTTP/2 frame that the server may send; gRPC's own 16 KiB cost both sides more CPU.
        ("grpc.http2.max_frame_size", 256 << 10),
        # A stream has no deadline by default: pings find out that its peer is gone. gRPC servers
        # hang up on clients that ping more often than every five minutes.
        ("grpc.keepalive_time_ms", 330_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
    if isinstance(tls, TLS) and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What goes along with every call."""
    token = _arguments.token(token)
    return () if token is None else (("authorization", f"Bearer {token}"),)


def stub_of(channel: Any) -> Any:
    """The contract's stub on a channel of grpc or grpc.aio; results arrive as bytes, for `_wire`."""
    stub: Any = EncoderServiceStub(channel)  # type: ignore[no-untyped-call]
    stub.Encode = channel.unary_unary(
        f"/{_SERVICE}/Encode", request_serializer=pb.EncodeRequest.SerializeToString
    )
    stub.EncodeStream = channel.stream_stream(
        f"/{_SERVICE}/EncodeStream", request_serializer=pb.EncodeStreamRequest.SerializeToString
    )
    return stub


class TimeLimit:
    """The time that a call has in all, over the messages that it takes; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end_s = None if seconds is None else time.monotonic() + seconds

    @property
    def left_s(self) -> float | None:
        """What is left of it; gRPC answers DEADLINE_EXCEEDED at 0."""
        return None if self._end_s is None else max(self._end_s - time.monotonic(), 0.0)


# A method that is not the service's: it is not tried again, so that it fails at once, with the reason.
_PROBE = "/layertap.Probe/Probe"
_PROBE_S = 0.1


def connection_failure(channel: grpc.Channel) -> str:
    """Why this channel has no connection; empty where it has one, or is still trying.

    A call whose time is up while it waits for its next try says only that.
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
    """As `connection_failure`, of a channel of grpc.aio."""
    if channel.get_state() is not grpc.ChannelConnectivity.READY:
        try:
            await channel.unary_unary(_PROBE)(b"", timeout=_PROBE_S)
        except grpc.RpcError as error:
            return _reason(error)
    return ""


def _reason(error: Any) -> str:
    return error.details() or "" if error.code() is grpc.StatusCode.UNAVAILABLE else ""

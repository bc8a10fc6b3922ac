"""How to reach a server: TLS, the bearer token, retries and the channel's options."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc

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
    own, where the server demands one. `server_name`: the name to expect in the server's certificate,
    where it is not the address's.
    """

    ca: PathLike | None = None
    certificate: PathLike | None = None
    key: PathLike | None = None
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """The files, read. Raises OSError where one cannot be."""
        ca, certificate, key = (
            None if path is None else Path(path).read_bytes()
            for path in (self.ca, self.certificate, self.key)
        )
        return grpc.ssl_channel_credentials(ca, private_key=key, certificate_chain=certificate)


TLSLike: TypeAlias = "TLS | grpc.ChannelCredentials | bool | None"


def credentials(tls: TLSLike) -> grpc.ChannelCredentials | None:
    """The channel's credentials; None for a plain connection."""
    if tls is None or tls is False:
        return None
    if tls is True:
        return TLS().credentials()
    return tls.credentials() if isinstance(tls, TLS) else tls


def channel_options(tls: TLSLike, max_message_bytes: int | None) -> list[tuple[str, Any]]:
    """Options for a channel of grpc or grpc.aio; without a limit, what the server sends is accepted."""
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

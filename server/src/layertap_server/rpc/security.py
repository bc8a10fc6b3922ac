"""Who may call: TLS credentials for the server, and bearer tokens or certificates for its clients."""

import hashlib
import hmac
import ipaddress
import re
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from layertap_server.config import Config, ConfigError, nearest, read_toml
from layertap_server.errors import permission_denied, quoted, unauthenticated

CLIENT_KEYS = ("token", "token_sha256", "certificate", "models")
# Printable ASCII without spaces: what a header can carry, and no character that is invisible.
TOKEN = re.compile(r"[!-~]+")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Client:
    """A caller. `models` names the models that it may use; None allows all of them."""

    name: str
    models: frozenset[str] | None = None

    def may_use(self, model_name: str) -> bool:
        return self.models is None or model_name in self.models


ANYONE = Client("anyone")


class Guard:
    """Authenticates callers by their bearer tokens, or by the names in their certificates. Tokens are kept as
    hashes, and never logged."""

    def __init__(
        self, clients: Mapping[bytes, Client], certificates: Mapping[str, Client], *, has_certificates: bool
    ) -> None:
        """`clients`: by the SHA-256 digest of their tokens; `certificates`: by a name in their certificate. If
        both are empty, anyone may call. `has_certificates`: whether each client has to show a certificate."""
        self._clients = dict(clients)
        self._certificates = dict(certificates)
        self.has_certificates = has_certificates

    @classmethod
    def open(cls) -> "Guard":
        return cls({}, {}, has_certificates=False)

    @classmethod
    def from_config(cls, config: Config) -> "Guard":
        """Reads the tokens file, if one is configured. Raises `ConfigError`, naming what is wrong in it."""
        has_certificates = bool(config.tls_client_ca)
        if not config.tokens_file:
            return cls({}, {}, has_certificates=has_certificates)
        clients, certificates = _read_clients(config.tokens_file, frozenset(config.models()))
        if certificates and not has_certificates:
            name = next(iter(certificates.values())).name
            raise ConfigError(
                f"tokens_file: clients.{name} in {config.tokens_file} has a certificate, and without "
                "tls_client_ca the server asks for none"
            )
        return cls(clients, certificates, has_certificates=has_certificates)

    def authenticate(
        self, metadata: Iterable[tuple[str, str | bytes]] | None, identities: Sequence[bytes] = ()
    ) -> Client:
        """The client whose token the call carries, or else whose certificate the connection has.

        `identities` are the names in the certificate. Where clients are neither told by tokens nor by
        certificates, it is `ANYONE`, or a client named after its certificate. Raises `RequestError`
        (UNAUTHENTICATED).
        """
        names = [identity.decode(errors="replace") for identity in identities]
        if not (self._clients or self._certificates):
            return Client(names[0]) if names else ANYONE
        presented = [value for key, value in metadata or () if key.lower() == "authorization"]
        if not presented:
            for name in names:
                if name in self._certificates:
                    return self._certificates[name]
            raise unauthenticated(
                "MISSING_CREDENTIALS",
                "credentials are missing; send the metadata 'authorization: Bearer TOKEN'"
                + (", or use a client certificate of a known name" if self._certificates else ""),
            )
        client = self._find(presented[0]) if len(presented) == 1 else None
        if client is None:
            raise unauthenticated(
                "INVALID_CREDENTIALS",
                "the credentials are not valid; send one 'authorization: Bearer TOKEN' with a known token",
            )
        return client

    def authorize(self, client: Client, model_name: str) -> None:
        """Raises `RequestError` (PERMISSION_DENIED) when the client may not use the model."""
        if not client.may_use(model_name):
            raise permission_denied(
                "MODEL_NOT_ALLOWED",
                f"the client {quoted(client.name)} may not use the model {quoted(model_name)}",
            )

    def _find(self, authorization: str | bytes) -> Client | None:
        text = authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization
        scheme, _, token = text.partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = hashlib.sha256(token.strip().encode()).digest()
        found = None
        # Compares with all of them, even after a match, so that the time taken reveals nothing.
        for known, client in self._clients.items():
            if hmac.compare_digest(known, digest):
                found = client
        return found


def server_credentials(config: Config) -> Any | None:
    """`grpc.ServerCredentials` for the configured PEM files; None when TLS is off.

    The files are read again at each new connection, so a renewed certificate needs no restart.
    Raises `ConfigError` when they cannot be used.
    """
    if not config.tls_certificate:
        return None
    _check_tls_files(config)

    def read() -> Any:
        return grpc.ssl_server_certificate_configuration(
            [(Path(config.tls_key).read_bytes(), Path(config.tls_certificate).read_bytes())],
            Path(config.tls_client_ca).read_bytes() if config.tls_client_ca else None,
        )

    def read_if_usable() -> Any | None:
        try:
            _check_tls_files(config)
            return read()
        except (ConfigError, OSError):
            return None  # The files may be half-written: gRPC keeps the certificate it has.

    return grpc.dynamic_ssl_server_credentials(
        read(), read_if_usable, require_client_authentication=bool(config.tls_client_ca)
    )


def exposure_warning(config: Config) -> str | None:
    """The warning to log at start when tokens would be sent over a network unencrypted; None otherwise."""
    if not config.tokens_file or config.tls_certificate or _is_loopback(config.host):
        return None
    return (
        f"bearer tokens are sent unencrypted to {config.host}, so others on the network can read them; "
        "set tls_certificate and tls_key, or listen on 127.0.0.1 behind a proxy that terminates TLS"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _check_tls_files(config: Config) -> None:
    """Has OpenSSL load the files, to report what is wrong with them: gRPC takes any bytes and fails later,
    without giving a reason. Raises `ConfigError`."""
    for name in ("tls_certificate", "tls_key", "tls_client_ca"):
        path = getattr(config, name)
        try:
            if path:
                Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{name}: {path} cannot be read: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a passphrase cannot be used by gRPC either; do not ask for it on the terminal.
        context.load_cert_chain(config.tls_certificate, config.tls_key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"tls_certificate and tls_key: {config.tls_certificate} and {config.tls_key} "
            f"are not a certificate and its key in PEM: {error}"
        ) from None
    if config.tls_client_ca:
        try:
            context.load_verify_locations(config.tls_client_ca)
        except ssl.SSLError as error:
            raise ConfigError(
                f"tls_client_ca: {config.tls_client_ca} has no certificate in PEM: {error}"
            ) from None


def _read_clients(path: str, model_names: frozenset[str]) -> tuple[dict[bytes, Client], dict[str, Client]]:
    """The file's clients by the digest of their token, and by the name in their certificate."""
    content = read_toml("tokens_file", path)
    for key in content:
        if key != "clients":
            raise ConfigError(f"tokens_file: unknown key {key} in {path}; the known one is clients")
    entries = content.get("clients")
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f'tokens_file: {path} has no clients; write [clients.NAME] and token = "…"')
    clients: dict[bytes, Client] = {}
    certificates: dict[str, Client] = {}
    for name, entry in entries.items():
        where = f"tokens_file: clients.{name} in {path}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where} is not a table; write [clients.{name}]")
        client = Client(name, _read_models(where, entry, model_names))
        digest, certificate = _read_digest(where, entry), _read_certificate(where, entry)
        if digest is None and certificate is None:
            raise ConfigError(f"{where} needs one of token, token_sha256 and certificate")
        if digest is not None:
            if digest in clients:
                raise ConfigError(f"{where} has the same token as clients.{clients[digest].name}")
            clients[digest] = client
        if certificate is not None:
            if certificate in certificates:
                raise ConfigError(
                    f"{where} has the same certificate as clients.{certificates[certificate].name}"
                )
            certificates[certificate] = client
    return clients, certificates


def _read_certificate(where: str, entry: Mapping[str, object]) -> str | None:
    name = entry.get("certificate")
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise ConfigError(
            f"{where}: certificate is not text; give a subject alternative name of the client's certificate, or "
            "its common name if it has none"
        )
    return name


def _read_digest(where: str, entry: Mapping[str, object]) -> bytes | None:
    for key in entry:
        if key not in CLIENT_KEYS:
            raise ConfigError(
                f"{where} has an unknown key {key}; the nearest known one is {nearest(key, CLIENT_KEYS)}"
            )
    token, sha256 = entry.get("token"), entry.get("token_sha256")
    if token is not None and sha256 is not None:
        raise ConfigError(f"{where} has token and token_sha256; give one of them")
    if token is None and sha256 is None:
        return None
    if sha256 is not None:
        if not isinstance(sha256, str) or not SHA256.fullmatch(sha256.lower()):
            raise ConfigError(f"{where}: token_sha256 is not 64 hexadecimal digits")
        return bytes.fromhex(sha256)
    if not isinstance(token, str) or not TOKEN.fullmatch(token):
        raise ConfigError(f"{where}: token must be printable ASCII without spaces")
    return hashlib.sha256(token.encode()).digest()


def _read_models(
    where: str, entry: Mapping[str, object], model_names: frozenset[str]
) -> frozenset[str] | None:
    models = entry.get("models")
    if models is None:
        return None
    if not isinstance(models, list) or not models or not all(isinstance(name, str) for name in models):
        raise ConfigError(f"{where}: models is not a list of model names")
    for name in models:
        if name not in model_names:
            raise ConfigError(
                f"{where}: no model {name} is served; the nearest is {nearest(name, model_names)}"
            )
    return frozenset(models)

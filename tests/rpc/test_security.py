"""TLS and bearer tokens: what is accepted, what is refused, and with which reason."""

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from layertap_server.config import Config, ConfigError
from layertap_server.errors import RequestError
from layertap_server.rpc.choice import create_server
from layertap_server.rpc.security import Client, Guard, exposure_warning, server_credentials

MODELS = ("a=one", "b=two")
TOKENS = f"""
[clients.search]
token = "open-sesame"
[clients.viewer]
token_sha256 = "{hashlib.sha256(b"let-me-look").hexdigest()}"
models = ["a"]
"""


@pytest.fixture
def guard_of(tmp_path: Path) -> Callable[[str], Guard]:
    def build(tokens: str) -> Guard:
        path = tmp_path / "tokens.toml"
        path.write_text(tokens, encoding="utf-8")
        return Guard.from_config(Config(model=MODELS, tokens_file=str(path)))

    return build


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


def test_clients_are_told_by_their_tokens(guard_of: Callable[[str], Guard]) -> None:
    guard = guard_of(TOKENS)
    assert guard.authenticate(bearer("open-sesame")) == Client("search")
    assert guard.authenticate(bearer("let-me-look")) == Client("viewer", frozenset({"a"}))
    assert guard.authenticate([("authorization", "bearer open-sesame")]) == Client("search")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "MISSING_CREDENTIALS"),
        ([("user-agent", "test")], "MISSING_CREDENTIALS"),
        (bearer("wrong"), "INVALID_CREDENTIALS"),
        (bearer(""), "INVALID_CREDENTIALS"),
        (bearer(hashlib.sha256(b"open-sesame").hexdigest()), "INVALID_CREDENTIALS"),
        ([("authorization", "open-sesame")], "INVALID_CREDENTIALS"),
        ([("authorization", "Basic open-sesame")], "INVALID_CREDENTIALS"),
        ([("authorization", b"\xff")], "INVALID_CREDENTIALS"),
        (bearer("open-sesame") + bearer("wrong"), "INVALID_CREDENTIALS"),
    ],
)
def test_callers_without_a_known_token_are_refused(
    guard_of: Callable[[str], Guard], metadata: list[tuple[str, str | bytes]] | None, reason: str
) -> None:
    with pytest.raises(RequestError) as refused:
        guard_of(TOKENS).authenticate(metadata)
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
    assert "open-sesame" not in str(refused.value)
    assert "wrong" not in str(refused.value)


def test_a_client_is_held_to_its_models(guard_of: Callable[[str], Guard]) -> None:
    guard = guard_of(TOKENS)
    everything, viewer = guard.authenticate(bearer("open-sesame")), guard.authenticate(bearer("let-me-look"))
    for model in ("a", "b"):
        guard.authorize(everything, model)
    guard.authorize(viewer, "a")
    with pytest.raises(RequestError) as refused:
        guard.authorize(viewer, "b")
    assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert refused.value.reason == "MODEL_NOT_ALLOWED"


def test_without_a_tokens_file_anyone_may_use_every_model() -> None:
    for guard in (Guard.open(), Guard.from_config(Config())):
        guard.authorize(guard.authenticate(None), "a")


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ("", "has no clients"),
        ("[clients]", "has no clients"),
        ("token = 'x'", "unknown key token"),
        ("[clients.a]\ntokn = 'x'", "unknown key tokn; the nearest known one is token"),
        ("[clients.a]", "needs one of token, token_sha256 and certificate"),
        (f"[clients.a]\ntoken = 'x'\ntoken_sha256 = '{'0' * 64}'", "give one of them"),
        ("[clients.a]\ncertificate = 'x'", "without tls_client_ca"),
        ("[clients.a]\ncertificate = ''", "certificate is not text"),
        ("[clients.a]\ncertificate = ['x']", "certificate is not text"),
        ("[clients.a]\ncertificate = 'x'\n[clients.b]\ncertificate = 'x'", "same certificate as clients.a"),
        ("[clients.a]\ntoken = ''", "token must be printable ASCII"),
        ("[clients.a]\ntoken = 'with space'", "token must be printable ASCII"),
        ("[clients.a]\ntoken = 7", "token must be printable ASCII"),
        ("[clients.a]\ntoken_sha256 = 'abc'", "64 hexadecimal digits"),
        ("[clients.a]\ntoken = 'x'\nmodels = []", "not a list of model names"),
        ("[clients.a]\ntoken = 'x'\nmodels = 'a'", "not a list of model names"),
        ("[clients.a]\ntoken = 'x'\nmodels = ['aa']", "no model aa is served; the nearest is a"),
        ("[clients.a]\ntoken = 'x'\n[clients.b]\ntoken = 'x'", "same token as clients.a"),
        ("clients.a = 'x'", "not a table"),
        ("[clients.a]\ntoken = secret-value", "is not TOML"),
    ],
)
def test_a_bad_tokens_file_is_refused_and_shows_no_token(
    guard_of: Callable[[str], Guard], tokens: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=r"^tokens_file: ") as refused:
        guard_of(tokens)
    assert said in str(refused.value)
    assert "secret-value" not in str(refused.value)


def test_a_missing_tokens_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokens_file: .* cannot be read"):
        Guard.from_config(Config(tokens_file=str(tmp_path / "nowhere.toml")))


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "encoder.internal"}, True),
        ({"host": "127.0.0.2"}, False),
        ({"host": "[::1]"}, False),
        ({"host": "localhost"}, False),
        ({"host": "0.0.0.0", "tokens_file": ""}, False),
        ({"host": "0.0.0.0", "tls_certificate": "c", "tls_key": "k"}, False),
    ],
)
def test_tokens_in_the_clear_are_warned_of(settings: dict[str, str], warned: bool) -> None:
    merged = {"tokens_file": "tokens.toml"} | settings
    assert (exposure_warning(Config(**merged)) is not None) == warned  # type: ignore[arg-type]


def test_clients_are_told_by_their_certificates_or_by_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(
        TOKENS + '[clients.batch]\ncertificate = "batch.internal"\nmodels = ["a"]\n', encoding="utf-8"
    )
    tls = {"tls_certificate": "c", "tls_key": "k", "tls_client_ca": "a"}
    guard = Guard.from_config(Config(model=MODELS, tokens_file=str(path), **tls))  # type: ignore[arg-type]
    batch = Client("batch", frozenset({"a"}))
    assert guard.authenticate((), [b"other.internal", b"batch.internal"]) == batch
    assert guard.authenticate(bearer("open-sesame"), [b"batch.internal"]) == Client("search")
    for metadata, names in (
        (None, [b"other.internal"]),
        (None, [b"\xff"]),
        (bearer("x"), [b"batch.internal"]),
    ):
        with pytest.raises(RequestError) as refused:
            guard.authenticate(metadata, names)
        assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_without_a_tokens_file_a_certificate_names_its_client() -> None:
    tls = {"tls_certificate": "c", "tls_key": "k", "tls_client_ca": "a"}
    guard = Guard.from_config(Config(**tls))  # type: ignore[arg-type]
    assert guard.has_certificates
    assert guard.authenticate([("layertap-client", "another")], [b"batch.internal"]) == Client(
        "batch.internal"
    )
    assert not Guard.open().has_certificates


# ------------------------------------------------------------------------- TLS


class Authority:
    """Signs certificates for localhost with the openssl command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self.certificate = folder / "ca.pem"
        self._key = folder / "ca.key"
        self._openssl(
            *f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=ca-{folder.name} -days 2".split(),
            *("-keyout", str(self._key), "-out", str(self.certificate)),
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        """The paths of a certificate and its key."""
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        request, names = self._folder / "request", self._folder / "names"
        names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1", encoding="utf-8")
        self._openssl(
            *f"req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name}".split(),
            *("-keyout", str(key), "-out", str(request)),
        )
        self._openssl(
            *("x509", "-req", "-days", "2", "-in", str(request), "-out", str(certificate)),
            *(
                "-CA",
                str(self.certificate),
                "-CAkey",
                str(self._key),
                "-CAcreateserial",
                "-extfile",
                str(names),
            ),
        )
        return certificate, key

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("certificates are made with the openssl command, which is not here")
    return Authority(tmp_path / "authority")


def tls_config(certificate: Path, key: Path, client_ca: Path | None = None) -> Config:
    return Config(
        tls_certificate=str(certificate), tls_key=str(key), tls_client_ca=str(client_ca) if client_ca else ""
    )


async def start(config: Config, kind: str = "stock") -> tuple[grpc.aio.Server, int]:
    async def echo(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return request

    async def identity(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        assert context.peer_identity_key() == "x509_subject_alternative_name"
        assert context.auth_context()["transport_security_type"] == [b"ssl"]
        return b" ".join(context.peer_identities() or ())

    server = await create_server(kind)
    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Identity": grpc.unary_unary_rpc_method_handler(identity),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(config))
    await server.start()
    return server, port


async def echoed(port: int, *pems: Path | None) -> bool:
    """Whether a call gets through with (trusted authority, own key, own certificate)."""
    read = [pem.read_bytes() if pem else None for pem in pems]
    # Sessions are not resumed, and connections not shared: each call shakes hands anew.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(
        f"127.0.0.1:{port}", grpc.ssl_channel_credentials(*read), options
    ) as channel:
        try:
            return bool(await channel.unary_unary("/test.Echo/Echo")(b"here", timeout=20) == b"here")
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False


def test_no_credentials_without_a_certificate() -> None:
    assert server_credentials(Config()) is None


async def test_tls_serves_those_who_trust_its_authority(authority: Authority, tmp_path: Path) -> None:
    server, port = await start(tls_config(*authority.issue("server")))
    stranger = Authority(tmp_path / "stranger")
    try:
        assert await echoed(port, authority.certificate)
        assert not await echoed(port, stranger.certificate)
    finally:
        await server.stop(None)


async def test_mutual_tls_demands_a_certificate_of_its_authority(
    authority: Authority, tmp_path: Path
) -> None:
    clients, strangers = Authority(tmp_path / "clients"), Authority(tmp_path / "strangers")
    server, port = await start(tls_config(*authority.issue("server"), clients.certificate))
    client, client_key = clients.issue("client")
    stranger, stranger_key = strangers.issue("stranger")
    try:
        assert await echoed(port, authority.certificate, client_key, client)
        assert not await echoed(port, authority.certificate)
        assert not await echoed(port, authority.certificate, stranger_key, stranger)
    finally:
        await server.stop(None)


@pytest.mark.parametrize("kind", ["fast", "stock"])
async def test_a_handler_learns_the_names_in_the_client_s_certificate(
    authority: Authority, tmp_path: Path, kind: str
) -> None:
    clients = Authority(tmp_path / "clients")
    server, port = await start(tls_config(*authority.issue("server"), clients.certificate), kind)
    certificate, key = (one.read_bytes() for one in clients.issue("client"))
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), key, certificate)
    options = [("grpc.use_local_subchannel_pool", 1)]
    try:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
            names = await channel.unary_unary("/test.Echo/Identity")(b"", timeout=20)
        assert names == b"localhost 127.0.0.1"
    finally:
        await server.stop(None)


async def test_a_renewed_certificate_is_used_without_a_restart(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("server")
    server, port = await start(tls_config(certificate, key))
    successor = Authority(tmp_path / "successor")
    new_certificate, new_key = successor.issue("server")
    try:
        assert await echoed(port, authority.certificate)
        key.write_bytes(
            new_key.read_bytes()
        )  # Only one of the two files has changed: the old pair stays in use.
        assert await echoed(port, authority.certificate)
        certificate.write_bytes(new_certificate.read_bytes())
        assert await echoed(port, successor.certificate)
        assert not await echoed(port, authority.certificate)
    finally:
        await server.stop(None)


def test_files_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("server")
    other_key = authority.issue("other")[1]
    junk = tmp_path / "junk.pem"
    junk.write_text("junk", encoding="utf-8")
    for config, said in [
        (tls_config(certificate, tmp_path / "no.key"), "tls_key: .*no.key cannot be read"),
        (tls_config(certificate, other_key), "tls_certificate and tls_key: "),
        (tls_config(junk, key), "tls_certificate and tls_key: .*junk.pem"),
        (tls_config(certificate, key, junk), "tls_client_ca: .*junk.pem"),
    ]:
        with pytest.raises(ConfigError, match=said):
            server_credentials(config)

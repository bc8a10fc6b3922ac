"""Statuses to exceptions, retries, credentials and the ways to reach a server."""

from __future__ import annotations

import pickle
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

import layertap
from layertap import TLS, AsyncClient, Client, LayertapError, errors
from layertap._unary import MAX_UNARY_INPUTS

from .fake_server import FakeEncoder, serving


def test_every_detail(client: Client) -> None:
    with pytest.raises(layertap.InvalidArgument) as caught:
        client.encode(["a", "poison"], tokens=True)
    error = caught.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "INVALID_FIELD"
    assert error.message == "the request has a bad field"
    assert error.violations == (("inputs[1].text", "is poison"),)
    assert error.retry_after_s is None
    assert str(error) == "the request has a bad field\n  inputs[1].text: is poison"

    with pytest.raises(layertap.ResourceExhausted, match="the queue is full") as caught:
        client.encode("busy", tokens=True)
    assert caught.value.retry_after_s == 1.5
    assert caught.value.reason == ""

    with pytest.raises(layertap.NotFound) as caught:
        client.model("nobody")
    assert (caught.value.reason, caught.value.metadata) == ("MODEL_NOT_FOUND", {"model": "nobody"})


@pytest.mark.parametrize("text", ["poison", "busy", "bug"])
def test_a_stream_raises_the_same(client: Client, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layertap._pipeline.MAX_BUSY_S", 0.0)
    with pytest.raises(LayertapError) as unary:
        client.encode(text, tokens=True)
    with pytest.raises(LayertapError) as streamed:
        list(client.stream([text], tokens=True))
    assert type(unary.value) is type(streamed.value) is not LayertapError
    assert vars(unary.value) == vars(streamed.value)


def test_failed_precondition(client: Client) -> None:
    with pytest.raises(layertap.FailedPrecondition):
        client.encode("a", model="plain", attentions=True)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_code_has_its_class(code: grpc.StatusCode) -> None:
    error = errors.from_status(status_pb2.Status(code=code.value[0], message="m"))
    assert (error.code, error.message, str(error)) == (code, "m", "m")
    own = {kind.code for kind in LayertapError.__subclasses__()}
    assert (type(error) is LayertapError) == (code not in own)
    assert isinstance(error, LayertapError)


def test_odd_statuses() -> None:
    assert errors.from_status(status_pb2.Status(code=99)).code is grpc.StatusCode.UNKNOWN
    assert str(errors.from_status(status_pb2.Status(code=13))) == "INTERNAL"
    unknown = any_pb2.Any()
    unknown.Pack(error_details_pb2.Help())
    assert errors.from_status(status_pb2.Status(code=3, message="m", details=[unknown])).violations == ()


def test_a_description_is_not_said_twice() -> None:
    error = layertap.InvalidArgument(
        "outputs: nothing selected", violations=(("outputs", "nothing selected"),)
    )
    assert str(error) == "outputs: nothing selected"


def test_errors_travel_between_processes() -> None:
    error = layertap.ResourceExhausted("full", reason="QUEUE_FULL", retry_after_s=2.0)
    other = pickle.loads(pickle.dumps(error))
    assert (type(other), str(other), other.reason, other.retry_after_s) == (
        type(error),
        "full",
        "QUEUE_FULL",
        2.0,
    )


def test_timeout(address: str, client: Client) -> None:
    with pytest.raises(layertap.DeadlineExceeded):
        client.encode("hang", tokens=True, timeout=0.2)
    with Client(address, timeout=0.2) as other, pytest.raises(layertap.DeadlineExceeded):
        other.encode("hang", tokens=True)


def test_a_timeout_says_how_long_and_where(address: str, client: Client) -> None:
    message = rf"Deadline Exceeded: no answer from {address} after 0.2 s; increase `timeout`"
    with pytest.raises(layertap.DeadlineExceeded, match=message):
        client.encode("hang", tokens=True, timeout=0.2)
    with pytest.raises(layertap.DeadlineExceeded, match=message):
        list(client.stream(["hang"], tokens=True, timeout=0.2))


@pytest.fixture
def no_server() -> Iterator[str]:
    """An address where nobody answers."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{unused.getsockname()[1]}"


async def test_a_timeout_before_the_tries_are_over_says_why(
    no_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layertap._transport._PROBE_S", 10.0)
    # Less than the pause before the second try.
    message = rf"Deadline Exceeded: no connection to {no_server} after 0.02 s: .*[Cc]onnection refused"
    with Client(no_server) as client, pytest.raises(layertap.DeadlineExceeded, match=message):
        client.models(timeout=0.02)
    async with AsyncClient(no_server) as async_client:
        with pytest.raises(layertap.DeadlineExceeded, match=message):
            await async_client.models(timeout=0.02)


def test_the_servers_own_words_are_kept() -> None:
    error = layertap.DeadlineExceeded("the deadline passed", reason="DEADLINE_EXCEEDED")
    errors.locate(error, "a:1", 5.0)
    assert str(error) == "the deadline passed (a:1 after 5 s)"


async def test_no_limit_is_none_in_a_call_as_in_the_constructor(address: str, fake: FakeEncoder) -> None:
    # The client's limit would have passed before the answer.
    with Client(address, timeout=0.001) as client:
        assert client.encode("a", tokens=True, timeout=None).token_count == 3
        assert client.model(timeout=None).name == "fake"
        assert len(client.tokenize(["a", "b"], timeout=None)) == 2
    async with AsyncClient(address, timeout=0.001) as async_client:
        assert (await async_client.encode("a", tokens=True, timeout=None)).token_count == 3
    with Client(address, timeout=None) as client:
        assert client.encode("a", tokens=True).token_count == 3


async def test_encode_keeps_its_limit_when_it_streams(address: str) -> None:
    inputs = [*map(str, range(MAX_UNARY_INPUTS)), "hang"]
    with Client(address, timeout=0.5) as client:
        with pytest.raises(layertap.DeadlineExceeded, match=r"after 0.5 s"):
            client.encode(inputs, tokens=True)
        with pytest.raises(layertap.DeadlineExceeded, match=r"after 0.3 s"):
            client.encode(inputs, tokens=True, timeout=0.3)
    async with AsyncClient(address, timeout=0.5) as async_client:
        with pytest.raises(layertap.DeadlineExceeded, match=r"after 0.5 s"):
            await async_client.encode(inputs, tokens=True)


def test_unavailable_is_tried_again(client: Client, fake: FakeEncoder) -> None:
    fake.num_unavailable = 2
    assert client.encode("a", tokens=True).token_count == 3
    assert [rpc for rpc, _ in fake.calls] == ["Encode"] * 3


def test_the_servers_pushback_ends_the_tries(client: Client, fake: FakeEncoder) -> None:
    fake.num_unavailable, fake.pushback_ms = 2, -1
    with pytest.raises(layertap.Unavailable, match="loading"):
        client.encode("a", tokens=True)
    assert len(fake.calls) == 1


def test_no_server(no_server: str) -> None:
    message = f"^{no_server}: .*[Cc]onnection refused"
    with Client(no_server) as client, pytest.raises(layertap.Unavailable, match=message):
        client.models()


def test_token(address: str, fake: FakeEncoder) -> None:
    fake.token = "secret"
    with Client(address, token="secret") as client:
        assert client.encode("a", tokens=True).token_count == 3
        assert len(list(client.stream(["a"], tokens=True))) == 1
    with Client(address, token="wrong") as client, pytest.raises(layertap.Unauthenticated):
        client.models()


def test_a_limit_on_messages(address: str) -> None:
    with Client(address, max_message_bytes=1000) as client, pytest.raises(layertap.ResourceExhausted):
        client.encode("a" * 100, last_hidden_state=True)


def test_unix_socket(fake: FakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have some hundred bytes
    with serving(fake, "unix:fake.sock") as address, Client(address) as client:
        assert client.encode("a", tokens=True).token_count == 3


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "1", "-subj", "/CN=layertap.test"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:layertap.test"], check=True, capture_output=True)
    return certificate, key


def test_tls(fake: FakeEncoder, certificate: tuple[Path, Path]) -> None:
    public, private = (path.read_bytes() for path in certificate)
    mutual = grpc.ssl_server_credentials([(private, public)], public, require_client_auth=True)
    tls = TLS(certificate[0], certificate[0], certificate[1], server_name="layertap.test")
    with serving(fake, credentials=mutual) as address:
        with Client(address, tls=tls) as client:
            assert client.encode("a", tokens=True).token_count == 3
        for wrong in (None, TLS(certificate[0], server_name="layertap.test")):
            with Client(address, tls=wrong) as client, pytest.raises(layertap.Unavailable):
                client.models()
    with pytest.raises(OSError, match="no-such-file"):
        Client(tls=TLS("no-such-file"))


@pytest.mark.parametrize("given", ["certificate", "key"])
def test_a_certificate_without_its_key_is_refused(given: str, certificate: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=rf"TLS\({given}=…\) without .*: give both, or neither"):
        TLS(**{given: certificate[0]})


def key_of(path: Path, *options: str) -> None:
    command = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run([*command, "-out", str(path), *options], check=True, capture_output=True)


def test_files_of_tls_that_cannot_be_used(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    public, private = certificate
    no_pem, damaged, other, secret = (tmp_path / name for name in ("text", "damaged", "other", "secret"))
    no_pem.write_text("no PEM")
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    key_of(other)
    key_of(secret, "-aes256", "-pass", "pass:word")
    for arguments, message in (
        ({"ca": no_pem}, rf"TLS.ca: {no_pem} is not a PEM file with '-----BEGIN CERTIFICATE-----'"),
        ({"ca": private}, "TLS.ca: .* is not a PEM file"),
        ({"ca": damaged}, f"TLS.ca: {damaged} has no readable certificate"),
        ({"certificate": no_pem, "key": private}, "TLS.certificate: .* is not a PEM file"),
        (
            {"certificate": public, "key": no_pem},
            "TLS.key: .* is not a PEM file with '-----BEGIN PRIVATE KEY",
        ),
        ({"certificate": private, "key": public}, "TLS.certificate: .* is not a PEM file"),
        ({"certificate": public, "key": other}, f"TLS.key: {other} does not belong to {public}"),
        ({"certificate": public, "key": secret}, "TLS.key is encrypted"),
    ):
        for kind in (Client, AsyncClient):
            with pytest.raises(ValueError, match=message):
                kind(tls=TLS(**arguments))
    for name, tls in (
        ("ca", TLS(ca=tmp_path / "none")),
        ("certificate", TLS(certificate=tmp_path / "none", key=private)),
        ("key", TLS(certificate=public, key=tmp_path / "none")),
    ):
        with pytest.raises(FileNotFoundError, match=rf"TLS.{name}: No such file.*none"):
            Client(tls=tls)
    with pytest.raises(IsADirectoryError, match=r"TLS.ca"):
        Client(tls=TLS(ca=tmp_path))
    with pytest.raises(TypeError, match=r"TLS.ca=b'PEM': give the path of a PEM file"):
        TLS(ca=b"PEM")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"TLS.server_name=5"):
        TLS(server_name=5)  # type: ignore[arg-type]

"""What keeps a server from starting is said in one line, before anything is loaded."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from families import build
from harness import serve
from layertap_server.app import Server
from layertap_server.config import Config
from layertap_server.start_checks import StartError, check_address, check_models, check_unix_socket


@pytest.mark.parametrize(
    "source", ["./nofolder", "../no/folder", "/no/folder", "~/nofolder", "no/such/folder"]
)
def test_a_folder_that_is_not_there(tmp_path: Path, source: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartError, match=f"there is no folder '{source}'"):
        check_models({"first": str(tmp_path), "second": source})


def test_a_folder_without_a_model_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"there is no config\.json in it"):
        check_models({"a": str(tmp_path)})
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="is not a folder"):
        check_models({"a": str(tmp_path / "file")})
    check_models({"a": "org/a-model_v1.5", "b": "all-MiniLM-L6-v2"})


@pytest.mark.parametrize("host", ["not-an-address.invalid", "1.2.3.4.5", "[::1]", "a" * 300])
def test_a_host_that_is_no_address(host: str) -> None:
    with pytest.raises(StartError, match="is not an address; choose another --host"):
        check_address(host, 0)


def test_an_address_of_another_machine_and_a_port_in_use() -> None:
    with pytest.raises(StartError, match="not an address of this machine"):
        check_address("192.0.2.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            StartError, match=f"127.0.0.1:{port}: it is in use; choose another --metrics-port"
        ):
            check_address("127.0.0.1", port, "--metrics-port")
    check_address("127.0.0.1", port)


def test_a_unix_socket_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="there is no folder"):
        check_unix_socket(str(tmp_path / "nowhere" / "a"))
    with pytest.raises(StartError, match="may have up to 107 bytes, and this one has"):
        check_unix_socket(str(tmp_path / ("a" * 108)))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(StartError, match="the path exists, and is not a socket"):
        check_unix_socket(str(tmp_path / "file"))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()
        with pytest.raises(StartError, match="another server listens there"):
            check_unix_socket(str(tmp_path / "s"))
    check_unix_socket(str(tmp_path / "s"))  # a socket that a server left behind
    check_unix_socket(str(tmp_path / "new"))


async def test_the_metrics_port_is_looked_at_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("layertap_server.model_sources.load", lambda *_: pytest.fail("it loads"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = Config(model=(str(tmp_path),), port=0, metrics_port=taken.getsockname()[1])
        with pytest.raises(StartError, match="choose another --metrics-port"):
            await Server(config).startup()


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--model=./nofolder"], 1, "there is no folder './nofolder'"),
        (["--tokens-file=/no/file", "--port=0"], 2, "tokens_file: /no/file cannot be read"),
        (
            ["--tls-certificate=/no/file", "--tls-key=/no/file", "--port=0"],
            2,
            "tls_certificate: /no/file cannot be read",
        ),
    ],
)
def test_it_exits_before_torch_is_imported(flags: list[str], status: int, said: str) -> None:
    script = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    script += "from layertap_server.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (status, "False"), done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_model_that_cannot_be_served_says_so_before_the_others_are_loaded(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build("bert", tmp_path / name)
    config = tmp_path / "two" / "config.json"
    config.write_text(config.read_text("utf-8").replace('"is_decoder": false', '"is_decoder": true'), "utf-8")
    (tmp_path / "one" / "model.safetensors").unlink()  # it would fail first if it were loaded
    with (
        pytest.raises(StartError, match=r"two' is a decoder"),
        serve({"one": tmp_path / "one", "two": tmp_path / "two"}),
    ):
        pass

"""The command line: help, refusals, and what reaches the server."""

import subprocess
import sys
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

from layertap_server.cli import main
from layertap_server.config import Config, ConfigError
from layertap_server.config_sources import flag_of


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Stands in for the app; collects the configurations that it was started with."""
    started: list[Config] = []

    def run(config: Config) -> int:
        started.append(config)
        if config.port == 1:
            raise ConfigError("tokens_file: names no client")
        return 3 if config.port == 2 else 0

    app = ModuleType("layertap_server.app")
    app.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "layertap_server.app", app)
    return started


def invoke(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, arguments, env=environment)


def test_help_shows_every_setting_and_its_default() -> None:
    shown = " ".join(invoke("--help").output.split())
    for name in Config.__dataclass_fields__:
        assert flag_of(name) in shown
    assert "[default: 50051]" in shown
    assert "LAYERTAP_PORT" in shown


def test_version() -> None:
    assert invoke("--version").output.startswith("layertap-server, version ")


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from layertap_server.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'transformers', 'grpc', 'numpy'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.splitlines()[-1] == "[]"


def test_flags_reach_the_server(served: list[Config]) -> None:
    result = invoke("--model", "a", "--model", "b=c", "--port", "0", "--trust-remote-code", "--grace-s", "2")
    assert result.exit_code == 0, result.output
    assert served == [Config(model=("a", "b=c"), port=0, trust_remote_code=True, grace_s=2.0)]


def test_a_flag_can_take_back_what_the_environment_turns_on(served: list[Config]) -> None:
    invoke("--no-trust-remote-code", LAYERTAP_TRUST_REMOTE_CODE="true", LAYERTAP_PORT="0")
    assert served == [Config(port=0, trust_remote_code=False)]


def test_the_status_of_the_server_is_the_exit_code(served: list[Config]) -> None:
    assert invoke("--port", "2").exit_code == 3
    assert len(served) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "many"], "port: 'many' from --port is not allowed; allowed: a whole number, 0 to 65535"),
        (["--prot", "1"], "--prot: unknown flag; the nearest known one is --port"),
        (["--qqq", "1"], "--qqq: unknown flag; the nearest known one is --"),
        (["--config", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["--port", "1"], "tokens_file: names no client"),
        (["stray"], "stray"),
    ],
)
def test_refusals_say_what_and_exit_with_2(served: list[Config], arguments: list[str], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in result.output

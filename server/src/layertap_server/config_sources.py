"""Reads a `Config` from its sources: flags over environment over file over defaults."""

import re
from collections.abc import Mapping

from layertap_server.config import (
    CHECKS,
    TYPES,
    Config,
    ConfigError,
    check_value,
    nearest,
    read_toml,
    refusal,
)

ENVIRONMENT_PREFIX = "LAYERTAP_"
CONFIG_VARIABLE = "LAYERTAP_CONFIG"
# Variables that are not settings: the first two are the client's, and a shell that has them may start a
# server as well; the third is read by `compiling.py`, also where there is no `Config`.
OTHER_VARIABLES = frozenset({"LAYERTAP_ADDRESS", "LAYERTAP_TOKEN", "LAYERTAP_CFLAGS"})
# Kubernetes describes a Service named layertap to every pod in variables like LAYERTAP_SERVICE_HOST and
# LAYERTAP_PORT=tcp://10.0.0.1:50051. They are not settings, and the server must not refuse to start for them.
SERVICE_LINK_NAME = re.compile(
    r"LAYERTAP_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)
SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")
TRUTHS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def load(
    flags: Mapping[str, object], environment: Mapping[str, str], config_file: str | None = None
) -> Config:
    """The configuration from all its sources: flags over environment over file over defaults.

    `flags` holds only those that were given, keyed by field name, their values text as typed (or a
    tuple of them). The file is `config_file`, else the one that LAYERTAP_CONFIG names.
    """
    values: dict[str, object] = {}
    path = config_file or environment.get(CONFIG_VARIABLE)
    if path:
        for name, value in _read_file(path).items():
            values[name] = _convert(name, value, path)
    for name, variable in _environment_settings(environment).items():
        values[name] = _convert(name, environment[variable], variable)
    for name, value in flags.items():
        values[name] = _convert(name, value, flag_of(name))
    return Config(**values)  # type: ignore[arg-type]


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_file(path: str) -> dict[str, object]:
    values = read_toml("config", path)
    for name in values:
        if name not in CHECKS:
            raise ConfigError(
                f"{name}: unknown key in {path}; the nearest known one is {nearest(name, CHECKS)}"
            )
    return values


def _environment_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Field name to the variable that sets it."""
    known = {ENVIRONMENT_PREFIX + name.upper(): name for name in CHECKS}
    settings = {}
    for variable, value in environment.items():
        if (
            not variable.startswith(ENVIRONMENT_PREFIX)
            or variable in OTHER_VARIABLES
            or variable == CONFIG_VARIABLE
            or SERVICE_LINK_NAME.fullmatch(variable)
            or SERVICE_LINK_VALUE.match(value)
        ):
            continue
        if variable not in known:
            closest = nearest(variable, [*known, CONFIG_VARIABLE])
            raise ConfigError(f"{variable}: unknown environment variable; the nearest known one is {closest}")
        settings[known[variable]] = variable
    return settings


def _convert(name: str, value: object, origin: str) -> object:
    """The value in the field's type, and allowed there; text is read, anything else must fit as it is."""
    wanted = TYPES[name]
    converted: object = value
    try:
        if wanted is int and isinstance(value, str):
            converted = int(value)
        elif wanted is float and (isinstance(value, str) or type(value) is int):
            converted = float(value)
        elif wanted is bool and isinstance(value, str):
            converted = TRUTHS[value.lower()]
        elif wanted == tuple[str, ...]:
            listed = [part for part in value.split(",") if value] if isinstance(value, str) else value
            if not isinstance(listed, (list, tuple)) or not all(isinstance(item, str) for item in listed):
                raise ValueError
            converted = tuple(item.strip() for item in listed)
    except (ValueError, KeyError):
        raise refusal(name, value, origin) from None
    if wanted in (int, float, bool, str) and type(converted) is not wanted:
        raise refusal(name, value, origin)
    check_value(name, converted, origin)
    return converted

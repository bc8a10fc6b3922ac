"""The command `layertap-server`: flags to a Config, a Config to a running server."""

import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import click

from layertap_server.config import CHECKS, TYPES, Config, ConfigError, nearest
from layertap_server.config_sources import flag_of, load
from layertap_server.processes.number import chosen_fronts

HELP = """Serve the inner outputs of encoder models over gRPC.

\b
Examples:
  layertap-server
  layertap-server --model minilm=/models/all-MiniLM-L6-v2 --model bert-base-uncased
  layertap-server --host 0.0.0.0 --metrics-port 9090 --tokens-file tokens.toml
  layertap-server --config server.toml
"""
METAVARS: dict[object, str] = {
    int: "INTEGER",
    float: "SECONDS",
    str: "TEXT",
    tuple[str, ...]: "MODEL",
    "client_weight": "NAME=WEIGHT",
}


def options() -> list[click.Parameter]:
    """One option for each field of `Config`; the values stay text, for `load` to read and to refuse."""
    declared: list[click.Parameter] = []
    for spec in fields(Config):
        flag = flag_of(spec.name)
        help_text = spec.metadata["help"]
        if TYPES[spec.name] is bool:
            declared.append(click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=help_text))
            continue
        if spec.default not in (MISSING, "", ()):
            help_text = f"{help_text}  [default: {spec.default}]"
        declared.append(
            click.Option(
                [flag],
                multiple=TYPES[spec.name] == tuple[str, ...],
                metavar=METAVARS.get(spec.name) or METAVARS[TYPES[spec.name]],
                help=help_text,
            )
        )
    return declared


class ServerCommand(click.Command):
    """A command that names the nearest flag for every unknown one, however far."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [*map(flag_of, CHECKS), "--config", "--version", "--help"]
            closest = nearest(error.option_name, known)
            raise click.UsageError(
                f"{error.option_name}: unknown flag; the nearest known one is {closest}", ctx
            ) from None


def serve(config_file: str | None, **flags: Any) -> None:
    given: Mapping[str, object] = {name: value for name, value in flags.items() if value not in (None, ())}
    try:
        config = load(given, os.environ, config_file)
        # Imported late: --help and a wrong setting answer at once, without torch.
        num_fronts = chosen_fronts(config)
        if num_fronts:
            from layertap_server.processes.supervisor import run as supervise

            status = supervise(config, num_fronts)
        else:
            from layertap_server.app import run

            status = run(config)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    sys.exit(status)


main = click.version_option(package_name="layertap", prog_name="layertap-server")(
    ServerCommand(
        "layertap-server",
        callback=serve,
        params=[
            click.Option(
                ["--config", "config_file"], metavar="FILE", help="TOML file with any of these settings."
            ),
            *options(),
        ],
        help=HELP,
        epilog="Each setting can also be an environment variable (LAYERTAP_PORT for --port) or a key in the file (port). "
        "Flags have precedence over the environment, and the environment over the file.",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
)

"""The options of the commands, and what they mean for a request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import click

from layertap._client import DEFAULT_ADDRESS
from layertap._types import (
    Attentions,
    DtypeName,
    Embedding,
    EncodeOptions,
    EncodingName,
    LayerMergeName,
    PoolingName,
)

_F = TypeVar("_F", bound=Callable[..., Any])


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Parses a list such as 0,-1."""
    try:
        return tuple(int(number) for number in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0,-1") from None


def _numbers_or_all(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """Parses a list such as 0,-1. True for "all"; None if the option is not given."""
    return None if value is None else value == "all" or _numbers(ctx, param, value)


def _all_of(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


connection = _all_of(
    click.option(
        "--address",
        default=DEFAULT_ADDRESS,
        show_default=True,
        envvar="LAYERTAP_ADDRESS",
        show_envvar=True,
        help="Address of the server: host:port or unix:/path.",
    ),
    click.option(
        "--token", envvar="LAYERTAP_TOKEN", show_envvar=True, help="Bearer token to send with each call."
    ),
    click.option("--tls", is_flag=True, help="Use TLS, and trust the default root certificates."),
    click.option(
        "--ca",
        type=click.Path(path_type=Path),
        help="Use TLS, and trust the root certificates in this file (PEM).",
    ),
    click.option(
        "--certificate", type=click.Path(path_type=Path), help="Client certificate (PEM); needs --key."
    ),
    click.option("--key", type=click.Path(path_type=Path), help="Private key of --certificate (PEM)."),
    click.option(
        "--model",
        default="",
        metavar="NAME",
        help="Name of a served model. [default: the server's default model]",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Time limit of the command. [default: 60; for encode no limit]",
    ),
)

preparation = _all_of(
    click.option(
        "--truncation",
        type=click.Choice(["end", "start"]),
        help="At which end to drop tokens over the limit. By default, such texts are rejected.",
    ),
    click.option(
        "--prompt",
        "prompt_name",
        default="",
        metavar="NAME",
        help="Name of a prompt of the model, to put before each text.",
    ),
)

selection = _all_of(
    click.option("--last-hidden-state", is_flag=True, help="The last hidden state, (T, H)."),
    click.option("--pooler", "pooler_output", is_flag=True, help="The pooler output, (H)."),
    click.option(
        "--hidden-states",
        metavar="all|N,N,…",
        callback=_numbers_or_all,
        help="Hidden states, (layers, T, H); 0 is the embedding output, -1 the last layer.",
    ),
    click.option(
        "--attentions",
        metavar="all|N,N,…",
        callback=_numbers_or_all,
        help="Attention maps of these layers, from 0: (layers, heads, queries, T).",
    ),
    click.option("--heads", metavar="N,N,…", callback=_numbers, help="With --attentions: only these heads."),
    click.option(
        "--queries",
        metavar="N,N,…",
        callback=_numbers,
        help="With --attentions: only the rows of these token positions.",
    ),
    click.option("--mean-heads", is_flag=True, help="With --attentions: the mean over the heads."),
    click.option(
        "--embedding",
        is_flag=True,
        help="The embedding, (D): as the model is configured, or by the options below. The default output.",
    ),
    click.option("--pooling", type=click.Choice(get_args(PoolingName)), help="How to pool the tokens."),
    click.option("--layers", metavar="N,N,…", callback=_numbers, help="Hidden states to pool. [default: -1]"),
    click.option(
        "--layer-merge", type=click.Choice(get_args(LayerMergeName)), help="How to combine --layers."
    ),
    click.option("--normalize/--no-normalize", default=None, help="Whether to divide by the L2 norm."),
    click.option(
        "--dimensions",
        type=click.IntRange(min=1),
        default=None,
        help="Keep only this many leading dimensions.",
    ),
    click.option(
        "--encoding", type=click.Choice(get_args(EncodingName)), help="Element type of the embedding."
    ),
    click.option("--tokens", is_flag=True, help="The tokens."),
    click.option(
        "--dtype",
        type=click.Choice(get_args(DtypeName)),
        default="float32",
        show_default=True,
        help="Element type of tensors in the reply.",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=0),
        default=0,
        help="Limit of tokens for each text, up to the model's own limit. 0: as configured.",
    ),
    click.option(
        "--priority", type=click.Choice(["low", "normal", "high"]), help="Priority in the server's queue."
    ),
)


def encode_options(options: dict[str, Any]) -> EncodeOptions:
    """Converts options of the command line to keyword options of `Client.stream`."""
    maps = {name: options.pop(name) for name in ("heads", "queries", "mean_heads")}
    layers = options.pop("attentions")
    if layers is None and any(maps.values()):
        raise click.UsageError("--heads, --queries and --mean-heads need --attentions")
    names = ("pooling", "layers", "layer_merge", "normalize", "dimensions", "encoding")
    pooled = {name: options.pop(name) for name in names}
    wanted = options.pop("embedding") or any(value not in (None, ()) for value in pooled.values())
    outputs = ("last_hidden_state", "pooler_output", "hidden_states", "tokens")
    if layers is None and not any(options[name] for name in outputs):
        wanted = True
    if layers is not None:
        layers = Attentions(
            () if layers is True else layers, maps["heads"], maps["mean_heads"], maps["queries"]
        )
    pooled["dimensions"] = pooled["dimensions"] or 0
    options |= {"attentions": layers, "embeddings": Embedding(**pooled) if wanted else None}
    return cast(EncodeOptions, options)

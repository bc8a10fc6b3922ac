"""The commands behind `layertap`: info, tokenize, encode, attend, serve."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar, cast, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from layertap._client import DEFAULT_ADDRESS, Client
from layertap._files import array_file
from layertap._interrupts import Interrupted, Interrupts
from layertap._pictures.command import attend_command
from layertap._tables import models_table, result_table, tokens_table
from layertap._texts import Texts
from layertap._transport import TLS
from layertap._types import (
    Attentions,
    DtypeName,
    Embedding,
    EncodeOptions,
    EncodingName,
    LayerMergeName,
    PoolingName,
    Result,
)
from layertap.errors import LayertapError

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


def _options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_connection = _options(
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

_preparation = _options(
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

_selection = _options(
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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="layertap")
def commands() -> None:
    """Show the inner outputs of encoder models on a Layertap server."""


@commands.command()
@_connection
def info(**connection: Any) -> None:
    """Show the served models, or one with --model."""
    with _client(connection) as (client, options):
        name = options.pop("model")
        models = [client.model(name, **options)] if name else client.models(**options)
    Console().print(models_table(models))


@commands.command()
@click.argument("texts", nargs=-1, required=True)
@_preparation
@_connection
def tokenize(texts: tuple[str, ...], **options: Any) -> None:
    """Show the tokens of TEXTS."""
    with _client(options) as (client, request):
        tokenized = client.tokenize(list(texts), **request)
    for text, tokens in zip(texts, tokenized, strict=True):
        Console().print(tokens_table(text, tokens))


@commands.command()
@click.argument("texts", nargs=-1)
@click.option(
    "-i",
    "--input",
    "source",
    type=click.File("rb"),
    help="Read texts from this UTF-8 file, one for each line; - is standard input.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write arrays to this .npz or .safetensors file instead of showing them.",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="If a text fails: stop, or skip it and continue.",
)
@_selection
@_preparation
@_connection
def encode(
    texts: tuple[str, ...], source: IO[bytes] | None, output: Path | None, on_error: str, **options: Any
) -> None:
    """Show the outputs for TEXTS, or write them to a file.

    The name of an array in a file is the text's number, from 0, and the output: 0.last_hidden_state,
    0.pooler_output, 0.hidden_states, 0.attentions, 0.embeddings.0 (with 0.embeddings.0.scale for int8),
    and with --tokens 0.tokens.ids, 0.tokens.starts and so on.

    If a text fails, the connection is lost or the command is interrupted, the file has all texts that were
    finished before.
    """
    if bool(texts) == (source is not None):
        raise click.UsageError("give TEXTS, or -i FILE")
    with _client(options) as (client, request):
        given = Texts(texts, source, stops=on_error == "stop")
        # The order in a file does not matter, so each result is written as soon as it is complete.
        results = client.stream(given, ordered=output is None, on_error="return", **_encode_options(request))
        if output is None:
            _show(given, results)
        else:
            _write(given, results, output)


@commands.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Run a server, with the options of layertap-server."""
    beside = Path(sys.executable).with_name("layertap-server")
    program = str(beside) if beside.exists() else shutil.which("layertap-server")
    if program is None or not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        raise click.ClickException("the server needs the extra 'server': pip install 'layertap[server]'")
    os.execvp(program, [program, *arguments])


@contextmanager
def _client(options: dict[str, Any]) -> Iterator[tuple[Client, dict[str, Any]]]:
    """A client, and the options that do not belong to the connection. Errors are shown as one message."""
    options = dict(options)
    address, token, tls = options.pop("address"), options.pop("token"), options.pop("tls")
    ca, certificate, key = (options.pop(name) for name in ("ca", "certificate", "key"))
    if (certificate is None) != (key is None):
        raise click.UsageError("give both --certificate and --key, or neither")
    if options["timeout"] is None:
        del options["timeout"]  # use the default of the SDK
    try:
        if ca or certificate:
            tls = TLS(ca, certificate, key)
        with Client(address, token=token, tls=tls) as client:
            yield client, options
    except LayertapError as error:
        raise click.ClickException(str(error)) from error
    except (ValueError, TypeError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _encode_options(options: dict[str, Any]) -> EncodeOptions:
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


def _show(texts: Texts, results: Iterable[tuple[int, Result | LayertapError]]) -> None:
    for index, result in results:
        if isinstance(result, LayertapError):
            texts.failed(index, result)
            if texts.stops:
                break
            click.echo(f"skipped: {texts.failure_text(index)}", err=True)
            continue
        Console().print(result_table(f"{index}: {result.token_count} tokens", result))
        if result.tokens is not None:
            Console().print(tokens_table("", result.tokens))
    if texts.stops and texts.failures:
        raise click.ClickException(texts.failure_text(min(texts.failures)))


class EndedEarlyError(click.ClickException):
    """A command ended before all texts were finished; has the exit status."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click declares it as a class attribute


def _write(texts: Texts, results: Iterable[tuple[int, Result | LayertapError]], path: Path) -> None:
    """Writes arrays as they arrive, and shows the progress. The file keeps all finished texts."""
    columns = (TextColumn("texts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    num_finished = 0
    trouble, status = "", 1
    try:
        with (
            Interrupts() as interrupts,
            array_file(path) as write,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            task = progress.add_task("texts", total=texts.total)
            for index, result in results:
                if isinstance(result, LayertapError):
                    texts.failed(index, result)
                    if not texts.stops:
                        line = f"skipped: {texts.failure_text(index)}"
                        progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
                    continue
                # The file has all arrays of a text or none.
                with interrupts.held():
                    for name, array in result.arrays().items():
                        write(f"{index}.{name}", array)
                    num_finished += 1
                progress.advance(task)
            interrupts.hold()
            if texts.stops and texts.failures:
                raise click.ClickException(texts.failure_text(min(texts.failures)))
    except click.ClickException as error:
        trouble = error.message
    except LayertapError as error:
        trouble = str(error)
    except Interrupted as error:
        trouble, status = "interrupted", 128 + error.signal_number
    if trouble:
        if num_finished:
            trouble += f"\n{path} has the {num_finished} texts that were finished"
        raise EndedEarlyError(trouble, status)


commands.add_command(attend_command(_connection, _preparation, _numbers, _client))

"""The commands behind `layertap`: info, tokenize, encode, rerank, attend, serve."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from layertap import _options
from layertap._client import Client
from layertap._files import array_file
from layertap._interrupts import Interrupted, Interrupts
from layertap._pictures.command import attend_command
from layertap._results import Result
from layertap._tables import models_table, result_table, tokens_table
from layertap._texts import Texts
from layertap._transport import TLS
from layertap.errors import LayertapError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="layertap")
def commands() -> None:
    """Show the inner outputs of encoder models on a Layertap server."""


@commands.command()
@_options.connection
def info(**connection: Any) -> None:
    """Show the served models, or one with --model."""
    with _client(connection) as (client, options):
        name = options.pop("model")
        models = [client.model(name, **options)] if name else client.models(**options)
    Console().print(models_table(models))


@commands.command()
@click.argument("texts", nargs=-1, required=True)
@click.option("--without-special-tokens", is_flag=True, help="Only the tokens of the texts themselves.")
@_options.preparation
@_options.connection
def tokenize(texts: tuple[str, ...], **options: Any) -> None:
    """Show the tokens of TEXTS."""
    with _client(options) as (client, request):
        tokenized = client.tokenize(list(texts), **request)
    for text, tokens in zip(texts, tokenized, strict=True):
        Console().print(tokens_table(text, tokens))


@commands.command()
@click.argument("texts", nargs=-1)
@_options.source
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
@_options.selection
@_options.preparation
@_options.request
@_options.connection
def encode(
    texts: tuple[str, ...], source: IO[bytes] | None, output: Path | None, on_error: str, **options: Any
) -> None:
    """Show the outputs for TEXTS, or write them to a file.

    The name of an array in a file is the text's number, from 0, and the output: 0.last_hidden_state,
    0.pooler_output, 0.hidden_states, 0.attentions, 0.embeddings.0 (with 0.embeddings.0.scale for int8),
    0.logits (with 0.logit_ids for --top-k), 0.sparse_ids and 0.sparse_weights, 0.contacts, and with --tokens
    0.tokens.ids, 0.tokens.starts and so on.

    If a text fails, the connection is lost or the command is interrupted, the file has all texts that were
    finished before.
    """
    _check_texts(texts, source)
    with _client(options) as (client, request):
        given = Texts(texts, source, stops=on_error == "stop")
        # The order in a file does not matter, so each result is written as soon as it is complete.
        results = client.stream(
            given, ordered=output is None, on_error="return", **_options.encode_options(request)
        )
        if output is None:
            _show(given, results)
        else:
            _write(given, results, output)


@commands.command()
@click.argument("query")
@click.argument("texts", nargs=-1)
@_options.source
@click.option(
    "--top-k", type=click.IntRange(min=1), default=None, help="Show only the texts that score highest."
)
@click.option(
    "--activation",
    type=click.Choice(["none", "sigmoid"]),
    help="What to apply to the scores. [default: none]",
)
@_options.preparation
@_options.request
@_options.connection
def rerank(query: str, texts: tuple[str, ...], source: IO[bytes] | None, **options: Any) -> None:
    """Show TEXTS in the order of their scores for QUERY, by a cross-encoder.

    Each line has a score, the number of the text, from 0, and the text, separated by tabs.
    """
    _check_texts(texts, source)
    _options.check_prompts(options)
    given = Texts(texts, source, stops=True)
    lines = list(given)
    if given.not_utf8:
        raise click.ClickException(given.located(*min(given.not_utf8.items())))
    with _client(options) as (client, request):
        try:
            ranked = client.rerank(query, lines, **{"timeout": None, **request})
        except LayertapError as error:
            if error.input_index is None:
                raise
            raise click.ClickException(given.located(error.input_index, str(error))) from error
    for one in ranked:
        click.echo(f"{one.score:.6g}\t{one.index}\t{one.text}")


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


def _check_texts(texts: tuple[str, ...], source: IO[bytes] | None) -> None:
    if bool(texts) == (source is not None):
        raise click.UsageError("give TEXTS, or -i FILE")


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


commands.add_command(attend_command(_options.connection, _options.preparation, _options.numbers, _client))

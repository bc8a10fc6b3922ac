"""The commands behind `layertap`: info, tokenize, encode, rerank, attend, health, wait, serve."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from layertap import _options
from layertap._client import Client
from layertap._file_notes import Note
from layertap._files import ARRAY_SUFFIXES
from layertap._interrupts import Interrupted, Interrupts
from layertap._pictures.command import attend_command
from layertap._results import Model, Result
from layertap._tables import models_table, result_table, tokens_table
from layertap._texts import Texts
from layertap._texts import as_json as input_as_json
from layertap._transport import TLS
from layertap._types import Input
from layertap._writers import (
    JSON_SUFFIXES,
    json_line,
    ranked_line,
    result_file,
    tokens_line,
    write_json,
)
from layertap.errors import LayertapError


class EndedEarlyError(click.ClickException):
    """A command ended before all texts were finished; has the exit status."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click declares it as a class attribute


class Commands(click.Group):
    """The commands. After SIGINT, they exit with 130, as shells expect."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command, on a thread of its own."""
        interrupts = ctx.obj = Interrupts()

        def command() -> Any:
            with ctx.scope(cleanup=False):
                try:
                    return super(Commands, self).invoke(ctx)
                except EndedEarlyError:
                    raise
                except Exception:
                    interrupts.check()
                    raise

        try:
            return interrupts.run(command)
        except Interrupted as error:
            raise EndedEarlyError("interrupted", 128 + error.signal_number) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="layertap")
def commands() -> None:
    """Show the inner outputs of encoder models on a Layertap server.

    \b
    Examples:
      layertap info
      layertap encode "a text" --hidden-states 0,-1 --attentions -1
      layertap encode -i texts.txt --json | jq -c .embeddings[0]
    """


@commands.command()
@_options.connection
def info(**connection: Any) -> None:
    """Show the served models, or one with --model.

    \b
    Examples:
      layertap info
      layertap info --address host:50051 --model minilm
    """
    with _client(connection) as (client, options):
        name = options.pop("model")
        models = [client.model(name, **options)] if name else client.models(**options)
    _console().print(models_table(models))


@commands.command()
@click.argument("texts", nargs=-1)
@_options.source
@_options.inputs
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each text.")
@click.option("--without-special-tokens", is_flag=True, help="Only the tokens of the texts themselves.")
@_options.preparation
@_options.connection
def tokenize(
    texts: tuple[str, ...],
    source: IO[bytes] | None,
    pair_separator: str,
    json_lines: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show the tokens of TEXTS, or print them as JSON.

    \b
    Examples:
      layertap tokenize "a text" "another"
      layertap tokenize "a text" --without-special-tokens
      layertap tokenize -i texts.txt --json | jq -c .tokens.ids
      layertap tokenize -i inputs.jsonl --json
    """
    given = _texts(texts, source, stops=True, pair_separator=pair_separator, json_lines=json_lines)
    inputs = _whole_inputs(given)
    with _client(options) as (client, request), _located_errors(given):
        tokenized = client.tokenize(inputs, **{"timeout": None, **request})
    for index, (one, tokens) in enumerate(_interrupts().among(zip(inputs, tokenized, strict=True))):
        if as_json:
            write_json(sys.stdout, tokens_line(index, one, tokens))
        else:
            title = one if isinstance(one, str) else json.dumps(input_as_json(one), ensure_ascii=False)
            _console().print(tokens_table(title, tokens))


@commands.command()
@click.argument("texts", nargs=-1)
@_options.source
@_options.inputs
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write to this file instead of showing the outputs: .npz, .safetensors, .parquet or .jsonl; - is "
    "standard output, as JSON lines.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each text, with all numbers.")
@click.option(
    "--stack",
    is_flag=True,
    help="With -o FILE.npz or FILE.safetensors: one array for each output, and the texts; layertap.load reads it.",
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
    texts: tuple[str, ...],
    source: IO[bytes] | None,
    pair_separator: str,
    json_lines: bool,
    output: Path | None,
    as_json: bool,
    stack: bool,
    on_error: str,
    **options: Any,
) -> None:
    """Show the outputs for TEXTS, print them as JSON, or write them to a file.

    The name of an array in a .npz or .safetensors file is the text's number, from 0, and the output:
    0.last_hidden_state, 0.pooler_output, 0.hidden_states, 0.attentions, 0.embeddings.0 (with
    0.embeddings.0.scale for int8), 0.logits (with 0.logit_ids for --top-k), 0.sparse_ids and
    0.sparse_weights, 0.contacts, and with --tokens 0.tokens.ids, 0.tokens.starts and so on. With --stack, the
    names have no number: there is one array for each output, and `index` has the numbers of the texts.
    layertap.load reads such files, .parquet and .jsonl.

    If a text fails, the connection is lost or the command is interrupted, the file has all texts that were
    finished before.

    \b
    Examples:
      layertap encode "a text" --last-hidden-state --pooler
      layertap encode -i texts.txt --json | jq -c .embeddings[0]
      layertap encode -i texts.txt -o vectors.npz --stack
      layertap encode -i inputs.jsonl -o vectors.parquet
      layertap encode "New York never sleeps" --span 0:8 --span 9:14
    """
    given = _texts(
        texts, source, stops=on_error == "stop", pair_separator=pair_separator, json_lines=json_lines
    )
    to_stdout = as_json or output == Path("-")
    if to_stdout and output not in (None, Path("-")):
        raise click.UsageError("--json prints to standard output; for a file, give -o FILE.jsonl without it")
    if stack and (output is None or to_stdout):
        raise click.UsageError("--stack needs -o FILE.npz or -o FILE.safetensors")
    if stack and output is not None and output.suffix not in ARRAY_SUFFIXES:
        raise click.UsageError(f"--stack writes .npz and .safetensors; leave it out for {output.suffix}")
    with _client(options) as (client, request):
        model = None
        if output is not None and not to_stdout and (stack or output.suffix not in ARRAY_SUFFIXES):
            limit = {"timeout": request["timeout"]} if "timeout" in request else {}
            model = client.model(request["model"], **limit)
        in_order = to_stdout or output is None or stack
        results = client.stream(
            given, ordered=in_order, on_error="return", **_options.encode_options(request)
        )
        if to_stdout:
            _print_json(given, results)
        elif output is None:
            _show(given, results)
        else:
            _write(given, results, output, model, stack)


@commands.command()
@click.argument("query")
@click.argument("texts", nargs=-1)
@_options.source
@_options.json_lines
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each text.")
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
def rerank(
    query: str,
    texts: tuple[str, ...],
    source: IO[bytes] | None,
    json_lines: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show TEXTS in the order of their scores for QUERY, by a cross-encoder.

    Each line has a score, the number of the text, from 0, and the text, separated by tabs. With --json, it is an
    object with `index`, `score` and `text`.

    \b
    Examples:
      layertap rerank "how do bees fly" "Bees beat their wings." "Honey is sweet."
      layertap rerank "how do bees fly" -i texts.txt --top-k 10
      layertap rerank "how do bees fly" -i texts.jsonl --json | jq -r .text
    """
    _options.check_prompts(options)
    given = _texts(texts, source, stops=True, json_lines=json_lines, only_text=True)
    lines = _whole_inputs(given)
    with _client(options) as (client, request), _located_errors(given):
        ranked = client.rerank(query, lines, **{"timeout": None, **request})  # type: ignore[arg-type]
    for one in ranked:
        if as_json:
            write_json(sys.stdout, ranked_line(one))
        else:
            click.echo(f"{one.score:.6g}\t{one.index}\t{one.text}")


@commands.command()
@_options.connection
def health(**connection: Any) -> None:
    """Print the server's health. The exit status is 0 only if it is SERVING, and has the model that --model names.

    \b
    Examples:
      layertap health --address host:50051
      layertap health && layertap info
    """
    with _client(connection) as (client, options):
        name = options.pop("model")
        status = client.health(**options)
        if name and status == "SERVING":
            client.model(name, **options)
    click.echo(status)
    if status != "SERVING":
        click.get_current_context().exit(1)


@commands.command()
@_options.connection
def wait(**connection: Any) -> None:
    """Wait until the server is ready, for --timeout seconds (default: 60).

    \b
    Examples:
      layertap serve & layertap wait && layertap encode "a text"
      layertap wait --timeout 300 --model minilm
    """
    with _client(connection) as (client, options):
        model = client.wait_ready(options.get("timeout", 60.0), model=options["model"])
    click.echo(f"{model.name} is ready")


@commands.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Run a server, with the options of layertap-server.

    \b
    Examples:
      layertap serve --model minilm=/models/all-MiniLM-L6-v2
      layertap serve --help
    """
    beside = Path(sys.executable).with_name("layertap-server")
    program = str(beside) if beside.exists() else shutil.which("layertap-server")
    if program is None or not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        raise click.ClickException("the server needs the extra 'server': pip install 'layertap[server]'")
    os.execvp(program, [program, *arguments])


def _interrupts() -> Interrupts:
    """Those of the command that runs."""
    return click.get_current_context().ensure_object(Interrupts)


def _console() -> Console:
    """Standard output. A pipe has no width, so nothing is folded for it, unless COLUMNS sets one."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if has_width else _PIPE_WIDTH)


def _texts(texts: tuple[str, ...], source: IO[bytes] | None, *, json_lines: bool, **options: Any) -> Texts:
    """The inputs of a command: its arguments, or the lines of a file."""
    if bool(texts) == (source is not None):
        raise click.UsageError("give TEXTS, or -i FILE")
    if json_lines and options.get("pair_separator"):
        raise click.UsageError("--pair-separator is for texts; lines of JSON have the field pair")
    is_json = json_lines or Path(str(getattr(source, "name", ""))).suffix in JSON_SUFFIXES
    return Texts(texts, source, json_lines=is_json and source is not None, **options)


def _whole_inputs(given: Texts) -> list[Input]:
    """All inputs of a command that needs them at once."""
    inputs = list(given)
    if given.problems:
        raise click.ClickException(given.located(*min(given.problems.items())))
    return inputs


@contextmanager
def _located_errors(given: Texts) -> Iterator[None]:
    """Adds the file and the line to the error of an input."""
    try:
        yield
    except LayertapError as error:
        if error.input_index is None:
            raise
        raise click.ClickException(given.located(error.input_index, str(error))) from error


_PIPE_WIDTH = 10_000


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
            _interrupts().close_on_signal(client)
            yield client, options
    except LayertapError as error:
        raise click.ClickException(str(error)) from error
    except BrokenPipeError:  # click ends without a word, as other programs in a pipe do
        raise
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise click.ClickException(str(error)) from error


def _show(texts: Texts, results: Iterable[tuple[int, Result | LayertapError]]) -> None:
    for index, result in _interrupts().among(results):
        if isinstance(result, LayertapError):
            texts.failed(index, result)
            if texts.stops:
                break
            click.echo(f"skipped: {texts.failure_text(index)}", err=True)
            continue
        texts.take(index)
        _console().print(result_table(f"{index}: {result.token_count} tokens", result))
        if result.tokens is not None:
            _console().print(tokens_table("", result.tokens))
    if texts.stops and texts.failures:
        raise click.ClickException(texts.failure_text(min(texts.failures)))


def _print_json(texts: Texts, results: Iterable[tuple[int, Result | LayertapError]]) -> None:
    """Prints a line for each result, and never a part of one."""
    note: dict[str, Any] | None = None
    for index, result in _interrupts().among(results):
        if isinstance(result, LayertapError):
            texts.failed(index, result)
            if texts.stops:
                break
            click.echo(f"skipped: {texts.failure_text(index)}", err=True)
            continue
        note = note or Note(result._asked).as_json()  # the request is the same for all
        write_json(sys.stdout, json_line(index, texts.take(index), result, note))
    if texts.stops and texts.failures:
        raise click.ClickException(texts.failure_text(min(texts.failures)))


class RateColumn(ProgressColumn):
    """The texts that are finished in a second."""

    def render(self, task: Task) -> Text:
        """The rate, or nothing as long as it is unknown."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


def _write(
    texts: Texts,
    results: Iterable[tuple[int, Result | LayertapError]],
    path: Path,
    model: Model | None,
    stack: bool,
) -> None:
    """Writes arrays as they arrive, and shows the progress. The file keeps all finished texts."""
    columns = (
        *(TextColumn("texts"), BarColumn(), MofNCompleteColumn(), RateColumn()),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    num_finished = 0
    trouble, status = "", 1
    try:
        with (
            result_file(path, model=model, numbered=not stack) as file,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            task = progress.add_task("texts", total=texts.total)
            for index, result in _interrupts().among(results):
                if isinstance(result, LayertapError):
                    texts.failed(index, result)
                    file.failed(index, texts.failure_text(index))
                    if not texts.stops:
                        line = f"skipped: {texts.failure_text(index)}"
                        progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
                    continue
                file.add(index, texts.take(index), result)
                num_finished += 1
                progress.advance(task)
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

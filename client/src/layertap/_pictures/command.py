"""The command `layertap attend`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from layertap._client import Client
from layertap._pictures import page, plots, terminal
from layertap._pictures.attention_maps import AttentionMaps
from layertap._results import Model
from layertap._types import Attentions, Pair

_SUFFIXES = (".html", ".png", ".svg")

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
OpenClient = Callable[[dict[str, Any]], AbstractContextManager[tuple[Client, dict[str, Any]]]]


def attend_command(
    connection: Decorator, preparation: Decorator, numbers: Callable[..., Any], open_client: OpenClient
) -> click.Command:
    """The command, with the options and the client that it shares with the others."""

    @click.command()
    @click.argument("text")
    @click.option(
        "--pair", metavar="SECOND", help="A second text, which the model reads with TEXT as a pair."
    )
    @click.option(
        "--layer",
        "layers",
        metavar="N,N,…",
        callback=numbers,
        help="Only these layers, from 0; -1 is the last. [default: all; in the terminal, the last]",
    )
    @click.option(
        "--head",
        "heads",
        metavar="N,N,…",
        callback=numbers,
        help="Only these heads, from 0. [default: all; in the terminal, their mean]",
    )
    @click.option("--mean", is_flag=True, help="The mean over the heads, for each layer.")
    @click.option(
        "-o",
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write a page to look at the maps (.html), or a picture of them (.png, .svg; needs matplotlib).",
    )
    @preparation
    @connection
    def attend(
        text: str,
        pair: str | None,
        layers: tuple[int, ...],
        heads: tuple[int, ...],
        mean: bool,
        output: Path | None,
        **options: Any,
    ) -> None:
        """Show the attention maps of TEXT: where each token looks.

        Without -o, a heat map is drawn in the terminal. With -o FILE.html, all maps are written to a page that
        needs no network: choose a layer and a head, and hover a token to see where it looks.

        \b
        Examples:
          layertap attend "The cat sat on the mat because it was tired."
          layertap attend "The cat sat." --layer 2 --head 7
          layertap attend "Is it cold?" --pair "It froze last night." -o maps.html
        """
        if output is not None and output.suffix.lower() not in _SUFFIXES:
            raise click.UsageError(f"{output} must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
        if output is not None and output.suffix.lower() != ".html":
            try:
                plots.require_matplotlib()
            except ImportError as error:
                raise click.ClickException(str(error)) from None
        with open_client(options) as (client, request):
            limits = {name: request[name] for name in ("timeout",) if name in request}
            model = client.model(request["model"], **limits)
            chosen = _Choice(model, layers, heads, mean, in_terminal=output is None)
            if output is None:
                _draw(client, request, text, pair, chosen)
            else:
                _write(client, request, text, pair, chosen, output)

    return attend


class _Choice:
    """Which maps of a model to ask for: `layers` and `heads` by the model's numbers."""

    def __init__(
        self,
        model: Model,
        layers: Sequence[int],
        heads: Sequence[int],
        mean: bool,
        *,
        in_terminal: bool,
    ) -> None:
        self.model = model
        self.layers = _numbers("--layer", layers, model.num_layers, "layers")
        self.heads = _numbers("--head", heads, model.num_attention_heads, "heads")
        self.mean = mean or (in_terminal and not heads)
        if in_terminal and not layers:
            self.layers = self.layers[-1:]

    @property
    def num_maps(self) -> int:
        return len(self.layers) * (1 if self.mean else len(self.heads))

    def maps(
        self, client: Client, request: dict[str, Any], text: str, pair: str | None, num_positions: int | None
    ) -> AttentionMaps:
        """Asks for the maps, or for the part of them at the first positions."""
        positions = () if num_positions is None else tuple(range(num_positions))
        result = client.encode(
            text if pair is None else Pair(text, pair),
            tokens=True,
            attentions=Attentions(
                self.layers,
                self.heads,
                mean_over_heads=self.mean,
                query_positions=positions,
                key_positions=positions,
            ),
            **request,
        )
        maps = AttentionMaps.of(
            result,
            layers=self.layers,
            heads=None if self.mean else self.heads,
            query_positions=positions or None,
            key_positions=positions or None,
            texts=[text] if pair is None else [text, pair],
        )
        return maps.as_mean_of(len(self.heads)) if self.mean else maps


def _numbers(option: str, given: Sequence[int], count: int, things: str) -> tuple[int, ...]:
    """The model's numbers, each once; all of them if none is given."""
    for number in given:
        if not -count <= number < count:
            raise click.UsageError(f"{option} {number}: the model has {count} {things}, 0 to {count - 1}")
    return tuple(dict.fromkeys(number % count for number in given)) or tuple(range(count))


def _num_tokens(client: Client, request: dict[str, Any], text: str, pair: str | None) -> int:
    return len(client.tokenize(text if pair is None else Pair(text, pair), **request))


def _draw(client: Client, request: dict[str, Any], text: str, pair: str | None, chosen: _Choice) -> None:
    console = Console()
    num_tokens = _num_tokens(client, request, text, pair)
    num_shown = min(num_tokens, terminal.max_tokens(console.width))
    maps = chosen.maps(client, request, text, pair, num_shown if num_shown < num_tokens else None)
    for layer in range(maps.shape[0]):
        for head in range(maps.shape[1]):
            console.print(terminal.heat_map(maps, layer, head, console.width, in_color=console.is_terminal))
    if num_shown < num_tokens:
        click.echo(
            f"Shown are the first {num_shown} of {num_tokens} tokens, which fit the width of the terminal. "
            "All are in the page that -o FILE.html writes.",
            err=True,
        )


def _write(
    client: Client, request: dict[str, Any], text: str, pair: str | None, chosen: _Choice, path: Path
) -> None:
    page.check_size(chosen.num_maps * _num_tokens(client, request, text, pair) ** 2)
    maps = chosen.maps(client, request, text, pair, None)
    with _replacing(path) as partial:
        if path.suffix.lower() == ".html":
            heading = page.Heading(chosen.model.name, (text,) if pair is None else (text, pair))
            partial.write_bytes(page.page(maps, heading))
        else:
            plots.write_picture(maps, partial, path.suffix.lower()[1:])
    count = "1 attention map" if chosen.num_maps == 1 else f"{chosen.num_maps} attention maps"
    click.echo(f"{path}: {count} of {len(maps.labels)} tokens", err=True)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to. The file gets its name only when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

"""The options of the commands, and what they mean for a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import click

from layertap._client import DEFAULT_ADDRESS
from layertap._types import (
    ActivationName,
    Attentions,
    DtypeName,
    Embedding,
    EncodeOptions,
    EncodingName,
    HiddenStates,
    LayerMergeName,
    Logits,
    PoolingName,
    Span,
    Sparse,
)

_F = TypeVar("_F", bound=Callable[..., Any])


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Parses a list such as 0,-1."""
    try:
        return tuple(int(number) for number in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0,-1") from None


def _numbers_or_all(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """Parses a list such as 0,-1. True for "all"; None if the option is not given."""
    return None if value is None else value == "all" or numbers(ctx, param, value)


def _layers_or_pairs(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """Parses a list of layers as `_numbers_or_all`, or of heads such as 2:3,5:0, which gives (layer, head)
    pairs."""
    if value is None or ":" not in value:
        return _numbers_or_all(ctx, param, value)
    try:
        return [(int(layer), int(head)) for layer, head in (pair.split(":") for pair in value.split(","))]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of LAYER:HEAD such as 2:3,5:0") from None


def _spans(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[Span, ...]:
    """Parses spans such as 0:8 and 0:2:word."""
    spans = []
    for one in value:
        start, _, rest = one.partition(":")
        end, _, unit = rest.partition(":")
        if not (start.isdecimal() and end.isdecimal() and unit in ("", "character", "token", "word")):
            raise click.BadParameter(f"{one!r} is not START:END or START:END:UNIT such as 0:8 or 0:2:word")
        spans.append(Span(int(start), int(end), unit or "character"))  # type: ignore[arg-type]
    return tuple(spans)


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
        help="Time limit of the command. [default: 60; for encode, rerank and tokenize no limit]",
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

source = click.option(
    "-i",
    "--input",
    "source",
    type=click.File("rb"),
    help="Read texts from this UTF-8 file, one for each line; - is standard input.",
)

json_lines = click.option(
    "--jsonl",
    "json_lines",
    is_flag=True,
    help='With -i: each line is an object with "text", "pair", "ids" or "words". Set for FILE.jsonl.',
)

inputs = _all_of(
    click.option(
        "--pair-separator",
        default="",
        metavar="TEXT",
        help="Each text is a pair: what is before the first separator, and what is after it.",
    ),
    json_lines,
)

request = _all_of(
    click.option(
        "--prompt-text",
        "prompt",
        default="",
        metavar="TEXT",
        help="Text to put before each text, instead of --prompt.",
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
        "--positions",
        metavar="N,N,…",
        callback=numbers,
        help="With --last-hidden-state, --hidden-states or --logits: only these token positions.",
    ),
    click.option(
        "--attentions",
        metavar="all|N,N,…|L:H,…",
        callback=_layers_or_pairs,
        help="Attention maps of these layers, from 0: (layers, heads, queries, keys). L:H is head H of layer L.",
    ),
    click.option("--heads", metavar="N,N,…", callback=numbers, help="With --attentions: only these heads."),
    click.option(
        "--queries",
        metavar="N,N,…",
        callback=numbers,
        help="With --attentions: only the rows of these token positions.",
    ),
    click.option(
        "--keys",
        metavar="N,N,…",
        callback=numbers,
        help="With --attentions: only the columns of these token positions.",
    ),
    click.option("--mean-heads", is_flag=True, help="With --attentions: the mean over the heads."),
    click.option(
        "--embedding",
        is_flag=True,
        help="The embedding, (D): as the model is configured, or by the options below. The default output.",
    ),
    click.option(
        "--pooling",
        type=click.Choice(get_args(PoolingName)),
        multiple=True,
        help="How to pool the tokens; none gives a vector for each token, (T, D). Several are concatenated.",
    ),
    click.option(
        "--span",
        "spans",
        multiple=True,
        metavar="START:END[:UNIT]",
        callback=_spans,
        help="Pool this part of each text, in units of character (the default), token or word. Repeatable.",
    ),
    click.option("--layers", metavar="N,N,…", callback=numbers, help="Hidden states to pool. [default: -1]"),
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
    click.option(
        "--exclude-special-tokens",
        is_flag=True,
        default=None,
        help="Leave special tokens out of the embedding.",
    ),
    click.option(
        "--without-projection",
        is_flag=True,
        default=None,
        help="The embedding before the modules, such as Dense, that the model is configured with.",
    ),
    click.option("--logits", is_flag=True, help="Scores of the model's head, (labels) or (T, labels)."),
    click.option("--sparse", is_flag=True, help="Sparse vector over the vocabulary: ids and weights."),
    click.option(
        "--top-k",
        type=click.IntRange(min=1),
        default=None,
        help="With --logits or --sparse: only the highest scores or weights.",
    ),
    click.option(
        "--activation",
        type=click.Choice(get_args(ActivationName)),
        help="With --logits: what to apply to them. [default: none]",
    ),
    click.option("--contacts", is_flag=True, help="Contact map of a protein, (T, T) without special tokens."),
    click.option("--tokens", is_flag=True, help="The tokens."),
    click.option(
        "--dtype",
        type=click.Choice(get_args(DtypeName)),
        default="float32",
        show_default=True,
        help="Element type of tensors in the reply.",
    ),
)


def check_prompts(options: Mapping[str, Any]) -> None:
    """Raises UsageError for two prompts."""
    if options["prompt"] and options["prompt_name"]:
        raise click.UsageError("give --prompt or --prompt-text, not both")


def encode_options(options: dict[str, Any]) -> EncodeOptions:
    """Converts options of the command line to keyword options of `Client.stream`."""
    check_prompts(options)
    maps = _attentions(options)
    embedding = _embedding(options)
    top_k, activation, positions = (options.pop(name) for name in ("top_k", "activation", "positions"))
    logits, sparse = options["logits"], options["sparse"]
    hidden_states, last = options["hidden_states"], options["last_hidden_state"]
    if top_k is not None and not (logits or sparse):
        raise click.UsageError("--top-k needs --logits or --sparse")
    if activation is not None and not logits:
        raise click.UsageError("--activation needs --logits")
    if positions and not (last or hidden_states or logits):
        raise click.UsageError("--positions needs --last-hidden-state, --hidden-states or --logits")
    if positions and hidden_states:
        hidden_states = HiddenStates(() if hidden_states is True else hidden_states, positions)
    outputs = (
        "last_hidden_state",
        "pooler_output",
        "hidden_states",
        "tokens",
        "logits",
        "sparse",
        "contacts",
    )
    if maps is None and embedding is None and not any(options[name] for name in outputs):
        embedding = Embedding()
    options |= {
        "last_hidden_state_positions": positions if positions and last else None,
        "hidden_states": hidden_states,
        "attentions": maps,
        "embeddings": embedding,
        "logits": Logits(positions, top_k or 0, activation) if logits else None,
        "sparse": Sparse(top_k or 0) if sparse else None,
    }
    return cast(EncodeOptions, options)


def _attentions(options: dict[str, Any]) -> Attentions | None:
    layers = options.pop("attentions")
    heads, queries, keys, mean = (options.pop(name) for name in ("heads", "queries", "keys", "mean_heads"))
    if layers is None:
        if heads or queries or keys or mean:
            raise click.UsageError("--heads, --queries, --keys and --mean-heads need --attentions")
        return None
    if isinstance(layers, list):
        if heads or mean:
            raise click.UsageError("--attentions with LAYER:HEAD takes neither --heads nor --mean-heads")
        return Attentions(query_positions=queries, key_positions=keys, pairs=layers)
    return Attentions(() if layers is True else layers, heads, mean, queries, keys)


def _embedding(options: dict[str, Any]) -> Embedding | None:
    """The embedding, if it or any of its options is given."""
    names = ("spans", "layers", "layer_merge", "normalize", "dimensions", "encoding")
    flags = ("exclude_special_tokens", "without_projection")
    given = {name: options.pop(name) for name in ("pooling", *names, *flags)}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    if not options.pop("embedding") and not given:
        return None
    pooling = given.get("pooling", ())
    if len(pooling) == 1:
        given["pooling"] = pooling[0]
    return Embedding(**given)

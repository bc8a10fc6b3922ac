"""What the commands show: models, tokens and results as tables."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from layertap._types import Array, Model, Result, Tokens

_SHOWN_VALUES = 4


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    # Text keeps brackets as they are: a string would be read as markup, and tokens are full of them.
    table = Table(*columns, title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def models_table(models: Iterable[Model]) -> Table:
    """One row a model: its shape, outputs, limits, dtype and device."""
    columns = ("model", "architecture", "shape", "outputs", "embedding", "limits", "runs")
    return _table("", columns, map(_model_row, models))


def _model_row(model: Model) -> tuple[str, ...]:
    outputs = ["last_hidden_state", "hidden_states"]
    outputs += ["pooler_output"] * model.has_pooler + ["attentions"] * model.has_attentions
    shape_lines = (
        f"{model.num_layers} layers",
        f"{model.hidden_size} wide",
        f"{model.num_attention_heads} heads",
        f"{model.vocab_size} tokens",
    )
    limits = model.limits
    limit_lines = (
        f"{model.max_tokens} tokens a text",
        f"{limits.max_inputs_per_request} texts a request",
        f"{_size(limits.max_message_bytes)} a message",
        f"{_size(limits.max_result_bytes)} a result",
    )
    return (
        model.name + (f"\n{model.revision}" if model.revision else ""),
        model.architecture,
        "\n".join(shape_lines),
        "\n".join(outputs),
        model.default_pooling + ("\nnormalized" if model.default_normalize else ""),
        "\n".join(limit_lines),
        f"{model.compute_dtype}\n{model.device}",
    )


def tokens_table(title: str, tokens: Tokens) -> Table:
    """One row a token: its text, id and the characters that it covers."""
    rows = (
        (
            position,
            token,
            tokens.ids[position],
            "" if special else f"{tokens.starts[position]}:{tokens.ends[position]}",
        )
        for position, (token, special) in enumerate(zip(tokens.tokens, tokens.special, strict=True))
    )
    return _table(title, ("", "token", "id", "characters"), rows)


def result_table(title: str, result: Result) -> Table:
    """One row an array: its name, shape, dtype and first values."""
    rows = (
        (name, array.shape, array.dtype, _first_values(array))
        for name, array in result.arrays().items()
        if not name.startswith("tokens.")
    )
    return _table(title, ("output", "shape", "dtype", "first values"), rows)


def _first_values(array: Array) -> str:
    shown = array.reshape(-1)[:_SHOWN_VALUES]
    text = " ".join(
        np.format_float_positional(value, 4, trim="k") if shown.dtype.kind == "f" else str(value)
        for value in shown
    )
    return text + (" …" if array.size > _SHOWN_VALUES else "")


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes} B"

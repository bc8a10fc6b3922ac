"""Tables of models, tokens and results for the command line."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from layertap._results import Model, Result, Tokens
from layertap._types import Array

_SHOWN_VALUES = 4
_SHOWN_LABELS = 4
_LABEL_CHARACTERS = 24


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    table.title = Text(title) if title else None
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # A str would be parsed as markup, and tokens contain brackets; a Text is shown as it is.
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def models_table(models: Iterable[Model]) -> Table:
    """One row for each model: its shape, outputs, limits, dtype and device; if any has a head, also that."""
    models = list(models)
    columns = ["model", "shape", "outputs", "embedding", "limits"]
    rows = [[*_model_row(model)] for model in models]
    if any(model.head for model in models):
        columns.append("head")
        for row, model in zip(rows, models, strict=True):
            row.append("\n".join(_head_lines(model)))
    return _table("", columns, rows)


def _head_lines(model: Model) -> Iterable[str]:
    """The kind of the head, and its first labels."""
    if model.head:
        yield model.head
    if model.labels:
        yield f"{len(model.labels)} label{'s' if len(model.labels) > 1 else ''}"
    for label in model.labels[:_SHOWN_LABELS]:
        yield label if len(label) <= _LABEL_CHARACTERS else label[: _LABEL_CHARACTERS - 1] + "…"
    if len(model.labels) > _SHOWN_LABELS:
        yield "…"


def _model_row(model: Model) -> Iterable[str]:
    limits = model.limits
    cells = (
        (model.name, model.revision, f"{model.compute_dtype} on {model.device}"),
        (
            model.architecture,
            f"{model.num_layers} layers",
            f"{model.num_attention_heads} heads",
            f"hidden {model.hidden_size}",
            f"vocab {model.vocab_size}",
        ),
        (
            "last_hidden_state",
            "hidden_states",
            "pooler_output" if model.has_pooler else "",
            "attentions" if model.has_attentions else "",
            "logits" if model.head else "",
            "sparse" if model.has_sparse else "",
            "contacts" if model.has_contacts else "",
        ),
        (
            "not given" if model.embedding_unsupported else model.default_pooling,
            "normalized" if model.default_normalize else "",
            *model.prompts,
        ),
        (
            f"{model.max_tokens} tokens",
            f"{limits.max_inputs_per_request} inputs",
            f"{_size(limits.max_message_bytes)} message",
            f"{_size(limits.max_result_bytes)} result",
        ),
    )
    return ("\n".join(filter(None, cell)) for cell in cells)


def tokens_table(title: str, tokens: Tokens) -> Table:
    """One row for each token: its text, id and the characters that it covers."""
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
    """One row for each array: its name, shape, dtype and first values."""
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

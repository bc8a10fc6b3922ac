"""Writes results: JSON lines, Parquet, and arrays one by one or stacked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from layertap._files import array_file, finished_file
from layertap._results import Quantized, Result
from layertap._texts import as_json
from layertap._types import Array, Input

JSON_SUFFIXES = (".jsonl", ".ndjson")
# Results in one row group of a Parquet file.
_GROUP = 1000


class Write(Protocol):
    """Adds one result to a file."""

    def __call__(self, index: int, given: Input, result: Result) -> None: ...


@contextmanager
def result_file(path: Path, *, stack: bool) -> Iterator[Write]:
    """Creates a file in the format of its suffix, and yields the function that adds a result to it.

    If the body raises, the file is still written with the results added before, if there are any.

    Raises:
        ValueError: the suffix is unknown, or with `stack` the arrays of an output differ in shape.
        ModuleNotFoundError: the format needs a package that is not installed.
    """
    if path.suffix in JSON_SUFFIXES and not stack:
        with finished_file(path) as (partial, added), partial.open("w", encoding="utf-8") as file:

            def write_line(index: int, given: Input, result: Result) -> None:
                file.write(json_line(index, given, result))
                added()

            yield write_line
    elif path.suffix == ".parquet" and not stack:
        with _parquet(path) as write:
            yield write
    elif stack:
        if path.suffix not in (".npz", ".safetensors"):
            raise ValueError(f"{path} must end in .npz or .safetensors for stacked arrays")
        rows: dict[int, dict[str, Array]] = {}

        def keep(index: int, given: Input, result: Result) -> None:
            rows[index] = {name: np.array(array) for name, array in result.arrays().items()}
            first = next(iter(rows.values()))
            for name, array in rows[index].items():
                if name not in first or array.shape != first[name].shape:
                    shape = first[name].shape if name in first else None
                    del rows[index]
                    raise ValueError(
                        f"text {index} has {name} of shape {array.shape}, and the first one {shape}: arrays of "
                        "different shapes cannot be stacked; leave out --stack"
                    )

        with array_file(path) as write_array:
            try:
                yield keep
            finally:
                order = sorted(rows)
                if order:
                    write_array("index", np.array(order, np.int64))
                    for name in rows[order[0]]:
                        write_array(name, np.stack([rows[index][name] for index in order]))
    else:
        with array_file(path) as write_array:

            def write_arrays(index: int, given: Input, result: Result) -> None:
                for name, array in result.arrays().items():
                    write_array(f"{index}.{name}", array)

            yield write_arrays


def json_line(index: int, given: Input, result: Result) -> str:
    """A result as one line of JSON: its number, its input, and all of its arrays as lists. NaN and infinity,
    which JSON does not have, are null."""
    fields: dict[str, Any] = {"index": index, **as_json(given), "token_count": result.token_count}
    fields["truncated_tokens"] = result.truncated_tokens
    for name, array in result.arrays().items():
        if not name.startswith(("tokens.", "embeddings.")):
            fields[name] = _listed(array)
    if result.embeddings:
        # int8 vectors are given as the numbers that they stand for.
        fields["embeddings"] = [
            _listed(one.dequantize() if isinstance(one, Quantized) else one) for one in result.embeddings
        ]
    if result.tokens is not None:
        tokens = {
            name.removeprefix("tokens."): array.tolist()
            for name, array in result.arrays().items()
            if name.startswith("tokens.")
        }
        fields["tokens"] = {"tokens": list(result.tokens.tokens), **tokens}
    return json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def write_json(file: IO[str], index: int, given: Input, result: Result) -> None:
    """Writes and flushes a whole line."""
    file.write(json_line(index, given, result))
    file.flush()


def _listed(array: Array) -> Any:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        numbers = array.astype(object)
        numbers[~np.isfinite(array)] = None
        return numbers.tolist()
    return array.tolist()


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    """A row for each result: `index`, the input's fields, `token_count`, and a list for each array; of one with
    more than one axis, all numbers in one list, and its shape in the column `NAME.shape`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs pyarrow: pip install pyarrow", name="pyarrow") from error
    rows: list[dict[str, Any]] = []
    with finished_file(path) as (partial, added):
        writer: Any = None

        def flush() -> None:
            nonlocal writer
            if not rows:
                return
            columns = {name: _column(pyarrow, name, [row[name] for row in rows]) for name in rows[0]}
            table = pyarrow.table(columns)
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(partial, table.schema)
            writer.write_table(table)
            rows.clear()

        def write(index: int, given: Input, result: Result) -> None:
            row: dict[str, Any] = {"index": index, "text": None, "pair": None, "ids": None, "words": None}
            row |= {**as_json(given), "token_count": result.token_count}
            for name, array in result.arrays().items():
                row[name] = array
                if array.ndim > 1:
                    row[f"{name}.shape"] = np.array(array.shape)
            rows.append(row)
            added()
            if len(rows) == _GROUP:
                flush()

        try:
            yield write
        finally:
            flush()
            if writer is not None:
                writer.close()


def _column(pyarrow: Any, name: str, values: list[Any]) -> Any:
    """A column: of arrays, lists of their element type."""
    first = values[0]
    if not isinstance(first, np.ndarray):
        texts = pyarrow.string()
        of_input = {"text": texts, "pair": pyarrow.list_(texts), "words": pyarrow.list_(texts)}
        of_input["ids"] = pyarrow.list_(pyarrow.int64())
        return pyarrow.array(values, of_input.get(name, pyarrow.int64()))
    kind = pyarrow.list_(pyarrow.from_numpy_dtype(first.dtype))
    if first.ndim == 0:
        return pyarrow.array([value.item() for value in values], pyarrow.from_numpy_dtype(first.dtype))
    return pyarrow.array([value.reshape(-1) for value in values], kind)

"""Writes results to a file as they arrive: JSON lines, Parquet, and arrays, stacked or one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from layertap._file_notes import Note
from layertap._files import ARRAY_SUFFIXES, NOTE, array_file, finished_file, write_arrays
from layertap._results import Model, Quantized, Ranked, Result, Tokens
from layertap._stacks import TIMES, TOKEN_FIELDS, TOKEN_STRINGS, Stack
from layertap._texts import as_json, json_text
from layertap._types import Array, Input

JSON_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
INPUT_FIELDS = ("text", "pair", "ids", "type_ids", "words")
# A row group of a Parquet file has so many results, or ends after so many bytes.
_GROUP = 1000
_GROUP_BYTES = 64 << 20

_Write: TypeAlias = "Callable[[int, Input | None, Result], None]"


class ResultFile:
    """A file to which results of one request are added; the results of several have not the same outputs."""

    def __init__(self, model: Model | None = None) -> None:
        self.write: _Write
        self.num_results = 0
        self._model = model
        self._failures: dict[int, str] = {}
        self._request: Any = None
        self._outputs: dict[str, tuple[Any, ...]] = {}
        self._has_inputs = False

    def add(self, index: int, given: Input | None, result: Result) -> None:
        """Adds the result of the input `index`.

        Raises:
            ValueError: its outputs or its request are not those of the first result.
        """
        outputs = {name: (array.dtype, array.ndim) for name, array in result.arrays().items()}
        if not self.num_results:
            self._request, self._outputs, self._has_inputs = result._asked, outputs, given is not None
        elif outputs != self._outputs or self._has_inputs != (given is not None):
            names = sorted({name for name, _ in outputs.items() ^ self._outputs.items()}) or ["its input"]
            raise ValueError(
                f"result {index} differs from the first one in {', '.join(names)}: save the results of "
                "different requests to files of their own"
            )
        elif result._asked is not self._request and result._asked != self._request:
            raise ValueError(
                f"result {index} is from a request with other options than the first one: save the results of "
                "different requests to files of their own"
            )
        self.write(index, given, result)
        self.num_results += 1

    def failed(self, index: int, message: str) -> None:
        """Records that an input failed."""
        self._failures[index] = message

    def note(self) -> Note:
        """What is known about all results that were added."""
        return Note(self._request, self._model, self._failures)


@contextmanager
def result_file(path: Path, *, model: Model | None = None, numbered: bool = False) -> Iterator[ResultFile]:
    """Creates a file in the format of its suffix. If the body raises, the file is still written with the results
    added before, if there are any.

    With `numbered`, the arrays in a .npz or .safetensors file are not stacked: their names begin with the number
    of the input.

    Raises:
        ValueError: the suffix is unknown.
        ModuleNotFoundError: the format needs a package that is not installed.
        OSError: the file cannot be written.
    """
    file = ResultFile(model)
    opened: AbstractContextManager[_Write]
    if path.suffix in JSON_SUFFIXES:
        opened = _lines(path, file)
    elif path.suffix == PARQUET_SUFFIX:
        opened = _parquet(path, file)
    elif path.suffix in ARRAY_SUFFIXES and not numbered:
        opened = _stacked(path, file)
    else:
        opened = _numbered(path)
    with opened as file.write:
        yield file


@contextmanager
def _numbered(path: Path) -> Iterator[_Write]:
    with array_file(path) as write_array:

        def write(index: int, given: Input | None, result: Result) -> None:
            for name, array in result.arrays().items():
                write_array(f"{index}.{name}", array)

        yield write


@contextmanager
def _stacked(path: Path, file: ResultFile) -> Iterator[_Write]:
    with closing(Stack(path.parent)) as stack, finished_file(path) as (partial, added):
        try:
            yield stack.add
        finally:
            write_arrays(partial, path.suffix, stack.arrays(), json.dumps(file.note().as_json()))
            if file.num_results:
                added()


# ------------------------------------------------------------------------ JSON lines


@contextmanager
def _lines(path: Path, file: ResultFile) -> Iterator[_Write]:
    with finished_file(path) as (partial, added), partial.open("w", encoding="utf-8") as out:
        notes: list[dict[str, Any]] = []

        def write(index: int, given: Input | None, result: Result) -> None:
            if not notes:
                first = file.note().as_json()
                # Only the first line has the model.
                notes.extend([first, {name: value for name, value in first.items() if name != "model"}])
            out.write(json_line(index, given, result, notes[min(file.num_results, 1)]))
            added()

        yield write


def json_line(index: int, given: Input | None, result: Result, note: dict[str, Any] | None = None) -> str:
    """A result as one line of JSON: its number, its input, and all of its arrays as lists. NaN and infinity,
    which JSON does not have, are null.

    The last field, `layertap`, has what `load` needs in addition to give back the same result: the note, and the
    types and shapes of the arrays.
    """
    fields: dict[str, Any] = {"index": index, **(as_json(given) if given is not None else {})}
    fields |= {"token_count": result.token_count, "truncated_tokens": result.truncated_tokens}
    arrays = {name: array for name, array in result.arrays().items() if not name.startswith("tokens.")}
    exact: dict[str, Any] = dict(note or Note(result._asked).as_json())
    exact["timing"] = [getattr(result.timing, name) for name in TIMES]
    exact["arrays"] = {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()}
    not_finite = {name: found for name, array in arrays.items() if (found := _not_finite(array))}
    if not_finite:
        exact["not_finite"] = not_finite
    for name, array in arrays.items():
        if not name.startswith("embeddings."):
            fields[name] = _listed(array)
    if result.embeddings:
        # int8 vectors are given as the numbers that they stand for.
        fields["embeddings"] = [
            _listed(one.dequantize() if isinstance(one, Quantized) else one) for one in result.embeddings
        ]
        quantized = {
            name: _listed(array)
            for number, one in enumerate(result.embeddings)
            if isinstance(one, Quantized)
            for name, array in (
                (f"embeddings.{number}", one.values),
                (f"embeddings.{number}.scale", one.scale),
            )
        }
        if quantized:
            exact["quantized"] = quantized
    if result.tokens is not None:
        fields["tokens"] = tokens_as_json(result.tokens)
    fields[NOTE] = exact
    return _dumped(fields)


def tokens_as_json(tokens: Tokens) -> dict[str, Any]:
    """The parallel arrays of the tokens, as lists."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else list(value)
        for name in TOKEN_FIELDS
        for value in (getattr(tokens, name),)
    }


def tokens_line(index: int, given: Input, tokens: Tokens) -> str:
    """The tokens of an input as one line of JSON, with the names that `json_line` has."""
    return _dumped(
        {"index": index, **as_json(given), "token_count": len(tokens), "tokens": tokens_as_json(tokens)}
    )


def ranked_line(ranked: Ranked) -> str:
    """A text with its score as one line of JSON; a score of NaN is null."""
    score = ranked.score if np.isfinite(ranked.score) else None
    return _dumped({"index": ranked.index, "score": score, "text": ranked.text})


def _dumped(fields: dict[str, Any]) -> str:
    return json_text(fields) + "\n"


def write_json(file: IO[str], line: str) -> None:
    """Writes and flushes a whole line."""
    file.write(line)
    file.flush()


def _listed(array: Array) -> Any:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        numbers = array.astype(object)
        numbers[~np.isfinite(array)] = None
        return numbers.tolist()
    return array.tolist()


def _not_finite(array: Array) -> list[list[Any]]:
    """The place of each number that JSON does not have, among all numbers of the array, and its name."""
    if array.dtype.kind != "f":
        return []
    numbers = array.reshape(-1)
    return [[place, str(numbers[place])] for place in np.flatnonzero(~np.isfinite(numbers)).tolist()]


# --------------------------------------------------------------------------- Parquet


def parquet_library(path: Path) -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`.

    Raises:
        ModuleNotFoundError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs pyarrow: pip install 'layertap[parquet]'", name="pyarrow"
        ) from error
    return pyarrow, pyarrow.parquet


@contextmanager
def _parquet(path: Path, file: ResultFile) -> Iterator[_Write]:
    """A row for each result: `index`, the input's fields, `token_count`, and a list for each array; of one with
    more than one axis, all numbers in one list, and its shape in the column `NAME.shape`."""
    pyarrow, parquet = parquet_library(path)
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    with finished_file(path) as (partial, added):
        writer: Any = None

        def flush() -> None:
            nonlocal writer, num_bytes
            if not rows and writer is not None:
                return
            names = rows[0] if rows else ("index", *INPUT_FIELDS, "token_count", "truncated_tokens", *TIMES)
            table = pyarrow.table(
                {name: _column(pyarrow, name, [row[name] for row in rows]) for name in names}
            )
            if writer is None:
                writer = parquet.ParquetWriter(partial, table.schema)
            writer.write_table(table)
            rows.clear()
            num_bytes = 0

        def write(index: int, given: Input | None, result: Result) -> None:
            nonlocal num_bytes
            row: dict[str, Any] = {"index": index, **dict.fromkeys(INPUT_FIELDS)}
            row |= as_json(given) if given is not None else {}
            row |= {"token_count": result.token_count, "truncated_tokens": result.truncated_tokens}
            row |= {name: getattr(result.timing, name) for name in TIMES}
            for name, array in result.arrays().items():
                row[name] = array
                num_bytes += array.nbytes
                if array.ndim > 1:
                    row[f"{name}.shape"] = np.array(array.shape)
            if result.tokens is not None:
                row[TOKEN_STRINGS] = list(result.tokens.tokens)
            rows.append(row)
            if len(rows) == _GROUP or num_bytes > _GROUP_BYTES:
                flush()

        try:
            yield write
        finally:
            flush()
            writer.add_key_value_metadata({NOTE: json.dumps(file.note().as_json())})
            writer.close()
            if file.num_results:
                added()


def _column(pyarrow: Any, name: str, values: list[Any]) -> Any:
    """A column: of arrays, lists of their element type."""
    first = values[0] if values else None
    if not isinstance(first, np.ndarray):
        texts, numbers = pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.int64())
        kinds = {"text": pyarrow.string(), "pair": texts, "words": texts, "ids": numbers, "type_ids": numbers}
        kinds[TOKEN_STRINGS] = texts
        return pyarrow.array(values, kinds.get(name, pyarrow.int64()))
    if first.ndim == 0:
        return pyarrow.array(np.stack(values))
    # Much faster than a list of arrays.
    offsets = np.cumsum([0, *(value.size for value in values)], dtype=np.int32)
    numbers = np.concatenate([value.reshape(-1) for value in values])
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(numbers))

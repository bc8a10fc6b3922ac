"""Reads files of results, each format as a `Source`: the parts of one result at a time, as they are stored.

Whatever a damaged file leads to is raised as ValueError by `_saved.py`.
"""

from __future__ import annotations

import json
import mmap
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from layertap._file_notes import Note, NotReadableError, note_of, parse_note
from layertap._files import ARRAY_SUFFIXES, NOTE
from layertap._mapped_files import mapped_arrays
from layertap._results import Quantized, Result, Timing, Tokens
from layertap._stacks import COUNTS, INPUTS, TIMES, TOKEN_FIELDS, TOKEN_STRINGS, Pieces, pieces_of
from layertap._texts import from_json
from layertap._types import Array, Input, IntArray
from layertap._writers import INPUT_FIELDS, JSON_SUFFIXES, PARQUET_SUFFIX, parquet_library

_OUTPUTS = (
    *("last_hidden_state", "pooler_output", "hidden_states", "attentions", "logits", "logit_ids"),
    *("sparse_ids", "sparse_weights", "contacts"),
)
_DTYPES = {"float32", "float16", "int8", "uint8", "int32", "int64", "bool"}
_LINE = re.compile(rb'\{"index":(\d{1,18}),')


@dataclass(frozen=True, slots=True)
class Parts:
    """One result as it is stored: its arrays by their names in `Result.arrays`, the strings of its tokens."""

    token_count: int
    truncated_tokens: int
    timing: tuple[int, ...]
    arrays: Mapping[str, Array]
    tokens: tuple[str, ...] | None


class Source(Protocol):
    """The results of a file. `pieces` are its outputs as they are stored, if they are stored together."""

    note: Note
    index: IntArray
    has_inputs: bool
    pieces: Mapping[str, Pieces] | None

    def parts(self, number: int) -> Parts:
        """The parts of a result, by its place in the file."""

    def input(self, number: int) -> Input:
        """The input of a result."""


def source_of(path: Path) -> Source:
    """Opens a file in the format of its suffix.

    Raises:
        NotReadableError: the suffix is unknown, or the file is not of `layertap.save`.
        OSError: the file cannot be opened.
        ModuleNotFoundError: the format needs a package that is not installed.
        Exception: of any kind, if the file is damaged.
    """
    if path.suffix in ARRAY_SUFFIXES:
        return _Arrays(path)
    if path.suffix == PARQUET_SUFFIX:
        return _Parquet(path)
    if path.suffix in JSON_SUFFIXES:
        return _Lines(path)
    raise NotReadableError("its name must end in .npz, .safetensors, .parquet or .jsonl")


def result_of(parts: Parts, request: Any) -> Result:
    """The result of these parts; `request` is the message of the request, or None.

    Raises:
        ValueError, KeyError: the parts do not belong together.
    """
    arrays = dict(parts.arrays)
    embeddings: list[Array | Quantized] = []
    while (name := f"embeddings.{len(embeddings)}") in arrays:
        values, scale = arrays.pop(name), arrays.pop(f"{name}.scale", None)
        if scale is not None and scale.shape != values.shape[:-1]:
            raise ValueError(f"{name} has the shape {values.shape}, and its scale {scale.shape}")
        embeddings.append(values if scale is None else Quantized(values, scale))
    tokens = None
    if parts.tokens is not None:
        of_tokens: dict[str, Any] = {
            name: parts.tokens if name == "tokens" else arrays.pop(f"tokens.{name}") for name in TOKEN_FIELDS
        }
        tokens = Tokens(**of_tokens)
        if any(len(value) != len(tokens) for value in of_tokens.values()):
            raise ValueError("the arrays of the tokens differ in length")
    outputs: dict[str, Any] = {name: arrays.pop(name, None) for name in _OUTPUTS}
    if arrays:
        raise ValueError(f"it has {', '.join(sorted(arrays))}, which no result has")
    return Result(
        token_count=parts.token_count,
        truncated_tokens=parts.truncated_tokens,
        tokens=tokens,
        embeddings=tuple(embeddings),
        timing=Timing(*parts.timing),
        _asked=request,
        **outputs,
    )


def _strings(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError("the tokens are no list of strings")
    return tuple(found)


def _number(found: Any) -> int:
    if type(found) is not int:
        raise ValueError(f"{found!r} is not a number")
    return found


class _Arrays:
    """A .npz or .safetensors file: a few arrays, which are mapped."""

    def __init__(self, path: Path) -> None:
        arrays, note = mapped_arrays(path)
        if note is None:
            if arrays and all(name.partition(".")[0].isdecimal() for name in arrays):
                raise NotReadableError(
                    "it has an array for each text and output, which numpy or safetensors read by name; write it "
                    "with `layertap encode --stack`, or with layertap.save, to load its results"
                )
            raise NotReadableError("it was not written by layertap.save or `layertap encode --stack`")
        self.note = parse_note(note)
        self.index, self._token_count, self._truncated_tokens, self._timing = (
            arrays[name] for name in COUNTS
        )
        num_results = len(self.index)
        for name in COUNTS:
            shape = (num_results, len(TIMES)) if name == "timing" else (num_results,)
            if arrays[name].shape != shape or arrays[name].dtype != np.int64:
                raise ValueError(f"{name} has the shape {arrays[name].shape}, not {shape}")
        pieces = dict(pieces_of(arrays, num_results))
        self._inputs = pieces.pop(INPUTS, None)
        self._tokens = pieces.pop(TOKEN_STRINGS, None)
        self.has_inputs = self._inputs is not None
        self.pieces: Mapping[str, Pieces] | None = pieces

    def parts(self, number: int) -> Parts:
        assert self.pieces is not None
        return Parts(
            int(self._token_count[number]),
            int(self._truncated_tokens[number]),
            tuple(self._timing[number].tolist()),
            {name: pieces[number] for name, pieces in self.pieces.items()},
            None if self._tokens is None else _strings(json.loads(self._tokens[number].tobytes())),
        )

    def input(self, number: int) -> Input:
        assert self._inputs is not None
        return from_json(self._inputs[number].tobytes())


class _Parquet:
    """A .parquet file: rows, of which one group is in memory."""

    pieces: Mapping[str, Pieces] | None = None

    def __init__(self, path: Path) -> None:
        _, parquet = parquet_library(path)
        self._file = parquet.ParquetFile(path, memory_map=True)
        note = (self._file.metadata.metadata or {}).get(NOTE.encode())
        if note is None:
            raise NotReadableError("it was not written by layertap.save or `layertap encode`")
        self.note = parse_note(note)
        metadata = self._file.metadata
        ends = np.cumsum([0, *(metadata.row_group(one).num_rows for one in range(metadata.num_row_groups))])
        self._starts: list[int] = ends.tolist()
        names = self._file.schema_arrow.names
        index = self._file.read(columns=["index"]).column("index").to_numpy()
        self.index: IntArray = np.ascontiguousarray(index, np.int64)
        if len(self.index) != self._starts[-1]:
            raise ValueError(f"it has {len(self.index)} numbers of results, and {self._starts[-1]} rows")
        other = {*COUNTS, *TIMES, *INPUT_FIELDS, TOKEN_STRINGS}
        self._arrays = [name for name in names if name not in other and not name.endswith(".shape")]
        self._has_tokens = TOKEN_STRINGS in names
        self._group = -1
        self._rows: Any = None
        self._lists: dict[str, tuple[Array, Array | None]] = {}  # the arrays of the group that were used
        self.has_inputs = len(self.index) > 0 and self._input_fields(0) != {}

    def _column(self, number: int, name: str) -> tuple[Any, int]:
        """The column of the row's group, and the row's place in it."""
        group = bisect_right(self._starts, number) - 1
        if group != self._group:
            self._rows, self._group, self._lists = self._file.read_row_group(group), group, {}
        return self._rows.column(name), number - self._starts[group]

    def _value(self, number: int, name: str) -> Any:
        column, row = self._column(number, name)
        return column[row].as_py()

    def _array(self, number: int, name: str) -> Array:
        column, row = self._column(number, name)
        if name not in self._lists:
            self._lists[name] = _of_column(column)
        values, offsets = self._lists[name]
        array: Array = values[row : row + 1].reshape(()) if offsets is None else values[slice(*offsets[row])]
        if f"{name}.shape" in self._rows.column_names:
            array = array.reshape(self._value(number, f"{name}.shape"))
        return array

    def parts(self, number: int) -> Parts:
        return Parts(
            _number(self._value(number, "token_count")),
            _number(self._value(number, "truncated_tokens")),
            tuple(_number(self._value(number, name)) for name in TIMES),
            {name: self._array(number, name) for name in self._arrays},
            _strings(self._value(number, TOKEN_STRINGS)) if self._has_tokens else None,
        )

    def _input_fields(self, number: int) -> dict[str, Any]:
        fields = {name: self._value(number, name) for name in INPUT_FIELDS}
        return {name: value for name, value in fields.items() if value is not None}

    def input(self, number: int) -> Input:
        return from_json(json.dumps(self._input_fields(number)))


def _of_column(column: Any) -> tuple[Array, Array | None]:
    """The numbers of a column, and for lists, the start and end of each, (rows, 2)."""
    offsets = None
    column = column.combine_chunks()
    if hasattr(column, "offsets"):
        bounds = column.offsets.to_numpy()
        column, offsets = column.values, np.stack([bounds[:-1], bounds[1:]], axis=1)
    numbers = column.to_numpy(zero_copy_only=False)
    if numbers.dtype.name not in _DTYPES:
        raise ValueError(f"a column has the type {numbers.dtype}")
    return numbers, offsets


class _Lines:
    """A .jsonl file: lines, of which each is parsed when it is used."""

    pieces: Mapping[str, Pieces] | None = None

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data: Any = b""
            if file.seek(0, 2):
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts = [0]
        index = []
        while self._starts[-1] < len(self._data):
            start, line = self._starts[-1], len(self._starts)
            end = self._data.find(b"\n", start)
            found = _LINE.match(self._data, start)
            if found is None:
                raise NotReadableError(f"line {line} was not written by layertap.save or `layertap encode`")
            if end < 0:
                raise ValueError(f"line {line} has no end")
            index.append(int(found[1]))
            self._starts.append(end + 1)
        self.index: IntArray = np.array(index, np.int64)
        self.note, self.has_inputs = Note(), False
        self._request: Any = None
        if index:
            first = self._line(0)
            self.note, self.has_inputs = note_of(first[NOTE]), any(name in first for name in INPUT_FIELDS)
            self._request = first[NOTE]["format"], first[NOTE].get("request")

    def _line(self, number: int) -> Any:
        found = json.loads(self._data[self._starts[number] : self._starts[number + 1]])
        if NOTE not in found:
            raise NotReadableError(
                f"line {number + 1} has no field {NOTE!r}: it was written by an older `layertap encode`, "
                "or by another program"
            )
        return found

    def parts(self, number: int) -> Parts:
        line = self._line(number)
        exact = line[NOTE]
        if (exact["format"], exact.get("request")) != self._request:  # as where files were joined
            raise NotReadableError(
                f"line {number + 1} is of a request with other options than line 1: load a file of each request"
            )
        arrays = {}
        quantized, not_finite = exact.get("quantized", {}), exact.get("not_finite", {})
        for name, (dtype, shape) in exact["arrays"].items():
            output, _, place = name.partition(".")
            values = quantized[name] if name in quantized else line[output]
            if place and name not in quantized:
                values = values[int(place)]
            arrays[name] = _array(values, dtype, shape, not_finite.get(name, ()))
        strings = None
        if "tokens" in line:
            tokens = dict(line["tokens"])
            strings = _strings(tokens.pop("tokens"))
            for name, values in tokens.items():
                arrays[f"tokens.{name}"] = _array(
                    values, "bool" if name == "special" else "int64", [len(strings)], ()
                )
        return Parts(
            _number(line["token_count"]),
            _number(line["truncated_tokens"]),
            tuple(_number(one) for one in exact["timing"]),
            arrays,
            strings,
        )

    def input(self, number: int) -> Input:
        line = self._line(number)
        return from_json(json.dumps({name: line[name] for name in INPUT_FIELDS if name in line}))


def _array(values: Any, dtype: str, shape: list[int], not_finite: Any) -> Array:
    """The array of a list of lists of numbers; None stands for the numbers that `not_finite` has."""
    if dtype not in _DTYPES:
        raise ValueError(f"{dtype} is not the type of an array")
    array = np.array(values, np.float64 if dtype.startswith("float") else dtype).astype(dtype).reshape(shape)
    numbers = array.reshape(-1)
    for place, name in not_finite:
        numbers[_number(place)] = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}[name]
    return array

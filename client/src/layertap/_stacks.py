"""Many results as a few arrays: one for each output, not one for each output and result.

The arrays of an output are stored one after another. If all have the same shape, this is one stacked array,
(N, …). If only their first axes differ, such as the tokens, it is (rows of all results, …), otherwise (numbers
of all results,); then the array NAME.shape, (N, axes), has the shape of each.

Inputs and the strings of tokens are lines of JSON in UTF-8, and stored likewise, as arrays of bytes.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from layertap._results import Result, Timing, Tokens
from layertap._texts import as_json, json_text
from layertap._types import Array, Input, IntArray

INDEX, TOKEN_COUNT, TRUNCATED_TOKENS, TIMING = "index", "token_count", "truncated_tokens", "timing"
COUNTS = (INDEX, TOKEN_COUNT, TRUNCATED_TOKENS, TIMING)
INPUTS, TOKEN_STRINGS = "inputs", "tokens.tokens"
TIMES = tuple(field.name for field in fields(Timing))
TOKEN_FIELDS = tuple(field.name for field in fields(Tokens))
# What an output takes in memory before it is put in a file.
_MAX_BUFFER_BYTES = 1 << 20
# Products of shapes up to this are exact in floats, too.
_MAX_SIZE = 1 << 52


class Stack:
    """Collects results, and keeps little of them in memory: the rest is in temporary files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counts: list[tuple[int, ...]] = []
        self._columns: dict[str, _Column] = {}

    def add(self, index: int, given: Input | None, result: Result) -> None:
        """Adds a result; all have the same outputs, and `given` or not."""
        arrays = result.arrays()
        if result.tokens is not None:
            arrays[TOKEN_STRINGS] = _line(result.tokens.tokens)
        if given is not None:
            arrays[INPUTS] = _line(as_json(given))
        for name, array in arrays.items():
            if name not in self._columns:
                self._columns[name] = _Column(self._folder, array.dtype)
            self._columns[name].add(array)
        times = (getattr(result.timing, name) for name in TIMES)
        self._counts.append((index, result.token_count, result.truncated_tokens, *times))

    def close(self) -> None:
        """Closes the temporary files. The arrays remain."""
        for column in self._columns.values():
            column.close()

    def arrays(self) -> dict[str, Array]:
        """The arrays by name; they may be mapped from files."""
        counts = np.array(self._counts, np.int64).reshape(-1, 3 + len(TIMES))
        named: dict[str, Array] = dict(zip(COUNTS, (*counts.T[:3], counts[:, 3:]), strict=True))
        named = {name: np.ascontiguousarray(array) for name, array in named.items()}
        for name, column in self._columns.items():
            named |= column.arrays(name)
        return named


def _line(value: object) -> Array:
    return np.frombuffer((json_text(value) + "\n").encode(), np.uint8)


class _Column:
    """The arrays of one output."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self._folder = folder
        self._dtype = dtype
        self._shapes: list[tuple[int, ...]] = []
        self._buffer = bytearray()
        self._file: IO[bytes] | None = None

    def add(self, array: Array) -> None:
        self._shapes.append(array.shape)
        self._buffer += np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        if len(self._buffer) > _MAX_BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (see `close`)
        self._file.write(self._buffer)
        self._buffer.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def arrays(self, name: str) -> dict[str, Array]:
        data: Any = self._buffer
        if self._file is not None:
            self._flush()
            self._file.flush()
            data = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        numbers = np.frombuffer(data, self._dtype) if len(data) else np.zeros(0, self._dtype)
        rests = {shape[1:] for shape in self._shapes}
        if len(set(self._shapes)) == 1:
            return {name: numbers.reshape(len(self._shapes), *self._shapes[0])}
        if len(rests) == 1:
            numbers = numbers.reshape(sum(shape[0] for shape in self._shapes), *rests.pop())
        return {name: numbers, f"{name}.shape": np.array(self._shapes, np.int64)}


class Pieces:
    """The arrays of one output, taken from the stored array.

    `rows` is the stored array, and `shapes` the array NAME.shape, (N, axes), or None where all have the same shape.

    Raises:
        ValueError: the stored array does not have the sum of the shapes.
    """

    def __init__(self, name: str, rows: Array, shapes: Array | None, num_results: int) -> None:
        self.rows = rows
        self.shapes = shapes
        self._numbers = rows.reshape(-1)
        self._offsets: IntArray | None = None
        if shapes is None:
            if rows.shape[:1] != (num_results,):
                raise ValueError(f"{name} has the shape {rows.shape} for {num_results} results")
            return
        if (
            shapes.dtype != np.int64
            or shapes.ndim != 2
            or len(shapes) != num_results
            or shapes.min(initial=0) < 0
        ):
            raise ValueError(f"{name}.shape is not one shape for each of {num_results} results")
        if shapes.astype(np.float64).prod(axis=1).sum() > _MAX_SIZE:
            raise ValueError(f"{name}.shape is too large")
        self._offsets = np.concatenate([[0], shapes.prod(axis=1).cumsum()]).astype(np.int64)
        if self._offsets[-1] != rows.size:
            raise ValueError(f"{name} has {rows.size} numbers, and {name}.shape is for {self._offsets[-1]}")

    def __getitem__(self, number: int) -> Array:
        """The array of a result; aligned, and otherwise a view."""
        if self.shapes is None or self._offsets is None:
            found = self.rows[number : number + 1].reshape(self.rows.shape[1:])
        else:
            start, end = self._offsets[number : number + 2].tolist()
            found = self._numbers[start:end].reshape(self.shapes[number].tolist())
        return np.require(found, requirements=["ALIGNED"])


def pieces_of(arrays: Mapping[str, Array], num_results: int) -> dict[str, Pieces]:
    """The outputs of a file by name, and in the same way the inputs and the strings of tokens.

    Raises:
        ValueError: the arrays do not belong together.
    """
    shapes = {f"{name}.shape" for name in arrays}
    return {
        name: Pieces(name, array, arrays.get(f"{name}.shape"), num_results)
        for name, array in arrays.items()
        if name not in COUNTS and name not in shapes
    }

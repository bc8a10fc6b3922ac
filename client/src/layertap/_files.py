"""Writes named arrays to a .npz or .safetensors file, one by one or all together.

The libraries' own writers need all arrays in memory at once. The file appears under its name only when it is
complete; after an error, it has the arrays that were written before.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np

from layertap._types import Array

Write: TypeAlias = Callable[[str, Array], None]

ARRAY_SUFFIXES = (".npz", ".safetensors")
# The name of the note in a file: an array of bytes in .npz, an entry of the metadata in .safetensors.
NOTE = "layertap"

SAFETENSORS_DTYPES = {
    "f4": "F32",
    "f2": "F16",
    "i1": "I8",
    "u1": "U8",
    "i4": "I32",
    "i8": "I64",
    "b1": "BOOL",
}


@contextmanager
def finished_file(path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yields the path to write to, and a function to call for each part that was written. At the end, the file
    gets its name.

    If the body raises, the file is kept as well if any part was written.
    """
    partial = path.with_name(f".{path.name}.partial")
    num_parts = 0
    trouble: BaseException | None = None

    def added() -> None:
        nonlocal num_parts
        num_parts += 1

    try:
        try:
            yield partial, added
        except BaseException as error:
            trouble = error
        if (num_parts or trouble is None) and partial.exists():
            os.replace(partial, path)
        if trouble is not None:
            raise trouble
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def array_file(path: Path) -> Iterator[Write]:
    """Creates a file in the format of its suffix, and yields the function that adds an array to it.

    If the body raises, the file is still written with the arrays added before, if there are any.

    Raises:
        ValueError: the suffix is neither .npz nor .safetensors.
        OSError: the file cannot be written.
    """
    formats = {".npz": _npz, ".safetensors": _safetensors}
    if path.suffix not in formats:
        raise ValueError(f"{path} must end in .npz, .safetensors, .parquet or .jsonl")
    with finished_file(path) as (partial, added):
        trouble: BaseException | None = None
        with formats[path.suffix](partial) as write:

            def add(name: str, array: Array) -> None:
                write(name, array)
                added()

            try:
                yield add
            except BaseException as error:
                trouble = error  # the file is completed first
        if trouble is not None:
            raise trouble


def write_arrays(path: Path, suffix: str, arrays: Mapping[str, Array], note: str) -> None:
    """Writes a whole file, in the format of the suffix: arrays, which may be mapped from files, and a note."""
    if suffix == ".npz":
        with _npz(path) as write:
            for name, array in arrays.items():
                write(name, array)
            write(NOTE, np.frombuffer(note.encode(), np.uint8))
        return
    header: dict[str, object] = {"__metadata__": {NOTE: note}}
    start = 0
    # Elements of the largest size come first, so that all are aligned.
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, array in ordered:
        header[name] = _safetensors_entry(array, start)
        start += array.nbytes
    with path.open("wb") as file:
        file.write(_safetensors_header(header))
        for _, array in ordered:
            file.write(np.ascontiguousarray(array).data)


def _safetensors_entry(array: Array, start: int) -> dict[str, object]:
    dtype = SAFETENSORS_DTYPES[array.dtype.str[1:]]
    return {"dtype": dtype, "shape": array.shape, "data_offsets": (start, start + array.nbytes)}


def _safetensors_header(header: Mapping[str, object]) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _npz(path: Path) -> Iterator[Write]:
    with zipfile.ZipFile(path, "w") as archive:

        def write(name: str, array: Array) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)

        yield write


@contextmanager
def _safetensors(path: Path) -> Iterator[Write]:
    # The file begins with a header that has the places of all arrays, which are known only at the end. So the
    # data is first written to a temporary file.
    header: dict[str, object] = {}
    with tempfile.TemporaryFile(dir=path.parent) as data:

        def write(name: str, array: Array) -> None:
            header[name] = _safetensors_entry(array, data.tell())
            data.write(np.ascontiguousarray(array).data)

        yield write
        data.seek(0)
        with path.open("wb") as file:
            file.write(_safetensors_header(header))
            shutil.copyfileobj(data, file, 1 << 20)

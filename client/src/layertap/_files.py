"""Named arrays into one .npz or .safetensors file, one array in memory at a time.

Both libraries' own writers want all arrays at once; these files are for more than fits. A file
appears under its name only when it is whole: with all arrays, or those until an error.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np

from layertap._types import Array

Write: TypeAlias = Callable[[str, Array], None]

_SAFETENSORS_DTYPES = {"f4": "F32", "f2": "F16", "i1": "I8", "u1": "U8", "i8": "I64", "b1": "BOOL"}


@contextmanager
def array_file(path: Path) -> Iterator[Write]:
    """Opens a file by its suffix; gives the function that adds an array to it.

    An error inside keeps the arrays that were added before, where there are any.

    Raises:
        ValueError: the suffix is neither .npz nor .safetensors.
        OSError: the file cannot be written.
    """
    formats = {".npz": _npz, ".safetensors": _safetensors}
    if path.suffix not in formats:
        raise ValueError(f"{path} ends neither in .npz nor in .safetensors")
    partial = path.with_name(f".{path.name}.partial")
    num_arrays = 0
    trouble: BaseException | None = None
    try:
        with formats[path.suffix](partial) as write:

            def add(name: str, array: Array) -> None:
                nonlocal num_arrays
                write(name, array)
                num_arrays += 1

            try:
                yield add
            except BaseException as error:
                trouble = error
        if num_arrays or trouble is None:
            os.replace(partial, path)
        if trouble is not None:
            raise trouble
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _npz(path: Path) -> Iterator[Write]:
    with zipfile.ZipFile(path, "w") as archive:

        def write(name: str, array: Array) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)

        yield write


@contextmanager
def _safetensors(path: Path) -> Iterator[Write]:
    # The format begins with every array's place, which is known at the end: the data waits beside it.
    header: dict[str, object] = {}
    with tempfile.TemporaryFile(dir=path.parent) as data:

        def write(name: str, array: Array) -> None:
            start = data.tell()
            data.write(np.ascontiguousarray(array).data)
            dtype = _SAFETENSORS_DTYPES[array.dtype.str[1:]]
            header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (start, data.tell())}

        yield write
        data.seek(0)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(data, file, 1 << 20)

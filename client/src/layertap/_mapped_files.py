"""Reads the arrays of .npz and .safetensors files without copying them: they are views of the mapped file.

Files may come from anywhere, so that nothing is believed: what a file says about its arrays is compared with its
size, and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from layertap._files import NOTE, SAFETENSORS_DTYPES
from layertap._types import Array

_DTYPES = {name: np.dtype(f"<{code}") for code, name in SAFETENSORS_DTYPES.items()}
_MAX_HEADER_BYTES = 100 << 20
_LOCAL_HEADER_BYTES = 30
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '[<|]([a-z]\d)', 'fortran_order': False, 'shape': \(([\d, ]{0,99})\), \} *\n",
    re.DOTALL,
)


def mapped_arrays(path: Path) -> tuple[dict[str, Array], str | None]:
    """The arrays of a file by name, in the format of the suffix, and the note, if the file has one.

    Raises:
        OSError: the file cannot be opened.
        Exception: of any kind, if the file is damaged, or its arrays are compressed.
    """
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if path.suffix == ".safetensors":
            return _safetensors(data)
        arrays = {}
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".npy"):
                    arrays[member.filename.removesuffix(".npy")] = _npy(data, member)
    note = arrays.pop(NOTE, None)
    return arrays, None if note is None else note.tobytes().decode()


def _safetensors(data: memoryview) -> tuple[dict[str, Array], str | None]:
    size = int.from_bytes(data[:8], "little")
    if size > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"its header has {size} bytes, and the file {len(data)}")
    header = json.loads(bytes(data[8 : 8 + size]))
    note = header.pop("__metadata__", {}).get(NOTE)
    body = data[8 + size :]
    arrays = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        arrays[name] = _array(body, start, end, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return arrays, note


def _npy(data: memoryview, member: zipfile.ZipInfo) -> Array:
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"its array {member.filename} is compressed, and only numpy.load reads that")
    local = bytes(data[member.header_offset : member.header_offset + _LOCAL_HEADER_BYTES])
    if local[:4] != b"PK\x03\x04":
        raise ValueError(f"its array {member.filename} is not where the file says")
    # Behind the fixed part of the header are the name and the extra fields.
    sizes = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    start = member.header_offset + _LOCAL_HEADER_BYTES + sizes
    end = start + member.file_size
    header = _NPY.match(data[start : start + 4096])
    if header is None:
        raise ValueError(f"its array {member.filename} has a header of another kind")
    shape = tuple(int(one) for one in header[2].split(b",") if one.strip())
    return _array(data, start + header.end(), end, np.dtype(f"<{header[1].decode()}"), shape)


def _array(data: memoryview, start: Any, end: Any, dtype: np.dtype[Any], shape: tuple[Any, ...]) -> Array:
    numbers = (start, end, *shape)
    if any(type(one) is not int or one < 0 for one in numbers) or dtype.kind not in "fiub":
        raise ValueError(f"an array has the place {start} to {end}, the shape {shape} and the type {dtype}")
    if end > len(data) or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of {dtype}{shape} has the place {start} to {end} of {len(data)} bytes")
    return np.frombuffer(data[start:end], dtype).reshape(shape) if end > start else np.zeros(shape, dtype)

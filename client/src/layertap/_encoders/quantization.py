"""The precisions of `SentenceTransformer.encode`: they are relative to all vectors of a call, so they are
computed here from float32, unlike `Embedding.encoding`, which is computed on the server for each vector."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np

from layertap import _arguments
from layertap._types import Array

PrecisionName: TypeAlias = Literal["float32", "int8", "uint8", "binary", "ubinary"]


def check_precision(value: object) -> None:
    """Raises ValueError for an unknown precision."""
    if value not in get_args(PrecisionName):
        raise _arguments.wrong_value("precision", value, f"give one of {get_args(PrecisionName)}")


def quantized(vectors: Array, precision: PrecisionName) -> Array:
    """(N, D) vectors in a precision; (N, D / 8), rounded up, for "binary" and "ubinary".

    Raises:
        ValueError: int8 and uint8 need at least two vectors, from which they take the range of each dimension.
    """
    if precision == "float32" or not len(vectors):
        return vectors
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    if precision == "binary":
        return np.asarray(np.packbits(vectors > 0, axis=-1) - np.uint8(128)).view(np.int8)
    if len(vectors) == 1:
        raise ValueError(
            f"precision={precision!r} takes the range of each dimension from all vectors of the call: give "
            'several texts, or use client.embed(…, encoding="int8"), which has a scale for each vector'
        )
    starts = vectors.min(axis=0)
    steps = (vectors.max(axis=0) - starts) / 255
    steps = np.where(steps == 0, 1, steps)
    levels = np.clip(np.floor((vectors - starts) / steps), 0, 255)
    return np.asarray(levels if precision == "uint8" else levels - 128).astype(precision)

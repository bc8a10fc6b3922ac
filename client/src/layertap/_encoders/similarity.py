"""How similar vectors are, as sentence-transformers computes it."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from layertap import _arguments
from layertap._torch import as_numpy, has_torch, load_torch
from layertap._types import Array

SimilarityName: TypeAlias = Literal["cosine", "dot", "euclidean", "manhattan"]


def similarity_name(value: object) -> SimilarityName:
    """The name of a similarity function.

    Raises:
        ValueError: there is none of this name.
    """
    for name in get_args(SimilarityName):
        if value == name:
            return name  # type: ignore[no-any-return]
    raise _arguments.wrong_value("similarity_fn_name", value, f"give one of {get_args(SimilarityName)}")


def similarity(name: SimilarityName, first: Any, second: Any) -> Any:
    """(N, M): of each of N vectors with each of M. A single vector counts as (1, D)."""
    one, other = _matrix(first), _matrix(second)
    if name in ("cosine", "dot"):
        if name == "cosine":
            one, other = _normalized(one), _normalized(other)
        return _tensor(one @ other.T)
    # One row at a time: all differences at once would take N·M·D numbers.
    rows = [-_distance(name, row, other) for row in one]
    return _tensor(np.array(rows, one.dtype).reshape(len(one), len(other)))


def similarity_pairwise(name: SimilarityName, first: Any, second: Any) -> Any:
    """(N,): of each of N vectors with the one at the same place."""
    one, other = _matrix(first), _matrix(second)
    if len(one) != len(other):
        raise ValueError(f"there are {len(one)} and {len(other)} vectors: give as many on both sides")
    if name in ("cosine", "dot"):
        if name == "cosine":
            one, other = _normalized(one), _normalized(other)
        return _tensor((one * other).sum(-1))
    return _tensor(-_distance(name, one, other))


def _matrix(vectors: Any) -> Array:
    if isinstance(vectors, list | tuple):
        vectors = [as_numpy(vector) for vector in vectors]
    array = np.asarray(as_numpy(vectors))
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32)
    return array[None] if array.ndim == 1 else array


def _normalized(array: Array) -> Array:
    return np.asarray(array / np.maximum(np.linalg.norm(array, axis=-1, keepdims=True), 1e-12))


def _distance(name: SimilarityName, one: Array, other: Array) -> Array:
    difference = one - other
    if name == "euclidean":
        return np.asarray(np.sqrt((difference**2).sum(-1)))
    return np.asarray(np.abs(difference).sum(-1))


def _tensor(array: Array) -> Any:
    return load_torch("similarity").from_numpy(array) if has_torch() else array

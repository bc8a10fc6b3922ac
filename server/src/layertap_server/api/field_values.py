"""Checks single values of a request: numbers of enums, and indices."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TypeVar

import numpy as np

from layertap_server import errors

# More indices than this are checked as an array.
MANY_INDICES = 64

EnumT = TypeVar("EnumT", bound=IntEnum)


def known_enum(kind: type[EnumT], value: int, default: EnumT | None, field: str) -> EnumT:
    """The enum's member with this number; the default, if there is one, for 0.

    Raises a `RequestError` that names the field for an unknown number.
    """
    if value == 0 and default is not None:
        return default
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(f"{member.value} ({member.name})" for member in kind)
        raise errors.invalid_argument(
            field, f"unknown value {value}; known values are {known}", reason="UNKNOWN_ENUM"
        ) from None


def indices_in(values: Sequence[int], size: int, field: str, what: str, part: str = "") -> tuple[int, ...]:
    """The indices as 0…size-1, where negative ones count from the end; all indices if `values` is empty.

    An error names `field`, the number of the value in it, and `part`.
    """
    if not values:
        return tuple(range(size))
    if len(values) > MANY_INDICES:
        array = np.array(values[:], np.int64)
        if array.min() >= -size and array.max() < size:
            return tuple((array % size).tolist())
    for i, value in enumerate(values):
        if not -size <= value < size:
            raise errors.invalid_argument(
                f"{field}[{i}]{part}",
                f"{value} is out of range: there are {size} {what}, 0 to {size - 1} or -{size} to -1",
                reason="OUT_OF_RANGE",
            )
    return tuple(value % size for value in values)

"""Frozen dataclasses as JSON, by the types of their fields: a new field travels without a line here.

An object is the list of the values of its fields, in their order; fields that its constructor does not take
are left out. A field may be an int, a float, a bool, a str, an IntEnum, another such dataclass, a tuple or a
mapping from str of these, or a union of types that JSON tells apart, such as `int | tuple[int, ...] | None`.

Reading checks every value against its type. What the values mean is for the reader to check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import IntEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
# What makes a value of a type, of a value that `json.loads` has returned.
Read = Callable[[Any], Any]

# Beyond it, arithmetic with floats would raise errors that nobody expects.
MAX_INT = 2**63 - 1


def to_json(value: Any) -> Any:
    """What `json.dumps` takes."""
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [to_json(one) for one in value]
    if isinstance(value, Mapping):
        return {key: to_json(one) for key, one in value.items()}
    kind: Any = type(value)
    return [to_json(getattr(value, name)) for name in names_of(kind)]


def from_json(kind: type[T], data: Any) -> T:
    """Raises `TypeError` or `ValueError` for what is no such object."""
    hint: Any = kind
    value: T = read(readers(hint), data)
    return value


def read(by_type: Mapping[type, Read], data: Any) -> Any:
    one = by_type.get(type(data))
    if one is None:
        raise TypeError(f"a value of type {type(data).__name__} where it cannot be")
    return one(data)


@cache
def readers(hint: Any) -> Mapping[type, Read]:
    """By the type of a JSON value, what makes a value of the hinted type of it. Raises `TypeError` if such
    values cannot travel."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return dict.fromkeys((NoneType, bool, int, float, str, list, dict), same)
    if hint in (NoneType, bool, str):
        return {hint: same}
    if hint is int:
        return {int: integer}
    if hint is float:
        return {float: finite, int: lambda data: float(integer(data))}
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return {int: hint}
    if isinstance(hint, type) and is_dataclass(hint):
        return {list: object_reader(hint)}
    if origin in (Union, UnionType):
        tables = [readers(one) for one in args]
        merged = {kind: one for table in tables for kind, one in table.items()}
        if len(merged) == sum(map(len, tables)):
            return merged
    elif origin is tuple and args[1:] == (...,):
        items = readers(args[0])
        return {list: lambda data: tuple([read(items, one) for one in data])}
    elif origin is tuple:
        each = [readers(one) for one in args]
        return {list: lambda data: tuple([read(*one) for one in zip(each, data, strict=True)])}
    elif origin is Mapping and args[0] is str:
        values = readers(args[1])
        return {dict: lambda data: {key: read(values, one) for key, one in data.items()}}
    raise TypeError(f"values of type {hint} cannot travel over a link")


def same(data: Any) -> Any:
    return data


def integer(data: int) -> int:
    if abs(data) > MAX_INT:
        raise ValueError("an integer of more than 64 bits")
    return data


def finite(data: float) -> float:
    if not math.isfinite(data):
        raise ValueError("a number that is not finite")
    return data


@cache
def names_of(kind: Any) -> Sequence[str]:
    return [one.name for one in fields(kind) if one.init]


def object_reader(kind: type) -> Read:
    hints = get_type_hints(kind)
    names = names_of(kind)
    each = [readers(hints[name]) for name in names]

    def read_object(data: list[Any]) -> Any:
        values = [read(*one) for one in zip(each, data, strict=True)]
        return kind(**dict(zip(names, values, strict=True)))

    return read_object


def layout(hint: Any) -> str:
    """The names and types of all fields, in words: the same in two processes that can read each other."""
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return f"{[(name, layout(hints[name])) for name in names_of(hint)]}"
    return f"{hint}{[layout(one) for one in get_args(hint)]}"

"""Checks arguments before anything is sent. An error names the argument and the remedy."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import AsyncIterable, Collection, Iterable, Mapping, Sequence, Set
from enum import Enum
from typing import Any, Literal, TypeAlias

import numpy as np

from layertap._types import Pair, TokenIds, Words

OnError: TypeAlias = Literal["raise", "return"]


class ClientDefault(Enum):
    """The default of a call's argument that is set for the whole client."""

    TIMEOUT = "the client's timeout"

    def __repr__(self) -> str:
        return f"<{self.value}>"


Timeout: TypeAlias = "float | Literal[ClientDefault.TIMEOUT] | None"
CLIENT_TIMEOUT: Literal[ClientDefault.TIMEOUT] = ClientDefault.TIMEOUT

_MAX_UINT32 = (1 << 32) - 1
_INT32 = (-(1 << 31), (1 << 31) - 1)
# gRPC treats a deadline that is too far away as one that has passed.
_LONGEST_S = 1e8

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def wrong_type(argument: str, value: object, remedy: str) -> TypeError:
    """The error for an argument of a wrong type; the message has the argument, its value and the remedy."""
    return TypeError(f"{_shown(argument, value)}: {remedy}")


def wrong_value(argument: str, value: object, remedy: str) -> ValueError:
    """As `wrong_type`, for a wrong value of the right type."""
    return ValueError(f"{_shown(argument, value)}: {remedy}")


def _shown(argument: str, value: object) -> str:
    kind = type(value).__name__
    if value is None or isinstance(value, str | bytes | int | float | np.generic):
        return f"{argument}={' '.join(_short.repr(value).split())}"
    return f"{argument} is {'an' if kind[:1] in 'aeiouAEIOU' else 'a'} {kind}"


# ------------------------------------------------------------------ single values


def text(argument: str, value: object) -> str:
    """A str that can be encoded as UTF-8.

    Raises:
        TypeError: the value is not a str.
        ValueError: it has a lone surrogate.
    """
    if isinstance(value, bytes | bytearray):
        raise wrong_type(argument, value, "give a str; bytes.decode() makes one")
    if not isinstance(value, str):
        raise wrong_type(argument, value, "give a str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise lone_surrogate(argument, value, error) from None
    return value


def lone_surrogate(argument: str, value: str, error: UnicodeEncodeError) -> ValueError:
    """The error for a text with a lone surrogate, which UTF-8 cannot encode."""
    return ValueError(
        f"{argument} has a lone surrogate, U+{ord(value[error.start]):04X}, at character {error.start}, "
        "which UTF-8 cannot encode; decode its source with errors='replace'"
    )


def optional_text(argument: str, value: object) -> str:
    """A str; None gives the empty one."""
    return "" if value is None else text(argument, value)


def flag(argument: str, value: object) -> bool:
    """A bool or numpy bool; None gives False."""
    if value is None or isinstance(value, bool | np.bool_):
        return bool(value)
    raise wrong_type(argument, value, "give True or False")


def whole_number(argument: str, value: object, low: int, high: int) -> int:
    """An int or numpy integer from `low` to `high`."""
    if isinstance(value, bool | np.bool_):
        raise wrong_type(argument, value, "give a whole number")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise wrong_type(argument, value, "give a whole number") from None
    if not low <= number <= high:
        raise wrong_value(argument, value, f"give a whole number from {low} to {high}")
    return number


def seconds(argument: str, value: object) -> float | None:
    """A time limit of more than 0 seconds; None is no limit."""
    if value is None:
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise wrong_type(argument, value, "give seconds as a number, or None for no limit")
    number = float(value)
    if not number > 0:  # true for NaN too
        raise wrong_value(argument, value, "give seconds above 0, or None for no limit")
    return None if number > _LONGEST_S else number


def on_error(value: object) -> OnError:
    """How errors of single inputs are reported."""
    if value == "raise":
        return "raise"
    if value == "return":
        return "return"
    raise wrong_value("on_error", value, "give 'raise' or 'return'")


def address(value: object) -> str:
    """The address of a server: a gRPC target, usually "host:port" or "unix:/path"."""
    example = 'give "host:port", such as "127.0.0.1:50051", or "unix:/path"'
    if not isinstance(value, str):
        raise wrong_type("address", value, example)
    if value.startswith(("http:", "https:", "grpc:", "grpcs:", "tcp:")):
        raise wrong_value("address", value, f"{example}; `tls=` turns TLS on")
    if ":" not in value:
        raise wrong_value("address", value, f"it has no port; {example}")
    return value


def token(value: object) -> str | None:
    """A bearer token that can be sent in an HTTP header."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise wrong_type("token", value, "give a str")
    if not value or not value.isascii() or not value.isprintable() or value != value.strip():
        # The message does not show the token, which is a secret.
        raise ValueError(
            "token is empty, or has outer spaces, line breaks or non-ASCII characters: strip it first"
        )
    return value


def max_message_bytes(value: object) -> int | None:
    """A limit on messages, cut to the 31 bits of gRPC's."""
    if value is None:
        return None
    return min(whole_number("max_message_bytes", value, 1, 1 << 62), _INT32[1])


def connections(value: object) -> int | None:
    """The most connections of a client; None leaves it to the server."""
    return None if value is None else whole_number("connections", value, 1, 1 << 16)


# ------------------------------------------------------------------------- lists


def sequence(argument: str, values: Any, remedy: str) -> Sequence[Any]:
    """An ordered collection that can be read more than once: a list, tuple, range, array or series."""
    if isinstance(values, list | tuple | range):
        return values
    if isinstance(values, np.ndarray) or hasattr(type(values), "tolist"):
        values = values.tolist()
    is_list = isinstance(values, Collection) and getattr(values, "ndim", 1) == 1
    if is_list and not isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set):
        return list(values)
    raise wrong_type(argument, values, remedy)


def numbers(argument: str, values: Any) -> list[int]:
    """A list of integers, such as indices. A single numpy integer gives a list of one."""
    if isinstance(values, np.integer):
        values = [values]
    remedy = "give a list of whole numbers"
    if isinstance(values, int) and not isinstance(values, bool):
        remedy += f", such as [{values}]"
    found = sequence(argument, values, remedy)
    return [whole_number(f"{argument}[{index}]", value, *_INT32) for index, value in enumerate(found)]


def token_ids(argument: str, values: Any) -> Sequence[int]:
    """A list of integers from 0 to 2**32 - 1."""
    found = sequence(argument, values, "give a list of token ids")
    if all(type(value) is int for value in found) and (
        not found or (min(found) >= 0 and max(found) <= _MAX_UINT32)
    ):
        return found
    return [whole_number(f"{argument}[{index}]", value, 0, _MAX_UINT32) for index, value in enumerate(found)]


def words(argument: str, values: Any) -> list[str]:
    """A list of str."""
    found = sequence(argument, values, "give a list of words, such as text.split()")
    return [text(f"{argument}[{index}]", value) for index, value in enumerate(found)]


_INPUT_KINDS = "a str, Pair, TokenIds or Words"


def check_inputs(values: object) -> None:
    """Raises TypeError if this is not an iterable of inputs, or is one that iterates over something else."""
    wanted = f"give a list of inputs, each {_INPUT_KINDS}"
    if isinstance(values, str | Pair | TokenIds | Words):
        raise wrong_type("inputs", values, "it is one input: give a list, such as [text]")
    if isinstance(values, bytes | bytearray | memoryview):
        raise wrong_type("inputs", values, f"{wanted}; bytes.decode() makes a str")
    if isinstance(values, Mapping):
        raise wrong_type("inputs", values, "its keys would be read: give list(inputs.values())")
    if isinstance(values, Set) and not hasattr(values, "mapping"):  # except dict keys, which are ordered
        raise wrong_type("inputs", values, f"it has no order; {wanted}")
    if getattr(values, "ndim", 1) != 1:
        raise wrong_type("inputs", values, f"it has {getattr(values, 'ndim', 0)} dimensions; {wanted}")
    if isinstance(values, AsyncIterable):
        raise wrong_type("inputs", values, "only AsyncClient reads an async iterable")
    if not isinstance(values, Iterable) and not hasattr(values, "__getitem__"):
        raise wrong_type("inputs", values, f"give {_INPUT_KINDS}, or a list of them")


def wrong_input(index: int, value: object) -> TypeError:
    """The error for an input of a wrong type; the message says how to convert it."""
    kind = type(value).__name__
    hint = ""
    if isinstance(value, bytes | bytearray):
        hint = "; bytes.decode() makes a str"
    elif value is None or (isinstance(value, float) and math.isnan(value)):
        hint = "; drop missing values first"
    elif isinstance(value, int | np.integer):
        hint = "; token ids go in as TokenIds([…])"
    elif isinstance(value, list | tuple):
        hint = "; two texts go in as Pair(first, second), words as Words([…]), token ids as TokenIds([…])"
    elif isinstance(value, np.ndarray) or hasattr(value, "tolist"):
        hint = "; token ids go in as TokenIds(…)"
    elif isinstance(value, Mapping):
        hint = "; take the text out of it"
    return TypeError(f"inputs[{index}] is a {kind}, not {_INPUT_KINDS}{hint}")

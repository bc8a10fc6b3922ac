"""Options that several methods share, shown in the signature and the help of each.

The options are keys of a `TypedDict`, which type checkers read. At run time, a signature would show only
`**options`; so `help` and the completion of notebooks are given the names and the defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


def shows_options(options: type, source: Callable[..., Any]) -> Callable[[_F], _F]:
    """Decorates a method with `**options`, described by the TypedDict `options`: its signature shows the keyword
    parameters of `source` in their place, and its docstring ends with their descriptions."""

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        shared = inspect.signature(source).parameters.values()
        function.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
        described = inspect.getdoc(options) or ""
        _, _, listed = described.partition("\n\n")
        text = f"{inspect.getdoc(function)}\n\nOptions, all of them optional:\n\n{listed}"
        function.__doc__ = text.replace("\n", "\n        ")
        return function

    return decorate

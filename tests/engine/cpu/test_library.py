"""Building and loading the library of the CPU kernels, and what happens where that fails."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine.cpu.variants import CACHES
from layertap_server.engine.cpu import library as native
from layertap_server.engine.cpu.structures import STRUCTURES


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """The library is loaded again, in the test and after it."""
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


def longer(structure: Any) -> Any:
    """The structure with one more field."""
    if isinstance(structure, np.dtype):
        return np.dtype([(name, structure[name]) for name in structure.names] + [("more", np.int64)])
    return type("Longer", (structure,), {"_fields_": (("more", ctypes.c_int64),)})


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_changed_structure_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if native.library() is None:
        pytest.skip("there is no C compiler here, so no kernel")
    native.library.cache_clear()
    monkeypatch.setitem(STRUCTURES, name, longer(STRUCTURES[name]))
    assert native.attention_kernel() is None
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"the structure {name} has " in warning
    assert "using torch's kernels" in warning


@pytest.mark.parametrize("flags", ["-march=not-a-processor", "'"])
def test_flags_that_the_compiler_refuses(
    flags: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if native.library() is None:
        pytest.skip("there is no C compiler here, so no kernel")
    native.library.cache_clear()
    monkeypatch.setenv("LAYERTAP_CFLAGS", flags)
    assert native.attention_kernel() is None
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "using torch's kernels" in warning

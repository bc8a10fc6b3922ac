"""Building and loading the library of the CPU kernels, and what happens where that fails."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine.cpu.variants import CACHES
from layertap_server.compiling import NoCompilerError, compiler_command, warn_of_no_compiler
from layertap_server.engine.cpu import embeddings as native_embeddings
from layertap_server.engine.cpu import layer as native_layer
from layertap_server.engine.cpu import library as native
from layertap_server.engine.cpu import pooling as native_pooling
from layertap_server.engine.cpu import product as native_product
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


def test_the_kernels_compile(caplog: pytest.LogCaptureFixture) -> None:
    """Also with the flags of `make test-kernels`: the tests of the kernels skip where there are none."""
    try:
        compiler_command()
    except NoCompilerError as error:
        pytest.skip(str(error))
    assert native.library() is not None, caplog.text


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


def test_without_a_compiler_there_is_no_kernel_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc")
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    warn_of_no_compiler.cache_clear()
    assert native.attention_kernel() is None
    assert native.held_library() is None
    assert native_layer.layer_kernel() is None
    assert native_embeddings.embeddings_kernel() is None
    assert native_pooling.pooling_kernel(is_held=True) is None
    assert native_product.product_kernel() is None
    native.library.cache_clear()  # as for the tokenizer's library
    assert native.library() is None
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "no C compiler found" in record.message
    assert "\n" not in record.message

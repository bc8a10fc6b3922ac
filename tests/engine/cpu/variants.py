"""The native code compiled for instruction sets other than this processor's, for tests."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from layertap_server.compiling import CompileError, compile_once
from layertap_server.engine.cpu import embeddings as native_embeddings
from layertap_server.engine.cpu import layer as native_layer
from layertap_server.engine.cpu import library as native
from layertap_server.engine.cpu import pooling as native_pooling
from layertap_server.engine.cpu import product as native_product

HERE = Path(__file__).parent
KERNELS = native.SOURCE.parent
# The additional compiler flags of each variant. Emulated: AVX-512 and AMX tiles, in plain C.
VARIANTS = {"this processor": (), "emulated tiles": (f"-I{HERE / 'emulated'}",)}
VARIANTS["emulated tiles"] += tuple(
    f"-D__{name}__" for name in ("AVX512F", "AVX512BF16", "AMX_TILE", "AMX_BF16")
)
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS["AVX2"] = ("-mno-avx512f",)
    VARIANTS["SSE2"] = ("-march=x86-64",)

CACHES = (
    native.library,
    native.held_library,
    native.attention_kernel,
    native_layer.layer_kernel,
    native_embeddings.embeddings_kernel,
    native_pooling.pooling_kernel,
    native_product.product_kernel,
)


def compiled(source: Path, variant: str) -> ctypes.CDLL:
    """The library of a source that includes the kernels' headers; skips the test where there is no compiler."""
    sources = [*sorted(KERNELS.glob("*.h")), *sorted((HERE / "emulated").glob("*.h"))]
    flags = (*native.COMPILE, f"-I{KERNELS}", *VARIANTS[variant])
    try:
        return ctypes.CDLL(str(compile_once(source, flags, sources=sources)))
    except CompileError as error:
        pytest.skip(f"not compiled for {variant}: {error}")


@contextmanager
def kernels_of(variant: str) -> Iterator[None]:
    """All native code of the engine in this variant, for models that are loaded meanwhile."""
    library = compiled(native.SOURCE, variant)

    def clear() -> None:
        for cache in CACHES:
            cache.cache_clear()

    clear()
    with pytest.MonkeyPatch.context() as patch:
        for module in (native, native_layer, native_embeddings, native_pooling, native_product):
            patch.setattr(module, "library", lambda: library)
        yield
    clear()

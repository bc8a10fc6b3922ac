"""The native CPU kernels: compiled once on the machine that runs
them, and called through ctypes with plain pointers.

This file compiles and loads them, and binds the attention kernels. BERT's layers and embeddings, linear
layers and pooling are in layer.py, embeddings.py, product.py and pooling.py. Without a C compiler, or if the
library cannot be loaded, torch's operations are used instead; their results differ only by rounding.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from layertap_server.compiling import (
    CompileError,
    NoCompilerError,
    check_structures,
    compile_once,
    warn_of_no_compiler,
)
from layertap_server.engine.attention_maps import MapTap
from layertap_server.engine.cpu.structures import MAP, STRUCTURES, NormArgument, Problem, TensorArgument
from layertap_server.engine.packing import Packing

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels") / "kernels.c"
# The kernels use torch's OpenMP runtime: the library is linked without one,
# and its symbols are resolved at load against the runtime that torch has
# loaded. With a second runtime, two thread pools would compete for the cores.
COMPILE = ("-O3", "-march=native", "-fno-math-errno", "-std=gnu11", "-fopenmp")
DTYPES = (torch.float32, torch.bfloat16)

Indices = npt.NDArray[np.int32]


def norm_argument(norm: torch.nn.LayerNorm) -> tuple[NormArgument, tuple[torch.Tensor, ...]]:
    """The argument, and the tensors that own the memory it points to. The caller must keep them alive."""
    gamma, beta = (weight.detach().float().contiguous() for weight in (norm.weight, norm.bias))
    return NormArgument(gamma.data_ptr(), beta.data_ptr(), norm.eps), (gamma, beta)


class MapArguments:
    """The requested attention maps in the form that the kernel takes."""

    def __init__(self, map_taps: Sequence[MapTap]) -> None:
        self._outs: list[tuple[MapTap, torch.Tensor]] = []
        self._held: list[Indices] = []  # owns the memory that the array points to
        self.array = np.array([self._row(tap) for tap in map_taps], MAP)

    def _row(self, tap: MapTap) -> tuple[int, ...]:
        heads, queries = indices(tap.heads), indices(tap.query_positions or ())
        self._held += (heads, queries)
        length = tap.end - tap.start
        out = tap.target
        if not tap.is_direct:
            out = torch.empty(len(tap.heads), tap.num_queries, length)
            self._outs.append((tap, out))
        places = (heads.ctypes.data, queries.ctypes.data, out.data_ptr())
        return tap.start, length, len(heads), len(queries), *places

    def finish(self) -> None:
        """Must be called after the kernel has run: averages or converts the maps that are not written
        directly into their targets."""
        for tap, out in self._outs:
            tap.write(out)


@lru_cache(maxsize=256)
def indices(values: tuple[int, ...]) -> Indices:
    """The values as an int32 array. Cached, since callers usually
    request the same heads; must not be changed."""
    return np.array(values, np.int32)


def argument(tensor: torch.Tensor) -> TensorArgument:
    """A (total, heads, head_dim) tensor whose last dimension is contiguous."""
    return TensorArgument(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class AttentionKernel:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = library.layertap_attention
        self._attend.argtypes = (ctypes.POINTER(Problem), ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
        self._attend.restype = ctypes.c_int
        self._write_maps = library.layertap_maps
        self._write_maps.argtypes = (
            ctypes.POINTER(Problem),
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_int,
        )
        self._write_maps.restype = ctypes.c_int

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packing: Packing,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attention in which each packed text attends only to itself; the tensors and the result are
        (total, heads, head_dim)."""
        query, key, value = (one if one.stride(2) == 1 else one.contiguous() for one in (query, key, value))
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        output[packing.total_tokens :] = 0
        problem = Problem(
            argument(query),
            argument(key),
            argument(value),
            argument(output),
            query.dtype is torch.bfloat16,
            query.shape[1],
            query.shape[2],
            window or 0,
            scaling,
        )
        cu_seqlens = packing.cu_seqlens_array
        if not self._attend(
            ctypes.byref(problem), cu_seqlens.ctypes.data, len(packing.works), torch.get_num_threads()
        ):
            raise MemoryError("no memory for the attention kernel's scratch")
        return output

    def write_maps(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        map_taps: Sequence[MapTap],
        scaling: float,
        window: int | None,
    ) -> None:
        """Computes the requested maps of one layer, and writes each to its tap."""
        query, key = (one if one.stride(2) == 1 else one.contiguous() for one in (query, key))
        nothing = TensorArgument()
        problem = Problem(
            argument(query),
            argument(key),
            nothing,
            nothing,
            query.dtype is torch.bfloat16,
            query.shape[1],
            query.shape[2],
            window or 0,
            scaling,
        )
        maps = MapArguments(map_taps)
        if not self._write_maps(
            ctypes.byref(problem), maps.array.ctypes.data, len(maps.array), torch.get_num_threads()
        ):
            raise MemoryError("no memory for the attention kernel's scratch")
        maps.finish()


@lru_cache(maxsize=1)
def attention_kernel() -> AttentionKernel | None:
    loaded = library()
    return None if loaded is None else AttentionKernel(loaded)


def new_rows(num_rows: int, size: int) -> torch.Tensor:
    """(num_rows, size) float32, uninitialized. `torch.empty` would release the GIL, and another thread that
    computes may then hold the GIL for a millisecond."""
    return torch.from_numpy(np.empty((num_rows, size), np.float32))


@lru_cache(maxsize=1)
def held_library() -> ctypes.PyDLL | None:
    """The same library as `library`, but its functions keep the GIL during a call: for calls that take less
    time than getting the GIL back may take."""
    loaded = library()
    return None if loaded is None else ctypes.PyDLL(loaded._name)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library of the kernels, compiled first if this machine has not done so yet; None if that fails."""
    try:
        path = compile_once(SOURCE, COMPILE, sources=sorted(SOURCE.parent.glob("*.h")))
        loaded = ctypes.CDLL(str(path))
        check_structures(loaded, STRUCTURES)
        return loaded
    except NoCompilerError:
        warn_of_no_compiler()
    except (CompileError, OSError) as error:
        logger.warning("cannot use the native kernels (%s); using torch's kernels", error)
    return None

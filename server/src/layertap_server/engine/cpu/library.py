"""The CPU kernels: compiled once on the machine that runs them, and called with plain pointers.

Here how they are had, and attention; BERT's layers and embeddings are in `native_layer` and
`native_embeddings`. Without a C compiler, or where they cannot be loaded, torch's own take their
place, with the same results.
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

from layertap_server.compiling import CompileError, NoCompilerError, compile_once
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import MapTap

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels") / "kernels.c"
# Threads come from torch's own OpenMP, found at load among what is loaded already: a second pool
# of threads would fight the first for the cores. So the object is linked without one.
COMPILE = ("-O3", "-march=native", "-fno-math-errno", "-std=gnu11", "-fopenmp")
DTYPES = (torch.float32, torch.bfloat16)

Indices = npt.NDArray[np.int32]


class NormArgument(ctypes.Structure):
    """`norm` of norm.h."""

    _fields_ = (("gamma", ctypes.c_void_p), ("beta", ctypes.c_void_p), ("epsilon", ctypes.c_float))


def norm_argument(norm: torch.nn.LayerNorm) -> tuple[NormArgument, tuple[torch.Tensor, ...]]:
    """And the tensors that hold what it points at."""
    gamma, beta = (weight.detach().float().contiguous() for weight in (norm.weight, norm.bias))
    return NormArgument(gamma.data_ptr(), beta.data_ptr(), norm.eps), (gamma, beta)


class TensorArgument(ctypes.Structure):
    """`tensor` of attention.h."""

    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64))


class Problem(ctypes.Structure):
    """`problem` of attention.h."""

    _fields_ = (
        ("q", TensorArgument),
        ("k", TensorArgument),
        ("v", TensorArgument),
        ("out", TensorArgument),
        ("bf16", ctypes.c_int),
        ("num_heads", ctypes.c_int),
        ("dim", ctypes.c_int),
        ("window", ctypes.c_int),
        ("scaling", ctypes.c_float),
    )


# `map` of maps.h. An array of them is filled at once: there may be hundreds in a pass.
MAP = np.dtype(
    [
        ("start", np.int64),
        ("length", np.int32),
        ("num_heads", np.int32),
        ("num_queries", np.int32),
        ("heads", np.uintp),
        ("queries", np.uintp),
        ("out", np.uintp),
    ],
    align=True,
)


class MapArguments:
    """Maps that were asked for, as the kernel takes them."""

    def __init__(self, map_taps: Sequence[MapTap]) -> None:
        self._outs: list[tuple[MapTap, torch.Tensor]] = []
        self._held: list[Indices] = []  # what the array points at
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
        """Once the kernel has run."""
        for tap, out in self._outs:
            tap.write(out)


@lru_cache(maxsize=256)
def indices(values: tuple[int, ...]) -> Indices:
    """Callers ask for the same heads again and again."""
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
        """Attention of each packed text to itself; (total, heads, head_dim) each, and the result too."""
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
        """Computes the maps that were asked for of one layer, each into its tap."""
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
    """(num_rows, size) float32, not filled. torch's own `empty` lets the interpreter go, and another thread that
    computes may then keep it for a millisecond."""
    return torch.from_numpy(np.empty((num_rows, size), np.float32))


@lru_cache(maxsize=1)
def held_library() -> ctypes.PyDLL | None:
    """The same library as `library`, called without letting the interpreter go: for what takes less time than to
    have it back may."""
    loaded = library()
    return None if loaded is None else ctypes.PyDLL(loaded._name)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The kernels, compiled if this machine has not yet; None where that is not possible."""
    try:
        return ctypes.CDLL(str(compile_once(SOURCE, COMPILE, sources=sorted(SOURCE.parent.glob("*.h")))))
    except NoCompilerError:
        logger.info("no C compiler: layers run on torch's own kernels, which are slower for short texts")
    except (CompileError, OSError) as error:
        logger.warning("the native kernels cannot be used (%s); layers run on torch's own", error)
    return None

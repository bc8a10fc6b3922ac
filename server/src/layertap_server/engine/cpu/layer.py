"""BERT's layers as one native call that computes products, attention,
GELU and norms, with no Python in between.

The order in which a row is summed does not depend on the other rows of the batch, so a text's results do not
depend on its batch, to the bit. Unlike oneDNN, no kernel is prepared and kept for each number of rows.
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
import time
from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from layertap_server.engine.attention_maps import MapTap, map_calls
from layertap_server.engine.cpu.library import (
    MapArguments,
    attention_kernel,
    library,
    new_rows,
    norm_argument,
)
from layertap_server.engine.cpu.product import ProductKernel
from layertap_server.engine.cpu.structures import LayerArgument, LayerPointer, LinearArgument, NormArgument
from layertap_server.engine.fused import FusedBertLayer
from layertap_server.engine.packing import Packing
from layertap_server.engine.precision import is_exact_gelu, prepare_linears
from layertap_server.engine.taps import Taps
from layertap_server.enums import DType
from layertap_server.plan import OutputPlan, Work

logger = logging.getLogger(__name__)

# Lengths of the texts of a small and of a full batch, with which a native layer and one in torch are timed.
TIMED_TEXTS = ((16,), (32,) * 16)
TIMED_CALLS = 5


class LayerKernel:
    """The functions of layer.h."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self.products = ProductKernel(loaded)
        self._workspace_size = loaded.layertap_bert_workspace
        self._workspace_size.argtypes = (LayerPointer, ctypes.c_int64, number)
        self._workspace_size.restype = ctypes.c_int64
        self.run = loaded.layertap_bert_layers
        self.run.argtypes = (
            pointer,
            number,
            pointer,
            pointer,
            number,
            pointer,
            pointer,
            pointer,
            pointer,
            number,
            number,
        )
        self.run.restype = number

    def workspace_size(self, layer: LayerArgument, num_rows: int, num_threads: int) -> int:
        """Bytes of the intermediate results of a layer over so many rows."""
        return int(self._workspace_size(ctypes.byref(layer), num_rows, num_threads))


class Workspace(threading.local):
    """Memory for the intermediate results of a model's layers, which use it
    one after the other. Each thread has its own, and keeps it at the size of
    its largest batch: new pages from the system took a tenth of each pass."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, num_bytes: int) -> torch.Tensor:
        if len(self._memory) < num_bytes:
            # Frees the old memory before the new memory is allocated.
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes]


@lru_cache(maxsize=1)
def layer_kernel() -> LayerKernel | None:
    loaded = library()
    return None if loaded is None else LayerKernel(loaded)


class NativeBertLayer:
    """A `FusedBertLayer`, packed for the kernel. Its products are in `dtype`, everything else is float32."""

    def __init__(self, kernel: LayerKernel, layer: FusedBertLayer, dtype: torch.dtype) -> None:
        self._products = kernel.products
        self._dtype = dtype
        self._held: list[torch.Tensor] = []  # own the memory that the argument points to
        linears = (layer.query_key_value, layer.attention_output, layer.intermediate, layer.output)
        norms = (layer.attention_norm, layer.output_norm)
        self.argument = LayerArgument(
            *map(self._linear, linears),
            *map(self._norm, norms),
            layer.scaling,
            layer.num_heads,
            layer.head_dim,
            dtype is torch.bfloat16,
        )

    def _linear(self, linear: nn.Linear) -> LinearArgument:
        argument, held = self._products.packed(linear.weight, linear.bias, self._dtype)
        self._held += held
        return argument

    def _norm(self, norm: nn.LayerNorm) -> NormArgument:
        argument, held = norm_argument(norm)
        self._held += held
        return argument


class NativeBertEncoder(nn.Module):  # type: ignore[misc]  # torch is not followed by the type checker
    """Replaces a BertEncoder, or a module of the same structure.

    One native call runs as many layers as possible, until an output between them is wanted
    (`Taps.begin_layers`). The call releases the GIL, so the thread waits for the GIL once for each call, not
    once for each operation.
    """

    def __init__(self, kernel: LayerKernel, layers: Sequence[FusedBertLayer], dtype: torch.dtype) -> None:
        super().__init__()
        self._kernel = kernel
        self._workspace = Workspace()
        self.dtype = dtype
        self.layers = [NativeBertLayer(kernel, layer, dtype) for layer in layers]
        self._arguments = (LayerPointer * len(layers))(
            *(ctypes.pointer(layer.argument) for layer in self.layers)
        )
        self.shape = (3, layers[0].num_heads, layers[0].head_dim)
        self.scaling = layers[0].scaling

    def forward(self, hidden_states: torch.Tensor, *_: Any, taps: Taps, **__: Any) -> Any:
        """(1, rows, H) float32 to the library's output object with a last_hidden_state of that shape; the
        rows after the texts are zero."""
        rows = hidden_states[0].contiguous()
        layer = 0
        while layer < len(self.layers):
            taps.next_hidden_state(rows[None])
            wanted = taps.begin_layers()
            rows = self._run(layer, wanted, rows, taps)
            layer += len(wanted)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=rows[None])

    def _run(self, first: int, wanted: list[list[MapTap]], rows: torch.Tensor, taps: Taps) -> torch.Tensor:
        """Runs `len(wanted)` layers from layer `first` on, with the
        maps wanted of each: (rows, H) to (rows, H)."""
        packing = taps.packing
        *before, last = wanted
        is_direct = all(tap.is_direct for tap in last)
        direct = [*before, last if is_direct else []]
        maps = MapArguments([tap for map_taps in direct for tap in map_taps])
        num_maps = np.array([len(map_taps) for map_taps in direct], np.int32)
        maps_are_last = taps.attention_is_last
        num_threads = torch.get_num_threads()
        memory = self._workspace.of(
            self._kernel.workspace_size(self.layers[0].argument, packing.total_tokens, num_threads)
        )
        output = new_rows(*rows.shape)
        output[packing.total_tokens :] = 0
        if not self._kernel.run(
            ctypes.byref(self._arguments, first * ctypes.sizeof(LayerPointer)),
            len(wanted),
            rows.data_ptr(),
            packing.cu_seqlens_array.ctypes.data,
            len(packing.works),
            maps.array.ctypes.data,
            num_maps.ctypes.data,
            memory.data_ptr(),
            output.data_ptr(),
            maps_are_last,
            num_threads,
        ):
            raise MemoryError("no memory for the layer kernel's scratch")
        if not is_direct:
            self._write_maps(last, memory, packing)
        taps.end_attention()
        return output

    def _write_maps(self, map_taps: Sequence[MapTap], memory: torch.Tensor, packing: Packing) -> None:
        """Computes maps that must be averaged or converted, from the queries and keys that the kernel has
        left at the start of its workspace. `map_calls` bounds the scratch memory of each call."""
        kernel = attention_kernel()
        assert kernel is not None
        size = packing.total_tokens * int(np.prod(self.shape)) * self.dtype.itemsize
        query, key, _ = memory[:size].view(self.dtype).view(-1, *self.shape).unbind(1)
        for portion in map_calls(map_taps):
            kernel.write_maps(query, key, portion, self.scaling, None)


def native_encoder(encoder: Any, dtype: torch.dtype) -> dict[nn.Module, nn.Module]:
    """The encoder of fused layers with its native replacement; empty if there is none, or if it is slower."""
    kernel = layer_kernel()
    layers = list(encoder.layer)
    if kernel is None or not all(is_native(layer, kernel, dtype) for layer in layers):
        return {}
    in_torch, first = prepared(layers[0], dtype), NativeBertEncoder(kernel, layers[:1], dtype)
    speedup = 1.0
    for lengths in TIMED_TEXTS:
        hidden_size = layers[0].query_key_value.in_features
        with_torch, natively = seconds_of((in_torch, first), lengths, hidden_size)
        speedup *= with_torch / natively
    logger.info("a layer in native code is %.2f times as fast as with torch's operations", speedup**0.5)
    return {encoder: NativeBertEncoder(kernel, layers, dtype)} if speedup >= 1 else {}


def is_native(layer: FusedBertLayer, kernel: LayerKernel, dtype: torch.dtype) -> bool:
    linears = (layer.query_key_value, layer.attention_output, layer.intermediate, layer.output)
    return is_exact_gelu(layer.activation) and all(
        linear.bias is not None and kernel.products.fits(linear.weight, dtype) for linear in linears
    )


def prepared(layer: FusedBertLayer, dtype: torch.dtype) -> nn.Module:
    """A copy of the layer, prepared as it would run without a native encoder."""
    copied = deepcopy(layer)
    prepare_linears(copied, dtype, narrow_inside=[copied])
    return copied


@torch.inference_mode()
def seconds_of(layers: Sequence[nn.Module], lengths: tuple[int, ...], hidden_size: int) -> list[float]:
    """Seconds of the fastest of a few calls, for each layer. The calls of the layers alternate, so that other
    work on the machine slows all of them alike."""
    plan = OutputPlan(DType.FLOAT32)
    packing = Packing.of([Work(np.zeros(length, np.int64), None, plan, ()) for length in lengths])
    rows = torch.randn(1, packing.num_rows, hidden_size)
    seconds = [math.inf] * len(layers)
    for _ in range(TIMED_CALLS):
        for number, layer in enumerate(layers):
            taps = Taps(packing, 1, torch.device("cpu"))
            taps.deepest_hidden = 1
            begun = time.perf_counter()
            layer(rows, taps=taps)
            seconds[number] = min(seconds[number], time.perf_counter() - begun)
    return seconds

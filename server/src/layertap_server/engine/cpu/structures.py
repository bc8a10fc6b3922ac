"""The C structures of the kernels' headers, as Python fills them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

# The tables in the order of the C struct `bert_embeddings` and of the kernel's arguments.
TABLES = ("word_embeddings", "token_type_embeddings", "position_embeddings")


class NormArgument(ctypes.Structure):
    """`norm` of norm.h."""

    _fields_ = (("gamma", ctypes.c_void_p), ("beta", ctypes.c_void_p), ("epsilon", ctypes.c_float))


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


# `map` of maps.h, as a numpy record: an array of them is built in one step, since a pass may have hundreds.
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


class LinearArgument(ctypes.Structure):
    """`linear` of product.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("k", ctypes.c_int),
        ("n", ctypes.c_int),
    )


class Operands(ctypes.Structure):
    """`operands` of product.h."""

    _fields_ = (
        ("input", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("bf16", ctypes.c_int),
        ("output", ctypes.c_void_p),
        ("output_stride", ctypes.c_int64),
        ("bf16_output", ctypes.c_int),
        ("gelu", ctypes.c_int),
        ("residual", ctypes.c_void_p),
    )


class LayerArgument(ctypes.Structure):
    """`bert_layer` of layer.h."""

    _fields_ = (
        ("query_key_value", LinearArgument),
        ("attention_output", LinearArgument),
        ("intermediate", LinearArgument),
        ("output", LinearArgument),
        ("attention_norm", NormArgument),
        ("output_norm", NormArgument),
        ("scaling", ctypes.c_float),
        ("num_heads", ctypes.c_int),
        ("head_dim", ctypes.c_int),
        ("bf16", ctypes.c_int),
    )


LayerPointer = ctypes.POINTER(LayerArgument)


class TableArgument(ctypes.Structure):
    """`table` of embeddings.h."""

    _fields_ = (("rows", ctypes.c_void_p), ("num", ctypes.c_int64))


class EmbeddingsArgument(ctypes.Structure):
    """`bert_embeddings` of embeddings.h."""

    _fields_ = (
        *((name, TableArgument) for name in TABLES),
        ("norm", NormArgument),
        ("n", ctypes.c_int),
    )


# By the names in C. Loading compares the sizes with those of the compiled library.
STRUCTURES: dict[str, type[ctypes.Structure] | np.dtype[Any]] = {
    "norm": NormArgument,
    "tensor": TensorArgument,
    "problem": Problem,
    "map": MAP,
    "linear": LinearArgument,
    "operands": Operands,
    "bert_layer": LayerArgument,
    "table": TableArgument,
    "bert_embeddings": EmbeddingsArgument,
}

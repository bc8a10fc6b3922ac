"""BERT's embeddings as one native call. As torch operations they took as long as half a layer of MiniLM."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from layertap_server.engine.cpu.library import held_library, library, new_rows, norm_argument
from layertap_server.engine.cpu.structures import TABLES, EmbeddingsArgument, TableArgument

# The children of a BertEmbeddings module. A module with others, such
# as ERNIE's task embeddings, is not replaced.
PARTS = {*TABLES, "LayerNorm", "dropout"}


# A call for more rows than this releases the GIL while it runs.
HELD_ROWS = 512


@lru_cache(maxsize=2)
def embeddings_kernel(*, is_held: bool = False) -> Any:
    """The function of embeddings.h; None without the native library.
    `is_held`: it keeps the GIL during a call."""
    loaded = held_library() if is_held else library()
    if loaded is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    kernel = loaded.layertap_bert_embeddings
    kernel.argtypes = (
        ctypes.POINTER(EmbeddingsArgument),
        pointer,
        pointer,
        pointer,
        ctypes.c_int64,
        pointer,
        number,
    )
    kernel.restype = number
    return kernel


class NativeBertEmbeddings(nn.Module):  # type: ignore[misc]  # torch is not followed by the type checker
    """Replaces a BertEmbeddings, or a module of the same structure; everything is float32."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self._kernel, self._held_kernel = embeddings_kernel(), embeddings_kernel(is_held=True)
        self.word_embeddings = embeddings.word_embeddings  # transformers looks for it under this name
        self._tables = [getattr(embeddings, name).weight.detach().contiguous() for name in TABLES]
        norm, self._held = norm_argument(embeddings.LayerNorm)
        self._argument = EmbeddingsArgument(
            *(TableArgument(table.data_ptr(), len(table)) for table in self._tables),
            norm,
            self._tables[0].shape[1],
        )

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """(1, rows) ids to (1, rows, H). Raises `IndexError` if an id is outside of its table."""
        num_rows = input_ids.shape[1]
        output = new_rows(num_rows, self._argument.n)
        kernel = self._held_kernel if num_rows <= HELD_ROWS else self._kernel
        if not kernel(
            ctypes.byref(self._argument),
            input_ids.data_ptr(),
            token_type_ids.data_ptr(),
            position_ids.data_ptr(),
            num_rows,
            output.data_ptr(),
            torch.get_num_threads(),
        ):
            raise IndexError("a token, type or position is outside of its table of embeddings")
        return output[None]


def native_embeddings(embeddings: Any) -> dict[nn.Module, nn.Module]:
    """The embeddings module with its native replacement; empty if there is none."""
    if embeddings_kernel() is None or {name for name, _ in embeddings.named_children()} != PARTS:
        return {}
    tables = [getattr(embeddings, name).weight for name in TABLES]
    if any(table.dtype is not torch.float32 or table.device.type != "cpu" for table in tables):
        return {}
    return {embeddings: NativeBertEmbeddings(embeddings)}

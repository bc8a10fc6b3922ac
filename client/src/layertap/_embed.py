"""One vector for each input, in one array: the request, and the array. No I/O; shared by both clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import numpy as np

from layertap import _arguments
from layertap._requests import encode_request
from layertap._results import Model, Quantized
from layertap._torch import load_torch
from layertap._types import (
    Array,
    Embedding,
    EncodingName,
    LayerMergeName,
    PoolingName,
    PriorityName,
    TruncationName,
)
from layertap.v1 import encoder_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Unpack

ArrayKind: TypeAlias = Literal["numpy", "torch"]


class EmbedOptions(TypedDict, total=False):
    """The keyword options of `embed`. All are optional.

    `model`: the name of a served model. Empty: the server's default model.
    `normalize`: whether to divide each vector by its L2 norm. None: as the model is configured.
    `dimensions`: how many leading dimensions to keep, before normalizing. 0: all.
    `encoding`: the element type on the wire, and of the array: float16 stays float16; bfloat16 and int8 are
    converted to float32, int8 by the scale of its vector; "binary" is uint8 with one bit for each dimension.
    None: float32.
    `pooling`: the name of a pooling, or a list of names whose vectors are concatenated. None: as the model
    is configured.
    `layers`: the hidden states to pool (0: the embedding output, -1: the last layer, the default).
    `layer_merge`: how several layers are combined. Default: "concat".
    `exclude_special_tokens`: whether to leave special tokens out of what is pooled.
    `without_projection`: whether to leave out the modules, such as Dense, that the model is configured with.
    `truncation`: at which end to drop tokens over the limit, "end" or "start". None: such texts are rejected.
    `max_tokens`: the limit of tokens, up to that of the model. 0: the limit configured for the model's
    embedding, or with a pooling of your own the model's limit.
    `prompt_name`: a prompt configured with the model, which is put before each text. Empty: the model's
    default prompt, if it has one and its configured embedding is requested.
    `prompt`: a text to put before each text, instead of a configured prompt.
    `priority`: "low", "normal" or "high". Default: "normal".
    """

    model: str
    normalize: bool | None
    dimensions: int
    encoding: EncodingName | None
    pooling: PoolingName | Sequence[PoolingName] | None
    layers: Sequence[int]
    layer_merge: LayerMergeName | None
    exclude_special_tokens: bool
    without_projection: bool
    truncation: TruncationName | None
    max_tokens: int
    prompt_name: str
    prompt: str
    priority: PriorityName | None


def embed_request(
    *,
    model: str = "",
    normalize: bool | None = None,
    dimensions: int = 0,
    encoding: EncodingName | None = None,
    pooling: PoolingName | Sequence[PoolingName] | None = None,
    layers: Sequence[int] = (),
    layer_merge: LayerMergeName | None = None,
    exclude_special_tokens: bool = False,
    without_projection: bool = False,
    truncation: TruncationName | None = None,
    max_tokens: int = 0,
    prompt_name: str = "",
    prompt: str = "",
    priority: PriorityName | None = None,
) -> pb.EncodeRequest:
    """A request for one vector of each input, without its inputs. See `EmbedOptions` for each option.

    Raises:
        TypeError, ValueError: an option is invalid; the message names it.
    """
    if pooling == "none" or (not isinstance(pooling, str) and "none" in (pooling or ())):
        raise _arguments.wrong_value(
            "pooling", "none", "it gives a vector for each token; take those from `encode`"
        )
    return encode_request(
        model=model,
        embeddings=Embedding(
            pooling=pooling,
            layers=layers,
            layer_merge=layer_merge,
            normalize=normalize,
            dimensions=dimensions,
            encoding=encoding,
            exclude_special_tokens=exclude_special_tokens,
            without_projection=without_projection,
        ),
        truncation=truncation,
        max_tokens=max_tokens,
        prompt_name=prompt_name,
        prompt=prompt,
        priority=priority,
    )


class EmbedCall:
    """The arguments of one call of `embed`, checked.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        ModuleNotFoundError: `convert_to` is "torch", and torch is not installed.
    """

    def __init__(self, convert_to: object, **options: Unpack[EmbedOptions]) -> None:
        if convert_to not in ("numpy", "torch"):
            raise _arguments.wrong_value("convert_to", convert_to, "give 'numpy' or 'torch'")
        self.template = embed_request(**options)
        self._torch = load_torch('convert_to="torch"') if convert_to == "torch" else None

    def converted(self, array: Array) -> Any:
        """The array in the form that the caller wants."""
        return array if self._torch is None else self._torch.from_numpy(array)

    def of_nothing(self, model: Model) -> Any:
        """The array for no inputs, (0, D), with D as far as it is known without computing, otherwise 0."""
        spec = self.template.outputs.embeddings[0]
        is_configured = not (spec.pooling or spec.poolings or spec.layers or spec.without_projection)
        size = model.embedding_size if is_configured else 0
        if spec.dimensions:
            size = min(size, spec.dimensions)
        return self.converted(np.zeros((0, size), np.float32))


class Rows:
    """One array, (N, …), for N arrays of one shape that arrive one by one. int8 vectors are dequantized."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._array: Array = np.empty(0)

    def put(self, index: int, row: Array | Quantized) -> None:
        """Copies a row into its place."""
        if isinstance(row, Quantized):
            row = row.dequantize()
        if not self._array.size:
            self._array = np.empty((self._num_rows, *row.shape), row.dtype)
        self._array[index] = row

    def array(self) -> Array:
        """All rows; each must have been put."""
        return self._array

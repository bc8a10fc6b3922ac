"""A served model in the place of a `transformers` model: called like one, answering like one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from layertap import _codec
from layertap._client import DEFAULT_ADDRESS, Client
from layertap._types import DtypeName, Input, Model, Result, TokenIds

if TYPE_CHECKING:
    from typing_extensions import Self

# The outputs in order. For each: where the batch axis goes (behind the layers, where there are any),
# and which axes of one text's array are tokens.
_AXES: dict[str, tuple[int, tuple[int, ...]]] = {
    "last_hidden_state": (0, (0,)),
    "pooler_output": (0, ()),
    "hidden_states": (1, (1,)),
    "attentions": (1, (2, 3)),
}


class ModelOutput(dict[str, Any]):
    """Named outputs in order, as `transformers` returns them: by key, attribute, index or slice.

    An output that was not asked for is no key, and None as an attribute.
    """

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name in _AXES:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no output {name!r}")

    def to_tuple(self) -> tuple[Any, ...]:
        """The outputs that are there, in order."""
        return tuple(self.values())


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """A served model's shape, by the names of a `transformers` configuration."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int


class RemoteModel:
    """Calls a served model as one would call a `transformers` encoder.

    `address` is a server's, or an open `Client`, which stays its owner's to close. `dtype` is the
    element type on the wire, `return_tensors` "np" or "pt" (None: torch tensors when given torch
    tensors, else numpy arrays), `timeout` as in `Client.encode`.

    Outputs have the keys, order and padded shapes of `transformers`. Their padded positions are
    zeros, where `transformers` gives what it computed from pad tokens, which means nothing. Rows
    are computed without padding, so that a text gives the same values alone, padded on the right
    and padded on the left.
    """

    def __init__(
        self,
        address: str | Client = DEFAULT_ADDRESS,
        model: str = "",
        *,
        dtype: DtypeName = "float32",
        return_tensors: Literal["np", "pt"] | None = None,
        timeout: float | None = None,
    ) -> None:
        self._owns_client = not isinstance(address, Client)
        self.client = address if isinstance(address, Client) else Client(address)
        self.model = model
        self._dtype: DtypeName = dtype
        self._return_tensors = return_tensors
        self._timeout = timeout

    @cached_property
    def config(self) -> RemoteConfig:
        """The model's shape, asked from the server once."""
        model = self._facts
        return RemoteConfig(
            model_type=model.architecture,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            vocab_size=model.vocab_size,
        )

    @cached_property
    def _facts(self) -> Model:
        return self.client.model(self.model)

    def eval(self) -> Self:
        """Itself: a served model has no other mode."""
        return self

    def to(self, device: Any) -> Self:
        """Itself: the model stays on its server, and outputs come back to the device of the inputs.

        Raises:
            TypeError: `device` is a dtype; that is chosen with `RemoteModel(dtype=…)`.
        """
        if not isinstance(device, str | int) and type(device).__name__ != "device":
            raise TypeError(
                f"to({device!r}): a served model can only be asked for another dtype, with RemoteModel(dtype=…)"
            )
        return self

    def close(self) -> None:
        """Ends the connection, unless it is a client that was given."""
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        return_tensors: Literal["np", "pt"] | None = None,
    ) -> Any:
        """The outputs for `input_ids` of shape (B, T), or for a text or a list of B texts.

        `attention_mask` (B, T) is 1 where tokens are and 0 where padding is, on the left or on the
        right. Texts are tokenized by the server, with special tokens, and padded on the right.

        Returns a `ModelOutput`, or its tuple where `return_dict` is False: `last_hidden_state`
        (B, T, H), `pooler_output` (B, H) where the model has a pooler, `hidden_states` L+1 times
        (B, T, H), `attentions` L times (B, A, T, T).

        Raises:
            ValueError: shapes differ, or a row of the mask is empty or has a hole.
            LayertapError: as the server answers.
        """
        tensor_type = return_tensors or self._return_tensors or ("pt" if _is_torch(input_ids) else "np")
        inputs, mask = _as_inputs(input_ids, attention_mask, token_type_ids)
        results = self.client.encode(
            inputs,
            model=self.model,
            last_hidden_state=True,
            pooler_output=self._facts.has_pooler,
            hidden_states=output_hidden_states,
            attentions=output_attentions,
            dtype=self._dtype,
            timeout=self._timeout,
        )
        output = _padded(results, mask)
        if tensor_type == "pt":
            output = _as_torch(output, input_ids.device if _is_torch(input_ids) else None)
        return output if return_dict else output.to_tuple()


def _is_torch(value: Any) -> bool:
    # Whoever has a tensor has imported torch.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_array(name: str, value: Any) -> npt.NDArray[np.int64]:
    array = np.asarray(value.detach().cpu() if _is_torch(value) else value)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "biuf":
        raise ValueError(
            f"{name} is an array of numbers of shape (batch, tokens), not {array.dtype}{array.shape}"
        )
    return array.astype(np.int64)


def _as_inputs(
    input_ids: Any, attention_mask: Any, token_type_ids: Any
) -> tuple[list[Input], npt.NDArray[np.bool_] | None]:
    """The inputs to send, and where their tokens lie in the (B, T) output; None for texts."""
    texts = _as_texts(input_ids)
    if texts is not None:
        if attention_mask is not None or token_type_ids is not None:
            raise ValueError("attention_mask and token_type_ids go with input_ids, not with texts")
        return texts, None
    ids = _as_array("input_ids", input_ids)
    mask = np.ones(ids.shape, bool)
    if attention_mask is not None:
        mask = _as_array("attention_mask", attention_mask) != 0
    types = None if token_type_ids is None else _as_array("token_type_ids", token_type_ids)
    for name, array in (("attention_mask", mask), ("token_type_ids", types)):
        if array is not None and array.shape != ids.shape:
            raise ValueError(f"{name} has the shape {array.shape}, and input_ids {ids.shape}")
    rows: list[Input] = []
    for index, row in enumerate(mask):
        (positions,) = np.nonzero(row)
        if not len(positions):
            raise ValueError(f"row {index} of attention_mask has no token")
        if positions[-1] - positions[0] + 1 != len(positions):
            raise ValueError(
                f"row {index} of attention_mask has a hole: only padding at its ends can be cut off"
            )
        rows.append(TokenIds(ids[index, row], None if types is None else types[index, row]))
    return rows, mask


def _as_texts(inputs: Any) -> list[Input] | None:
    if _codec.is_single(inputs):
        return [inputs]
    if isinstance(inputs, list | tuple) and inputs and _codec.is_single(inputs[0]):
        return list(inputs)
    return None


def _padded(results: list[Result], mask: npt.NDArray[np.bool_] | None) -> ModelOutput:
    """Every row put where its tokens were, in arrays of zeros."""
    num_tokens = max(result.token_count for result in results) if mask is None else mask.shape[1]
    starts = [0] * len(results) if mask is None else mask.argmax(axis=1).tolist()
    output = ModelOutput()
    for name, (batch_axis, token_axes) in _AXES.items():
        rows = [getattr(result, name) for result in results]
        if rows[0] is None:
            continue
        shape = [num_tokens if axis in token_axes else size for axis, size in enumerate(rows[0].shape)]
        padded = np.zeros((*shape[:batch_axis], len(rows), *shape[batch_axis:]), rows[0].dtype)
        by_row = np.moveaxis(padded, batch_axis, 0)
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            cut = slice(start, start + results[index].token_count)
            by_row[index][tuple(cut if axis in token_axes else slice(None) for axis in range(row.ndim))] = row
        output[name] = tuple(padded) if batch_axis else padded
    return output


def _as_torch(output: ModelOutput, device: Any) -> ModelOutput:
    import torch

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(convert, value))
        tensor = torch.from_numpy(value)
        return tensor if device is None else tensor.to(device)

    return ModelOutput((name, convert(value)) for name, value in output.items())

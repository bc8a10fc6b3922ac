"""The arguments of a `transformers` model, checked and converted to the inputs of a request."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from layertap import _requests
from layertap._types import Input, TokenIds

# Families whose first token has position 0. Others start after the pad token's id, or have no positions.
_POSITIONS_FROM_ZERO = ("albert", "bert", "electra", "ernie", "modernbert")


def is_torch(value: Any) -> bool:
    # If torch is not imported, the value cannot be a tensor.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_array(name: str, value: Any, kinds: str) -> npt.NDArray[Any]:
    if isinstance(value, Mapping):
        raise ValueError(f"{name} is a {type(value).__name__}: give its parts, as in model(**inputs)")
    if value is None:
        raise ValueError(f"{name} is None: give an array of shape (batch, tokens), or texts")
    array = np.asarray(value.detach().cpu() if is_torch(value) else value)
    if array.ndim != 2 or not array.size or array.dtype.kind not in kinds:
        kind = "numbers" if "f" in kinds else "integers"
        raise ValueError(
            f"{name} must be an array of {kind} of shape (batch, tokens), not {array.dtype}{array.shape}"
        )
    return array


def as_inputs(
    input_ids: Any, attention_mask: Any, token_type_ids: Any
) -> tuple[list[Input], npt.NDArray[np.bool_] | None]:
    """The inputs to send, and the places of their tokens in the (B, T) output; None for texts."""
    texts = _as_texts(input_ids)
    if texts is not None:
        if attention_mask is not None or token_type_ids is not None:
            raise ValueError("attention_mask and token_type_ids go with input_ids, not with texts")
        return texts, None
    ids = _as_array("input_ids", input_ids, "iu")
    mask = np.ones(ids.shape, bool)
    if attention_mask is not None:
        given = _as_array("attention_mask", attention_mask, "biuf")
        mask = given != 0
        if not np.isin(given, (0, 1)).all():
            raise ValueError("attention_mask has values other than 0 and 1: give 1 for tokens, 0 for padding")
    types = None if token_type_ids is None else _as_array("token_type_ids", token_type_ids, "iu")
    for name, array in (("attention_mask", mask), ("token_type_ids", types)):
        if array is not None and array.shape != ids.shape:
            raise ValueError(f"{name} has the shape {array.shape}, and input_ids {ids.shape}")
    for name, array in (("input_ids", ids), ("token_type_ids", types)):
        if array is not None and (wrong := np.argwhere(mask & (array < 0))).size:
            row, column = wrong[0]
            raise ValueError(f"{name}[{row}, {column}] is {array[row, column]}, which is not an id")
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
    if _requests.is_single(inputs):
        return [inputs]
    if isinstance(inputs, np.ndarray) and inputs.ndim == 1 and inputs.dtype.kind == "U":
        inputs = inputs.tolist()
    if isinstance(inputs, list | tuple) and inputs and _requests.is_single(inputs[0]):
        return list(inputs)
    return None


def check_positions(position_ids: Any, mask: npt.NDArray[np.bool_] | None, model_type: str) -> None:
    """Raises ValueError unless these are the positions that the model counts itself."""
    text = "position_ids: the server counts positions itself, from each row's first token; leave it out"
    if mask is None or model_type not in _POSITIONS_FROM_ZERO:
        raise ValueError(text)
    positions = _as_array("position_ids", position_ids, "iu")
    if positions.shape not in (mask.shape, (1, mask.shape[1])):
        raise ValueError(f"position_ids has the shape {positions.shape}, and input_ids {mask.shape}")
    counted = mask.cumsum(axis=1) - 1
    if not (np.broadcast_to(positions, mask.shape) == counted)[mask].all():
        raise ValueError(text)

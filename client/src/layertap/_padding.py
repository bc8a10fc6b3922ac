"""Outputs with the names and the padded shapes of `transformers`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from layertap._results import Result

# The outputs in order. For each, the position of the batch axis (after the axis of layers, if there is one),
# and the axes of one text's array that are token axes. Logits of (labels) have no token axis.
_AXES: dict[str, tuple[int, tuple[int, ...]]] = {
    "last_hidden_state": (0, (0,)),
    "pooler_output": (0, ()),
    "logits": (0, (0,)),
    "hidden_states": (1, (1,)),
    "attentions": (1, (2, 3)),
}
# Other attributes of some outputs of `transformers`; they are None for an encoder.
_NEVER = ("loss", "past_key_values", "cross_attentions")
# The remedy where an output of the model alone, or of its head, is read from an output of the other kind.
_ASK = {"last_hidden_state": False, "pooler_output": False, "logits": True}


class ModelOutput(dict[str, Any]):
    """Named outputs in order, read by key, attribute, index or slice, as in `transformers`.

    An output that was not requested is not a key, and None as an attribute. Either `last_hidden_state` and
    `pooler_output` or `logits` are there; the others raise AttributeError.
    """

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in _ASK and _ASK[name] != ("logits" in self):
            raise AttributeError(
                f"this output has no {name!r}: call the model with output_logits={_ASK[name]}"
            )
        if name in _AXES or name in _NEVER:
            return None
        raise AttributeError(f"{type(self).__name__} has no output {name!r}")

    def to_tuple(self) -> tuple[Any, ...]:
        """The outputs that are present, in order."""
        return tuple(self.values())


def padded(results: list[Result], mask: npt.NDArray[np.bool_] | None) -> ModelOutput:
    """Arrays of zeros with each result at the place of its tokens in `mask`, or at the start without one."""
    num_tokens = max(result.token_count for result in results) if mask is None else mask.shape[1]
    starts = [0] * len(results) if mask is None else mask.argmax(axis=1).tolist()
    output = ModelOutput()
    for name, (batch_axis, token_axes) in _AXES.items():
        rows = [getattr(result, name) for result in results]
        if rows[0] is None:
            continue
        if name == "logits" and rows[0].ndim == 1:
            token_axes = ()
        shape = [num_tokens if axis in token_axes else size for axis, size in enumerate(rows[0].shape)]
        filled = np.zeros((*shape[:batch_axis], len(rows), *shape[batch_axis:]), rows[0].dtype)
        by_row = np.moveaxis(filled, batch_axis, 0)
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            cut = slice(start, start + results[index].token_count)
            by_row[index][tuple(cut if axis in token_axes else slice(None) for axis in range(row.ndim))] = row
        output[name] = tuple(filled) if batch_axis else filled
    return output


def as_torch(output: ModelOutput, device: Any) -> ModelOutput:
    """The same outputs as torch tensors on this device."""
    import torch

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(convert, value))
        return torch.from_numpy(value).to(device)

    return ModelOutput((name, convert(value)) for name, value in output.items())

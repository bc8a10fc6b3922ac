"""Hands a result to bertviz, a library of interactive views for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from layertap._pictures.attention_maps import AttentionMaps
from layertap._results import Result


def bertviz(
    result: Result,
    view: Literal["head", "model"] = "head",
    *,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> Any:
    """Shows the attention maps of a result by bertviz's `head_view` or `model_view`, in a notebook.

    The result must hold the tokens, and the maps with all heads, rows and columns:
    `client.encode(text, tokens=True, attentions=True)`. `layers` are the layers that it holds, in their order,
    if these are not all. `options` go to the view, such as `layer`, `heads`, `prettify_tokens` or
    `html_action="return"`. Returns what the view returns. A pair's second text is marked as sentence B.

    Raises:
        ImportError: bertviz is not installed.
        ValueError: the result lacks tokens or maps, or has single rows or columns, or `view` is unknown.
    """
    if view not in ("head", "model"):
        raise ValueError(f"view must be 'head' or 'model', not {view!r}")
    held = None if result._asked is None else result.selection.attentions
    if held is not None:
        if held.pairs or held.mean_over_heads or held.heads != tuple(range(len(held.heads))):
            raise ValueError("bertviz needs all heads of each layer: ask for them with attentions=True")
        layers = layers or held.layers
        if min(layers) < 0:
            raise ValueError("bertviz numbers layers from 0: give their numbers as layers=[…]")
    maps = AttentionMaps.of(result, layers=layers)
    if not maps.is_whole:
        raise ValueError("bertviz needs attention maps with all rows and columns")
    try:
        import bertviz as library
        import torch
    except ModuleNotFoundError as error:
        if error.name not in ("bertviz", "torch", "IPython"):
            raise
        raise ImportError(f"bertviz needs {error.name}: pip install bertviz") from error
    # bertviz numbers layers by their index in a list. It reads only those of `include_layers`, so that the
    # others can be missing.
    tensors: list[Any] = [None] * (max(maps.layers) + 1)
    for layer, layer_maps in zip(maps.layers, maps.maps, strict=True):
        tensors[layer] = torch.from_numpy(layer_maps.copy())[None]
    second = (maps.tokens.sequence_ids == 1).nonzero()[0]
    if len(second):
        options.setdefault("sentence_b_start", int(second[0]))
    options.setdefault("include_layers", list(maps.layers))
    show = library.head_view if view == "head" else library.model_view
    return show(tensors, list(maps.labels), **options)

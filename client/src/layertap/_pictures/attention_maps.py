"""The attention maps of one input, with the names of their layers, heads, rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from layertap._pictures.labels import token_labels
from layertap._results import Result, Tokens
from layertap._types import Array


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMaps:
    """Attention maps (layers, heads, rows, columns) in float32. Each row is a token that looks at the columns.

    `layers` and `heads` number the first two axes: as the model does if `are_layers_known` or
    `are_heads_known`, and otherwise in the order of the result. `num_averaged_heads` is the number of heads that the only map of each layer is the mean of; 0: none.
    `rows` and `columns` are token positions. `labels` has a label for each of the T tokens.
    """

    maps: Array
    tokens: Tokens
    labels: tuple[str, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    are_layers_known: bool
    are_heads_known: bool
    num_averaged_heads: int = 0

    @classmethod
    def of(
        cls,
        result: Result,
        *,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        query_positions: Sequence[int] | None = None,
        key_positions: Sequence[int] | None = None,
        texts: Sequence[str] = (),
    ) -> AttentionMaps:
        """The maps of a result. The arguments name what it holds, in the order of its axes.

        Raises:
            ValueError: the result lacks maps or tokens, or holds another number of layers, heads or positions
                than are named.
        """
        if result.attentions is None:
            raise ValueError("this result holds no attention maps: ask for them with attentions=True")
        if result.tokens is None:
            raise ValueError(
                "this result holds no tokens to label the maps with: ask for them with tokens=True"
            )
        maps = np.asarray(result.attentions, np.float32)
        if not np.isfinite(maps).all():
            raise ValueError("the attention maps hold values that are not finite")
        num_layers, num_heads, num_rows, num_columns = maps.shape
        return cls(
            maps,
            result.tokens,
            token_labels(result.tokens, texts),
            positions("query_positions", query_positions, num_rows, len(result.tokens)),
            positions("key_positions", key_positions, num_columns, len(result.tokens)),
            names("layers", layers, num_layers),
            names("heads", heads, num_heads),
            layers is not None,
            heads is not None,
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The numbers of layers, heads, rows and columns."""
        num_layers, num_heads, num_rows, num_columns = self.maps.shape
        return num_layers, num_heads, num_rows, num_columns

    @property
    def is_whole(self) -> bool:
        """Whether the maps have a row and a column for each token."""
        everything = tuple(range(len(self.labels)))
        return self.rows == everything and self.columns == everything

    def chosen(self, layer: int | None, head: int | None) -> AttentionMaps:
        """The maps of one layer, one head, or both. A negative number counts from the end of what is held.

        Raises:
            ValueError: there is no map of this layer or head.
        """
        maps, layers, heads = self.maps, self.layers, self.heads
        if layer is not None:
            at = _place("layer", layer, layers)
            maps, layers = maps[at : at + 1], layers[at : at + 1]
        if head is not None:
            at = _place("head", head, heads)
            maps, heads = maps[:, at : at + 1], heads[at : at + 1]
        return replace(self, maps=maps, layers=layers, heads=heads)

    def mean_over_heads(self) -> AttentionMaps:
        """For each layer the mean of all its maps."""
        return replace(self, maps=self.maps.mean(1, keepdims=True)).as_mean_of(self.shape[1])

    def as_mean_of(self, num_heads: int) -> AttentionMaps:
        """These maps, named as the mean over so many heads, which the server has computed."""
        return replace(self, heads=(0,), num_averaged_heads=num_heads)

    def layer_labels(self) -> list[str]:
        """A short name for each layer; a number that only counts what the result holds is in brackets."""
        return [str(number) if self.are_layers_known else f"[{number}]" for number in self.layers]

    def head_labels(self) -> list[str]:
        """A short name for each map of a layer."""
        if self.num_averaged_heads:
            return ["mean"]
        return [str(number) if self.are_heads_known else f"[{number}]" for number in self.heads]

    def title(self, layer_index: int = 0, head_index: int = 0) -> str:
        """What the map at these indices is of."""
        layer = self.layer_labels()[layer_index]
        if self.num_averaged_heads:
            return f"layer {layer}, mean of {self.num_averaged_heads} heads"
        return f"layer {layer}, head {self.head_labels()[head_index]}"


def positions(name: str, given: Sequence[int] | None, count: int, num_tokens: int) -> tuple[int, ...]:
    """The token positions of an axis: those that are named, or, if the axis has all tokens, all of them."""
    if given is None and count != num_tokens:
        raise ValueError(
            f"this result holds {count} of {num_tokens} token positions: name them with {name}=[…]"
        )
    named = names(name, given, count)
    if not all(-num_tokens <= one < num_tokens for one in named):
        raise ValueError(f"{name} must be from 0 to {num_tokens - 1}, or negative to count from the end")
    return tuple(one % num_tokens for one in named)


def names(name: str, given: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The numbers that are given for an axis, or its indices."""
    if given is None:
        return tuple(range(count))
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} numbers, and this result holds {count}")
    return tuple(int(number) for number in given)


def _place(name: str, number: int, held: tuple[int, ...]) -> int:
    """The index of an axis at which a number is."""
    if number in held:
        return held.index(number)
    if -len(held) <= number < 0:
        return number % len(held)
    raise ValueError(f"{name} {number}: this result holds {', '.join(map(str, held))}")

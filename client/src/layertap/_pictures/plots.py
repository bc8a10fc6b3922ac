"""Plots of a result by matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from layertap._pictures.attention_maps import AttentionMaps, names, positions
from layertap._pictures.labels import token_labels
from layertap._pictures.ramp import LIGHT
from layertap._results import Result
from layertap._types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Measure: TypeAlias = Literal["previous", "first", "norm"]

# Fonts of scripts that matplotlib's own font lacks; those that are installed are used.
_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "SimHei", "Arial Unicode MS"),
    *("Noto Sans", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Emoji"),
)
_MAX_LABELS = 64  # on one axis; of more, only every n-th is written
_CELL_INCHES = 0.27
_MAX_INCHES = 14.0


def require_matplotlib() -> None:
    """Raises ImportError, with the extra to install, if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("pictures need matplotlib, of the extra 'plot': pip install 'layertap[plot]'")


def plot_attention(maps: AttentionMaps, ax: Axes | None = None) -> Axes:
    """A heat map of the only map, with its tokens; of several maps, a grid of layers and heads."""
    require_matplotlib()
    num_layers, num_heads, _, _ = maps.shape
    return _one_map(maps, ax) if num_layers * num_heads == 1 else _all_maps(maps, ax)


def _one_map(maps: AttentionMaps, ax: Axes | None) -> Axes:
    values = maps.maps[0, 0]
    ax = _axes(ax, len(maps.columns), len(maps.rows))
    image = ax.imshow(values, cmap=_colors(), vmin=0, vmax=values.max() or 1, interpolation="nearest")
    _token_ticks(ax.xaxis, [maps.labels[one] for one in maps.columns], rotation=90)
    _token_ticks(ax.yaxis, [maps.labels[one] for one in maps.rows])
    ax.xaxis.tick_top()
    ax.set_title(maps.title().capitalize())
    ax.set_ylabel("token that looks")
    ax.set_xlabel("token that is looked at")
    _color_bar(ax, image, "share of attention")
    return ax


def _all_maps(maps: AttentionMaps, ax: Axes | None) -> Axes:
    num_layers, num_heads, height, width = maps.shape
    # One image of all maps, with gaps: a picture of many axes takes seconds to draw.
    gap = max(1, round(0.06 * max(height, width)))
    grid = np.full((num_layers * (height + gap) - gap, num_heads * (width + gap) - gap), np.nan, np.float32)
    for i in range(num_layers):
        for j in range(num_heads):
            top, left = i * (height + gap), j * (width + gap)
            grid[top : top + height, left : left + width] = maps.maps[i, j]
    ax = _axes(ax, num_heads * 3.2, num_layers * 3.2 * height / width)
    # The square root shows small values too: most heads spread their attention thinly.
    image = ax.imshow(
        np.sqrt(grid),
        cmap=_colors(),
        vmin=0,
        vmax=1,
        interpolation="nearest" if width <= 64 else "antialiased",
    )
    ax.set_xticks(np.arange(num_heads) * (width + gap) + (width - 1) / 2, maps.head_labels())
    ax.set_yticks(np.arange(num_layers) * (height + gap) + (height - 1) / 2, maps.layer_labels())
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel("mean over the heads" if maps.num_averaged_heads else "head")
    ax.set_ylabel("layer")
    ax.set_title(f"Attention, {num_layers} × {num_heads} maps of {len(maps.labels)} tokens")
    bar = _color_bar(ax, image, "share of attention", shrink=0.75)
    shares = (0, 0.05, 0.25, 0.5, 1)
    bar.set_ticks(np.sqrt(shares), labels=[f"{share:g}" for share in shares])
    return ax


def plot_layers(
    result: Result,
    measure: Measure = "previous",
    *,
    layers: Sequence[int] | None = None,
    token_positions: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A heat map of tokens and layers: how each token's vector moves. See `Result.plot_layers`."""
    require_matplotlib()
    if measure not in get_args(Measure):
        raise ValueError(f"measure must be one of {', '.join(get_args(Measure))}, not {measure!r}")
    if result.hidden_states is None:
        raise ValueError("this result holds no hidden states: ask for them with hidden_states=True")
    if result.tokens is None:
        raise ValueError("this result holds no tokens to label the plot with: ask for them with tokens=True")
    states = np.asarray(result.hidden_states, np.float64)
    num_layers, num_rows, _ = states.shape
    if measure != "norm" and num_layers < 2:
        raise ValueError("a cosine between layers needs two or more: ask for them with hidden_states=True")
    rows = positions("positions", token_positions, num_rows, len(result.tokens))
    numbers = [
        f"[{number}]" if layers is None else str(number) for number in names("layers", layers, num_layers)
    ]
    if measure == "norm":
        values, ticks, title = np.linalg.norm(states, axis=-1), numbers, "Length of each token's vector"
    elif measure == "first":
        values, ticks = cosines(states[1:], states[:1]), numbers[1:]
        title = f"Cosine of each token's vector to that of layer {numbers[0]}"
    else:
        values = cosines(states[1:], states[:-1])
        ticks = [f"{before}→{after}" for before, after in pairwise(numbers)]
        title = "Cosine of each token's vector to that of the layer before"
    ax = _axes(ax, 2.2 * len(ticks), num_rows)
    highest = 1 if measure != "norm" else None
    image = ax.imshow(values.T, cmap=_colors(), vmax=highest, aspect="auto", interpolation="nearest")
    _token_ticks(ax.yaxis, [token_labels(result.tokens)[one] for one in rows])
    ax.set_xticks(range(len(ticks)), ticks)
    ax.set_xlabel("hidden state of layer")
    ax.set_title(title)
    _color_bar(ax, image, "L2 norm" if measure == "norm" else "cosine")
    return ax


def cosines(first: Array, second: Array) -> Array:
    """The cosine of vectors along the last axis; NaN where one is zero."""
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    dots = (first * second).sum(-1)
    cosine: Array = np.divide(dots, norms, out=np.full_like(dots, np.nan), where=norms > 0)
    return cosine


def write_picture(maps: AttentionMaps, path: Path, file_format: str) -> None:
    """Writes a plot of the maps to a file, without a window: "png" or "svg"."""
    require_matplotlib()
    from matplotlib.figure import Figure

    # Not through pyplot, which would choose a backend with windows and keep the figure.
    num_layers, num_heads, _, _ = maps.shape
    one = num_layers * num_heads == 1
    wide, high = (len(maps.columns), len(maps.rows)) if one else (num_heads * 3.2, num_layers * 3.2)
    figure = Figure(_figure_size(wide, high), layout="constrained")
    plot_attention(maps, figure.add_subplot())
    with path.open("wb") as file:
        figure.savefig(
            file, format=file_format, dpi=150, metadata={"Date": None} if file_format == "svg" else None
        )


def _axes(ax: Axes | None, num_columns: float, num_rows: float) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot

    _, ax = pyplot.subplots(figsize=_figure_size(num_columns, num_rows), layout="constrained")
    return ax


def _figure_size(num_columns: float, num_rows: float) -> tuple[float, float]:
    """The size in inches of a figure with so many cells, and its labels."""

    def inches(num_cells: float) -> float:
        return float(min(max(num_cells * _CELL_INCHES, 2.0), _MAX_INCHES))

    return inches(num_columns) + 2.2, inches(num_rows) + 1.4


def _colors() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("layertap", list(LIGHT))


def _color_bar(ax: Any, image: Any, label: str, shrink: float = 0.9) -> Any:
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.03, aspect=30, shrink=shrink, label=label)
    bar.outline.set_visible(False)
    return bar


def _token_ticks(axis: Any, labels: Sequence[str], rotation: float = 0) -> None:
    step = -(-len(labels) // _MAX_LABELS)
    # A $ in a token is no formula.
    axis.set_ticks(
        range(0, len(labels), step),
        labels[::step],
        parse_math=False,
        rotation=rotation,
        fontfamily=_font_families(),
    )
    axis.set_tick_params(length=0)


def _font_families() -> list[str]:
    from matplotlib import font_manager, rcParams

    installed = set(font_manager.get_font_names())
    return [*rcParams["font.family"], *(font for font in _FONTS if font in installed)]

"""An attention map in a terminal: a row of cells for each token, in colour or in plain characters."""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size
from rich.style import Style
from rich.text import Text

from layertap._pictures.attention_maps import AttentionMaps
from layertap._pictures.ramp import color

# Cells of the terminal beside the map: the number of a token, and its label.
_NUMBER_CELLS = 4
_LABEL_CELLS = 16
_BESIDE = _NUMBER_CELLS + 1 + _LABEL_CELLS + 1
# A wide cell has its value in percent; a narrow one a shade alone, here without colours.
_WIDE = 3
_SHADES = " .:-=+*#%@"


def max_tokens(width: int) -> int:
    """The most tokens whose map fits this many cells of a terminal."""
    return max(1, width - _BESIDE)


def heat_map(maps: AttentionMaps, layer: int, head: int, width: int, *, in_color: bool) -> Text:
    """The map at these indices. The colours go from 0 to its largest value.

    In wide cells there are percentages, as far as they fit; in narrow ones, where no colours are, a shade.
    """
    values = maps.maps[layer, head]
    num_columns = values.shape[1]
    cell = _WIDE if num_columns * _WIDE + _BESIDE <= width else 1
    most = float(values.max()) or 1.0
    picture = Text(no_wrap=True, overflow="crop", end="\n")
    picture.append(maps.title(layer, head).capitalize(), Style(bold=in_color))
    picture.append(f"\nEach row shows where its token looks{_legend(cell, most, in_color)}.\n")
    picture.append(" " * _BESIDE)
    if cell == _WIDE:
        picture.append("".join(f"{column:>{cell}}" for column in maps.columns))
    else:
        picture.append("".join(f"{column:<10}" for column in maps.columns[::10])[:num_columns])
    for row, weights in zip(maps.rows, values, strict=True):
        picture.append(f"\n{row:>{_NUMBER_CELLS}} {_label(maps.labels[row])} ")
        for value in weights.tolist():
            share = value / most
            if cell == _WIDE:
                text = f"{round(100 * value) or '·':>{cell}}"
            else:
                text = " " if in_color else _SHADES[round(share * (len(_SHADES) - 1))]
            picture.append(text, _style(share) if in_color else "")
    return picture


def _legend(cell: int, most: float, in_color: bool) -> str:
    if cell == _WIDE:
        return ", in percent"
    return "" if in_color else f", from ' ' (0 %) to '{_SHADES[-1]}' ({100 * most:.0f} %)"


def _label(label: str) -> str:
    if cell_len(label) > _LABEL_CELLS:
        return set_cell_size(label, _LABEL_CELLS - 1) + "…"
    return set_cell_size(label, _LABEL_CELLS)


def _style(share: float) -> Style:
    red, green, blue = color(share)
    text = "#ffffff" if share > 0.45 else "#10141c"
    return Style(color=text, bgcolor=f"#{red:02x}{green:02x}{blue:02x}")

"""A page of attention maps in one HTML file, which needs no network.

`page.html`, `page.css` and `page.js` are put into one file with the data. The data is JSON in a script element
that is never run, with every character that HTML could read as markup escaped; the page's own script writes
texts as text, never as markup. A content security policy with the hashes of style and script forbids all others,
and every request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from layertap._pictures.attention_maps import AttentionMaps
from layertap._pictures.labels import visible
from layertap._pictures.ramp import DARK, LIGHT
from layertap._types import Array

# A page of this many values has 8 bits for each, and about 64 MiB.
MAX_VALUES = 48 << 20
# Up to this many values have 16 bits, and the page 5.4 MiB or less.
MAX_FINE_VALUES = 2 << 20
_TITLE_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Heading:
    """What a page says about its maps: the model, and the input's one or two texts."""

    model: str
    texts: tuple[str, ...]


def check_size(num_values: int) -> None:
    """Raises ValueError if the maps would make a page that is too large."""
    if num_values > MAX_VALUES:
        raise ValueError(
            f"the maps have {num_values:,} values, more than the {MAX_VALUES:,} of one picture: "
            "choose maps with --layer and --head, or take the --mean of the heads"
        )


def page(maps: AttentionMaps, heading: Heading) -> bytes:
    """The HTML file of maps that have a row and a column for each token.

    Raises:
        ValueError: rows or columns are missing, or there are too many values.
    """
    if not maps.is_whole:
        raise ValueError("a page needs attention maps with all rows and columns")
    check_size(maps.maps.size)
    bits = 16 if maps.maps.size <= MAX_FINE_VALUES else 8
    data = {
        "model": visible(heading.model),
        "texts": [visible(text) for text in heading.texts],
        "labels": maps.labels,
        "ids": maps.tokens.ids.tolist(),
        "special": maps.tokens.special.tolist(),
        # A token that belongs to no text is -1.
        "segments": maps.tokens.sequence_ids.tolist(),
        "pieces": _pieces(maps, heading.texts),
        "layers": maps.layer_labels(),
        "heads": maps.head_labels(),
        "titles": [[maps.title(i, j) for j in range(maps.shape[1])] for i in range(maps.shape[0])],
        "bits": bits,
        "maps": base64.b64encode(quantized(maps.maps, bits)).decode(),
        "ramps": {"light": LIGHT, "dark": DARK},
    }
    style, script = _asset("page.css"), _asset("page.js")
    title = visible(" · ".join(heading.texts))
    if len(title) > _TITLE_CHARACTERS:
        title = f"{title[:_TITLE_CHARACTERS]}…"
    parts = {
        "TITLE": html.escape(title),
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASH": _hash(script),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _json_for_html(data),
    }
    # One pass over the template: what is filled in may contain the mark of another part.
    pieces = _asset("page.html").split("@@")
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
    return "".join(pieces).encode()


def quantized(maps: Array, bits: int) -> bytes:
    """Values from 0 to 1 as unsigned integers, row-major: uint16 (little-endian), or uint8 of the square root.

    The value is (q / 65535) of 16 bits, and (q / 255)² of 8 bits: an error of at most 8e-6, or 4e-3.
    """
    clipped = np.clip(maps, 0, 1)
    if bits == 16:
        stored = np.rint(clipped * 65535).astype("<u2")
    else:
        stored = np.rint(np.sqrt(clipped) * 255).astype(np.uint8)
    return bytes(stored.data)


def _pieces(maps: AttentionMaps, texts: Sequence[str]) -> list[str]:
    """The characters that each token covers; empty for special tokens."""
    tokens = maps.tokens
    return [
        visible(texts[sequence][start:end]) if 0 <= sequence < len(texts) else ""
        for sequence, start, end in zip(
            tokens.sequence_ids.tolist(), tokens.starts.tolist(), tokens.ends.tolist(), strict=True
        )
    ]


def _json_for_html(data: object) -> str:
    """JSON in ASCII without the characters of HTML's markup: inside strings, their escapes mean the same."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return resources.files("layertap._pictures").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

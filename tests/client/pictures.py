"""Results and pages for the tests of pictures."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np

from layertap import Result, Timing, Tokens

# Markup, quotes, bidirectional text, emoji, control characters, formulas: what a page must show as it is.
HOSTILE = (
    "</script><script>document.title='run'</script>",
    "<!-- <script> ]]> &amp; &lt;",
    "\"quotes\" 'and' `these` \\u003c \\",
    "<img src=x onerror=document.title='run'>",
    "@@DATA@@ ${1} {{x}}",
    "שלום עולם مرحبا",
    "a\u202eb\u2066c\u200f",
    "😀 👨‍👩‍👧 é\u0301",
    "nul\x00 bell\x07 tab\t line\nend\r\u2028\u2029\x85",
    "$x^2$ \\frac{1}{2}",
    "",
    " ",
)


def tokens_of(
    names: list[str], *, special: set[str] = frozenset({"[CLS]", "[SEP]"}), second: int = 0
) -> Tokens:  # type: ignore[assignment]
    """Tokens of these names; those from position `second` on are of the second text of a pair."""
    is_special = np.array([name in special for name in names])
    positions = np.arange(len(names))
    sequences = np.where(second and positions >= second, 1, 0)
    return Tokens(
        ids=positions + 100,
        tokens=tuple(names),
        type_ids=sequences,
        starts=np.zeros(len(names), np.int64),
        ends=np.zeros(len(names), np.int64),
        special=is_special,
        word_ids=np.where(is_special, -1, positions),
        sequence_ids=np.where(is_special, -1, sequences),
    )


def result_of(
    names: list[str], *, num_layers: int = 3, num_heads: int = 2, second: int = 0, **outputs: Any
) -> Result:
    """A result with random attention maps and hidden states (layers + 1, T, 4)."""
    random, count = np.random.default_rng(0), len(names)
    scores = random.normal(scale=2, size=(num_layers, num_heads, count, count))
    maps = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    held: dict[str, Any] = {
        "tokens": tokens_of(names, second=second),
        "attentions": maps.astype(np.float32),
        "hidden_states": random.normal(size=(num_layers + 1, count, 4)).astype(np.float32),
    }
    held |= outputs
    nothing = dict.fromkeys(
        (
            "last_hidden_state",
            "pooler_output",
            "logits",
            "logit_ids",
            "sparse_ids",
            "sparse_weights",
            "contacts",
        )
    )
    return Result(
        token_count=count, truncated_tokens=0, embeddings=(), timing=Timing(), **{**nothing, **held}
    )


class Page(HTMLParser):
    """What a browser reads in a page: its elements in order, and the text of each script."""

    def __init__(self, file: bytes) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(file.decode("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        if self.elements and data.strip():
            self.texts.setdefault(self.elements[-1], []).append(data)

    @property
    def data(self) -> dict[str, Any]:
        """The data that the page's script reads."""
        (text,) = [text for text in self.texts["script"] if text.startswith("{")]
        found: dict[str, Any] = json.loads(text)
        return found

    def maps(self) -> np.ndarray:
        """The maps, decoded as the page's script does."""
        data = self.data
        stored = base64.b64decode(data["maps"])
        if data["bits"] == 16:
            values = np.frombuffer(stored, "<u2") / 65535
        else:
            values = (np.frombuffer(stored, np.uint8) / 255) ** 2
        size = len(data["labels"])
        return values.reshape(len(data["layers"]), len(data["heads"]), size, size)

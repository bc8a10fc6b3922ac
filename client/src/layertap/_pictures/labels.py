"""What is written beside a token: the token, with everything invisible made visible."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from layertap._results import Tokens


def visible(text: str) -> str:
    """The text on one line: characters that have no picture of their own, or change others, become symbols."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # the pictures of the control characters
    if code == 0x7F:
        return "\N{SYMBOL FOR DELETE}"
    if character in "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}":
        return character  # part of an emoji, or of how a word is written
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"<{code:04X}>"
    return character


def token_labels(tokens: Tokens, texts: Sequence[str] = ()) -> tuple[str, ...]:
    """A label for each token: the token itself, or, if it is written in another alphabet, its part of the text.

    Tokens of byte-level vocabularies, such as RoBERTa's, write each byte of a character that is not ASCII as
    a character of its own. With `texts`, the input's one or two texts, such a token shows the characters
    that it covers.
    """
    labels = []
    for position, token in enumerate(tokens.tokens):
        sequence = int(tokens.sequence_ids[position])
        piece = ""
        if not token.isascii() and 0 <= sequence < len(texts):
            piece = texts[sequence][int(tokens.starts[position]) : int(tokens.ends[position])].strip()
        if piece and token.startswith("##"):
            piece = f"##{piece}"
        label = visible(piece or token)
        labels.append(label if label.strip() else label.replace(" ", "\N{OPEN BOX}") or "\N{EMPTY SET}")
    return tuple(labels)

"""What is to be tokenized, and what came of it: plain data.

Not frozen, like all that is made for each request: that would treble the time it takes to make one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from layertap_server.plan import Int64Array


class Truncation(IntEnum):
    """`layertap.v1.Truncation`."""

    NONE = 1
    END = 2
    START = 3


@dataclass(frozen=True, slots=True)
class Cut:
    """Where an input of more than `max_tokens` is cut, special tokens included; a `Truncation` by itself cuts at
    the model's own limit."""

    truncation: Truncation
    max_tokens: int

    def cuts(self, num_tokens: int, num_special: int = 0) -> bool:
        """Whether an input of so many tokens is cut. Not where special tokens, which stay, are too many."""
        is_allowed = self.truncation is not Truncation.NONE and num_special <= self.max_tokens
        return is_allowed and num_tokens > self.max_tokens


@dataclass(slots=True)
class Text:
    text: str
    # Leading characters of `text` that are a prompt, and no part of the caller's input.
    prompt_chars: int = 0


@dataclass(slots=True)
class Pair:
    first: str
    second: str
    prompt_chars: int = 0


@dataclass(slots=True)
class Words:
    words: Sequence[str]


@dataclass(slots=True)
class TokenIds:
    ids: Int64Array
    type_ids: Int64Array | None


Input = Text | Pair | Words | TokenIds


def num_chars(one: Input) -> int:
    """What it takes to encode it, about."""
    match one:
        case Text():
            return len(one.text)
        case Pair():
            return len(one.first) + len(one.second)
        case Words():
            return sum(map(len, one.words))
        case TokenIds():
            return len(one.ids)


@dataclass(frozen=True, slots=True)
class TokenTable:
    """What is known of each token; parallel lists of length T, as `layertap.v1.Tokens`."""

    tokens: list[str]
    starts: list[int]
    ends: list[int]
    special: list[bool]
    word_ids: list[int]
    sequence_ids: list[int]


@dataclass(slots=True)
class Encoded:
    """One input as ids."""

    input_ids: Int64Array
    type_ids: Int64Array
    num_truncated: int
    # False: `table` has no offsets.
    has_offsets: bool
    # Leading tokens that come from a prompt, the special tokens before it included.
    num_prompt_tokens: int
    # Built when asked: most requests want no tokens.
    _table: Callable[[], TokenTable] = field(repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    def table(self) -> TokenTable:
        return self._table()

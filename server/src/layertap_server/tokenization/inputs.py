"""The inputs and the results of tokenizing, as plain data.

Classes with an object for each request are not frozen: frozen ones take three times as long to create.
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
    """How an input of more than `max_tokens` tokens, special tokens included, is truncated.

    Functions that also take a `Truncation` by itself use the model's own limit with it.
    """

    truncation: Truncation
    max_tokens: int

    def cuts(self, num_tokens: int, num_special: int = 0) -> bool:
        """Whether an input of `num_tokens` tokens is truncated.

        It is not where its special tokens, which are never dropped, are more than the limit.
        """
        is_allowed = self.truncation is not Truncation.NONE and num_special <= self.max_tokens
        return is_allowed and num_tokens > self.max_tokens


@dataclass(slots=True)
class Text:
    text: str
    # The number of leading characters of `text` that are a prompt and not part of the caller's input.
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
    """The input's characters, or its ids: an estimate of the time to encode it."""
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
    """The properties of each token, as parallel lists of length T; as `layertap.v1.Tokens`."""

    tokens: list[str]
    starts: list[int]
    ends: list[int]
    special: list[bool]
    word_ids: list[int]
    sequence_ids: list[int]


@dataclass(slots=True)
class Encoded:
    """One tokenized input; the arrays have shape (T,)."""

    input_ids: Int64Array
    type_ids: Int64Array
    num_truncated: int
    # Whether `table` has offsets; if not, its `starts` and `ends` are 0.
    has_offsets: bool
    # The number of leading tokens that come from a prompt, the special tokens before it included.
    num_prompt_tokens: int
    # Builds the table on demand: most requests do not ask for tokens.
    _table: Callable[[], TokenTable] = field(repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    def table(self) -> TokenTable:
        return self._table()

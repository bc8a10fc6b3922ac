"""Encoding by tokenizers in pure Python, which give ids, special tokens and word numbers, but no offsets."""

from __future__ import annotations

from typing import Any

import numpy as np

from layertap_server.tokenization.inputs import Cut, Encoded, Pair, Text, TokenTable, Truncation, Words


class SlowTokenizer:
    """A tokenizer of transformers without a Rust implementation ("slow" in transformers)."""

    def __init__(self, tokenizer: Any, gives_types: bool) -> None:
        self._tokenizer = tokenizer
        self._gives_types = gives_types

    def encode(self, one: Text | Pair | Words, cut_at: Cut) -> Encoded:
        tokenizer, truncation = self._tokenizer, cut_at.truncation

        def plain_ids(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
            return ids

        words = one.words if isinstance(one, Words) else [one.first if isinstance(one, Pair) else one.text]
        by_word = [plain_ids(word) for word in words]
        first = [token_id for ids in by_word for token_id in ids]
        first_words = [
            number if isinstance(one, Words) else -1 for number, ids in enumerate(by_word) for _ in ids
        ]
        second = plain_ids(one.second) if isinstance(one, Pair) else None

        num_special = tokenizer.num_special_tokens_to_add(pair=second is not None)
        num_tokens = len(first) + len(second or ()) + num_special
        num_cut_before = 0
        if cut_at.cuts(num_tokens, num_special):
            room = cut_at.max_tokens - num_special
            keep = longest_first(len(first), len(second or ()), room)
            num_cut_before = len(first) - keep if truncation is Truncation.START else 0
            first, first_words = cut(first, keep, truncation), cut(first_words, keep, truncation)
            second = cut(second, room - keep, truncation) if second is not None else None
        ids = tokenizer.build_inputs_with_special_tokens(first, second)
        special = [bool(flag) for flag in tokenizer.get_special_tokens_mask(first, second)]
        type_ids = tokenizer.create_token_type_ids_from_sequences(first, second)
        words_left = iter([*first_words, *[-1] * len(second or ())])
        sequences_left = iter([0] * len(first) + [1] * len(second or ()))

        def table() -> TokenTable:
            nothing = [0] * len(ids)
            word_ids = [-1 if flag else next(words_left) for flag in special]
            sequence_ids = [-1 if flag else next(sequences_left) for flag in special]
            tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
            return TokenTable(tokens, nothing, nothing, special, word_ids, sequence_ids)

        made = table()
        prompt_tokens = 0
        if isinstance(one, Text | Pair) and one.prompt_chars:
            text = one.text if isinstance(one, Text) else one.first
            kept = min(len(plain_ids(text[: one.prompt_chars])) - num_cut_before, len(first))
            prompt_tokens = special.index(False) + kept if kept > 0 else 0
        return Encoded(
            np.array(ids, np.int64),
            np.array(type_ids, np.int64) if self._gives_types else np.zeros(len(ids), np.int64),
            num_tokens - len(ids),
            False,
            prompt_tokens,
            lambda: made,
        )


def longest_first(num_first: int, num_second: int, room: int) -> int:
    """How many tokens to keep of the first of two sequences that together have more than `room` tokens.

    The longer sequence is shortened until both are equal, then both are shortened equally, where the second
    loses an odd token; as in `truncate_sequences` of transformers' own slow tokenizers.
    """
    return min(num_first, max(room - num_second, room - room // 2))


def cut(tokens: list[int], keep: int, truncation: Truncation) -> list[int]:
    return tokens[:keep] if truncation is Truncation.END else tokens[len(tokens) - keep :]

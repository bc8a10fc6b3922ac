"""Encodes many inputs in one call: by native code for BERT's tokenizer, else in Rust or in Python."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from layertap_server.plan import Int64Array
from layertap_server.tokenization.inputs import (
    Cut,
    Encoded,
    Input,
    Pair,
    Text,
    TokenIds,
    TokenTable,
    Truncation,
    Words,
    num_chars,
)
from layertap_server.tokenization.python_tokenizer import SlowTokenizer
from layertap_server.tokenization.tokenizer_loading import LoadedTokenizer
from layertap_server.tokenization.wordpiece import wordpiece_of

# The server has a worker thread of its own; more threads would compete with the model for the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A single input of up to so many characters is encoded without releasing the interpreter lock: waiting to get
# the lock back could take longer than the work.
MAX_HELD_CHARS = 1 << 10
# Token tables come from the Rust tokenizer, on the event loop. Of a longer text that is cut, only its
# beginning, up to so many characters, is used for the table.
MAX_TABLE_CHARS = 1 << 14
# The token types of a single text; shorter ones are slices of this array.
ZEROS = np.zeros(1 << 12, np.int64)
ZEROS.flags.writeable = False


class TextEncoder:
    """The tokenizer of one model. `encode_now`, and tables, may be used while another thread encodes."""

    def __init__(self, tokenizer: LoadedTokenizer, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._gives_types = tokenizer.gives_types
        self._slow = SlowTokenizer(tokenizer.python, tokenizer.gives_types)
        self._fast = tokenizer.rust
        self._native = None
        # Held while truncation, a setting of the whole tokenizer, is enabled, and while a table is made.
        self._setting = threading.Lock()
        if self._fast is not None:
            self._fast.no_padding()
            self._fast.no_truncation()
            self._native = wordpiece_of(self._fast)

    @property
    def is_native(self) -> bool:
        return self._native is not None

    @property
    def is_fast(self) -> bool:
        return self._fast is not None

    def misfit(self, vocab_size: int, type_vocab_size: int) -> str:
        """In words, which ids or types of this tokenizer such a model has no embeddings for; else empty."""
        names = {id_: token for token, id_ in self._tokenizer.vocabulary().items() if id_ >= vocab_size}
        if names:
            return f"{len(names)} tokens from id {min(names)} on, the first of them {names[min(names)]!r}"
        if type_vocab_size > 0 and self._gives_types:
            [pair] = self._encode_flat([(Pair("a", "b"), self._cut(Truncation.NONE))])
            if (num_types := int(pair.type_ids.max(initial=0)) + 1) > type_vocab_size:
                return f"{num_types} token types for a pair"
        return ""

    def encode_now(self, one: Input, truncation: Truncation | Cut) -> Encoded | None:
        """The input encoded by native code, in some microseconds for a text; else None."""
        return None if self._native is None else self._encode_now(one, self._cut(truncation))

    def _cut(self, truncation: Truncation | Cut) -> Cut:
        return truncation if isinstance(truncation, Cut) else Cut(truncation, self._max_tokens)

    def _encode_now(self, one: Input, cut_at: Cut) -> Encoded | None:
        assert self._native is not None
        if isinstance(one, Text):
            ids = self._native.encode(one.text)
            return None if ids is None else self._from_native(one, ids, cut_at)
        if isinstance(one, Pair):
            pair = None if one.prompt_chars else self._native.encode_pair(one.first, one.second)
            if pair is None or cut_at.cuts(len(pair[0])):
                return None
            ids, types = pair
            types = types if self._gives_types else np.zeros_like(ids)
            return Encoded(ids, types, 0, True, 0, lambda: self._table(one, len(ids), len(ids)))
        return self._from_ids(one, cut_at) if isinstance(one, TokenIds) else None

    def encode_many(
        self, requests: Sequence[tuple[Sequence[Input], Truncation | Cut]]
    ) -> list[list[Encoded] | Exception]:
        """One list for each request, or the exception that it failed with.

        If the call for all requests fails, each is encoded by itself, so that a failure affects only one.
        """
        cuts = [(inputs, self._cut(truncation)) for inputs, truncation in requests]
        flat = [(one, cut_at) for inputs, cut_at in cuts for one in inputs]
        try:
            encoded = iter(self._encode_flat(flat))
            return [[next(encoded) for _ in inputs] for inputs, _ in requests]
        except Exception as error:
            if len(requests) == 1:
                return [error]
        return [self.encode_many([request])[0] for request in requests]

    def _encode_flat(self, flat: Sequence[tuple[Input, Cut]]) -> list[Encoded]:
        results = self._encode_natively(flat)
        texts: list[int] = []
        words: list[int] = []
        for index, (one, cut_at) in enumerate(flat):
            if results[index] is not None:
                continue
            if isinstance(one, TokenIds):
                results[index] = self._from_ids(one, cut_at)
            elif self._fast is None:
                results[index] = self._slow.encode(one, cut_at)
            else:
                (words if isinstance(one, Words) else texts).append(index)
        for indices, pretokenized in ((texts, False), (words, True)):
            if not indices:
                continue
            encodings = self._fast_batch([flat[index][0] for index in indices], pretokenized)
            for index, encoding in zip(indices, encodings, strict=True):
                results[index] = self._from_encoding(*flat[index], encoding)
        return [one for one in results if one is not None]

    # ------------------------------------------------------------------------- by native code

    def _encode_natively(self, flat: Sequence[tuple[Input, Cut]]) -> list[Encoded | None]:
        """The inputs encoded by native code; None for those that it cannot encode.

        All texts go into one call, which releases the interpreter lock if they are long.
        """
        if self._native is None:
            return [None] * len(flat)
        ids = iter(self._native.encode_many([one.text for one, _ in flat if isinstance(one, Text)]))
        return [
            self._encode_now(one, cut_at)
            if not isinstance(one, Text)
            else None
            if (found := next(ids)) is None
            else self._from_native(one, found, cut_at)
            for one, cut_at in flat
        ]

    def _from_native(self, one: Text, ids: Int64Array, cut_at: Cut) -> Encoded | None:
        assert self._native is not None
        shown, num_truncated, num_prompt_tokens = one, 0, 0
        cut = len(ids)  # the index of the first token that is dropped
        before, after = len(self._native.single.before), len(self._native.single.after)
        if cut_at.cuts(len(ids), before + after):
            begun = self._begin(one, cut_at)
            if begun is None:
                return None
            shown, num_truncated = begun, len(ids) - cut_at.max_tokens
            cut = cut_at.max_tokens - after if cut_at.truncation is Truncation.END else before
            ids = np.delete(ids, slice(cut, cut + num_truncated))
        if one.prompt_chars:
            counted = self._count_prompt_tokens(one)
            if counted is None or num_truncated:
                return None
            num_prompt_tokens = counted
        types = ZEROS[: len(ids)] if len(ids) <= len(ZEROS) else np.zeros_like(ids)
        return Encoded(
            ids, types, num_truncated, True, num_prompt_tokens, lambda: self._table(shown, cut, len(ids))
        )

    def _begin(self, one: Text, cut_at: Cut) -> Text | None:
        """The text that a truncated text's table is made from: all of it, or the beginning of a long one.

        None where the beginning is not enough; the Rust tokenizer then encodes the text.
        """
        assert self._native is not None
        if len(one.text) <= MAX_TABLE_CHARS:
            return one
        if cut_at.truncation is Truncation.START:
            return None
        begun = one.text[: one.text.rfind(" ", 0, MAX_TABLE_CHARS) + 1]  # splits no word
        ids = self._native.encode(begun)
        return None if ids is None or len(ids) < cut_at.max_tokens else Text(begun)

    def _count_prompt_tokens(self, one: Text) -> int | None:
        """The number of the prompt's tokens and the special tokens before them.

        None if native code cannot encode the prompt, or if the prompt does not end with a
        space, since a word could then extend beyond it.
        """
        assert self._native is not None
        prompt = one.text[: one.prompt_chars]
        ids = self._native.encode(prompt) if prompt.endswith(" ") else None
        if ids is None:
            return None
        num_own = len(ids) - len(self._native.single.before) - len(self._native.single.after)
        return len(self._native.single.before) + num_own if num_own else 0

    def _table(self, one: Text | Pair, cut: int, num_tokens: int) -> TokenTable:
        with self._setting:  # the worker thread may have enabled truncation
            [encoding] = self._fast_batch([one], False)
        table = fast_table(encoding, one.prompt_chars)
        for row in fields(table):
            values = getattr(table, row.name)
            del values[cut : cut + len(values) - num_tokens]
        return table

    # -------------------------------------------------------------------- by the Rust tokenizer

    def _fast_batch(self, inputs: Sequence[Input], pretokenized: bool) -> list[Any]:
        assert self._fast is not None
        raw = [raw_input(one) for one in inputs]
        if len(raw) == 1 and num_chars(inputs[0]) <= MAX_HELD_CHARS:
            first, second = raw[0] if isinstance(inputs[0], Pair) else (raw[0], None)
            return [self._fast.encode(first, second, is_pretokenized=pretokenized)]
        encodings: list[Any] = self._fast.encode_batch(raw, is_pretokenized=pretokenized)
        return encodings

    def _from_encoding(self, one: Input, cut_at: Cut, encoding: Any) -> Encoded:
        assert self._fast is not None
        num_tokens = len(encoding.ids)
        if cut_at.cuts(num_tokens, self._fast.num_special_tokens_to_add(isinstance(one, Pair))):
            # The tokenizer's own truncation knows where the special tokens go.
            direction = "right" if cut_at.truncation is Truncation.END else "left"
            with self._setting:
                self._fast.enable_truncation(cut_at.max_tokens, strategy="longest_first", direction=direction)
                try:
                    [encoding] = self._fast_batch([one], isinstance(one, Words))
                finally:
                    self._fast.no_truncation()
        ids = np.array(encoding.ids, np.int64)
        prompt_chars = one.prompt_chars if isinstance(one, Text | Pair) else 0
        return Encoded(
            ids,
            np.array(encoding.type_ids, np.int64) if self._gives_types else np.zeros_like(ids),
            num_tokens - len(ids),
            True,
            count_prompt_tokens(encoding, prompt_chars) if prompt_chars else 0,
            lambda: fast_table(encoding, prompt_chars),
        )

    # --------------------------------------------------------------------------- token ids

    def _from_ids(self, one: TokenIds, cut_at: Cut) -> Encoded:
        kept = slice(None)
        num_dropped = 0
        if cut_at.cuts(len(one.ids)):
            num_dropped = len(one.ids) - cut_at.max_tokens
            is_end = cut_at.truncation is Truncation.END
            kept = slice(None, cut_at.max_tokens) if is_end else slice(num_dropped, None)
        ids = one.ids[kept]
        type_ids = np.zeros_like(ids) if one.type_ids is None else one.type_ids[kept]

        def table() -> TokenTable:
            special = [int(token_id) in self._tokenizer.special_ids for token_id in ids]
            sequence_ids = [-1 if is_special else 0 for is_special in special]
            nothing = [0] * len(ids)
            tokens = [self._tokenizer.token(token_id) for token_id in ids.tolist()]
            return TokenTable(tokens, nothing, nothing, special, [-1] * len(ids), sequence_ids)

        return Encoded(ids, type_ids, num_dropped, False, 0, table)


def raw_input(one: Input) -> Any:
    match one:
        case Text():
            return one.text
        case Pair():
            return one.first, one.second
        case Words():
            return one.words
        case TokenIds():
            raise TypeError("ids are not tokenized")


def fast_table(encoding: Any, prompt_chars: int) -> TokenTable:
    """The table of a Rust encoding, with offsets and word numbers counted from the end of the prompt."""
    special = [bool(flag) for flag in encoding.special_tokens_mask]
    sequence_ids = [-1 if sequence is None else sequence for sequence in encoding.sequence_ids]
    word_ids = [-1 if word is None else word for word in encoding.word_ids]
    starts, ends = (list(side) for side in zip(*encoding.offsets, strict=True)) if special else ([], [])
    if prompt_chars:
        first = [index for index, sequence in enumerate(sequence_ids) if sequence == 0]
        in_prompt = [index for index in first if ends[index] <= prompt_chars]
        for index in first:
            starts[index] = max(starts[index] - prompt_chars, 0)
            ends[index] = max(ends[index] - prompt_chars, 0)
        first_word = min((word_ids[index] for index in first if index not in in_prompt), default=0)
        for index in first:
            word_ids[index] = -1 if index in in_prompt else word_ids[index] - first_word
    return TokenTable(encoding.tokens, starts, ends, special, word_ids, sequence_ids)


def count_prompt_tokens(encoding: Any, prompt_chars: int) -> int:
    """The number of leading tokens up to the last one that lies in the prompt, special tokens included."""
    return max(
        (
            index + 1
            for index, (sequence, (_, end)) in enumerate(
                zip(encoding.sequence_ids, encoding.offsets, strict=True)
            )
            if sequence == 0 and end <= prompt_chars
        ),
        default=0,
    )

"""Text to ids: a short one at once, all else on one worker thread, many requests in one call.

Fast tokenizers (the Rust ones, which release the GIL) give offsets and word ids; the few that are
pure Python give ids, special tokens and words, and no offsets.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice
from typing import Any

import numpy as np

from layertap_server.plan import Int64Array

# The worker thread is ours alone; more of them would compete with the model for the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Truncation(IntEnum):
    """`layertap.v1.Truncation`."""

    NONE = 1
    END = 2
    START = 3


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    # Leading characters of `text` that are a prompt, and no part of the caller's input.
    prompt_chars: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    first: str
    second: str
    prompt_chars: int = 0


@dataclass(frozen=True, slots=True)
class Words:
    words: Sequence[str]


@dataclass(frozen=True, slots=True)
class TokenIds:
    ids: Int64Array
    type_ids: Int64Array | None


Input = Text | Pair | Words | TokenIds

# Characters that one call takes on, of one request or several, before who came meanwhile has a turn: some
# 10 ms of work.
MAX_CALL_CHARS = 1 << 15
# One input of up to so much is encoded on the event loop itself when the worker rests: in some 0.3 ms,
# while to hand it over and take it back costs more than half of that.
MAX_CHARS_AT_ONCE = 1 << 10
# A long request lets short ones pass: each of its characters counts as if it had come so much later.
LATER_S_PER_CHAR = 1e-5


# Where nobody says otherwise: about a second's work.
MAX_QUEUE_CHARS = 1 << 23


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


@dataclass(frozen=True, slots=True)
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


class TokenizerLoadError(Exception):
    """The model's tokenizer cannot be used; the message says why and what to do."""


class TokenizerBusyError(Exception):
    """As much waits to be tokenized as may."""


@dataclass(slots=True, eq=False)
class Waiting:
    """One request that waits for the worker, or has had a part of its inputs encoded."""

    inputs: Sequence[Input]
    truncation: Truncation
    future: asyncio.Future[list[Encoded]]
    num_chars: int  # of those that are not taken
    due_s: float
    encoded: list[Encoded] = field(default_factory=list)
    num_taken: int = 0

    @property
    def num_left(self) -> int:
        return len(self.inputs) - self.num_taken

    @property
    def next_input(self) -> Input:
        return self.inputs[self.num_taken]

    def take(self, max_chars: int) -> list[Input]:
        """The next of its inputs, up to so many characters; at least one."""
        taken = [self.next_input]
        size = num_chars(taken[0])
        for one in islice(self.inputs, self.num_taken + 1, None):
            if size + num_chars(one) > max_chars:
                break
            taken.append(one)
            size += num_chars(one)
        self.num_taken += len(taken)
        self.num_chars -= size
        return taken


class Tokenization:
    """The tokenizer of one model and its worker thread."""

    def __init__(
        self,
        source: str,
        *,
        max_tokens: int,
        trust_remote_code: bool = False,
        max_queue_chars: int = MAX_QUEUE_CHARS,
    ) -> None:
        self._tokenizer = load_tokenizer(source, trust_remote_code)
        self._max_tokens = max_tokens
        self._max_queue_chars = max_queue_chars
        # transformers passes token types to the model only where its tokenizer lists them.
        self._gives_types = "token_type_ids" in self._tokenizer.model_input_names
        self._special_ids = frozenset(self._tokenizer.all_special_ids)
        self._fast = self._tokenizer.backend_tokenizer if self._tokenizer.is_fast else None
        if self._fast is not None:
            self._fast.no_padding()
            self._fast.no_truncation()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
        self._waiting: list[Waiting] = []
        self._waiting_chars = 0
        self._drainer: asyncio.Task[None] | None = None
        # Of callers that went away before their turn.
        self.num_cancelled = 0

    async def encode(self, inputs: Sequence[Input], truncation: Truncation) -> list[Encoded]:
        """Encodes at once or with whatever else waits; over-long inputs are cut only where asked.

        Raises `TokenizerBusyError` at once when too much waits already.
        """
        if not inputs:
            return []
        size = sum(map(num_chars, inputs))
        is_short = len(inputs) == 1 and size <= MAX_CHARS_AT_ONCE
        if is_short and self._fast is not None and self._drainer is None:
            [result] = self.encode_many([(inputs, truncation)])
            if isinstance(result, Exception):
                raise result
            return result
        future: asyncio.Future[list[Encoded]] = asyncio.get_running_loop().create_future()
        if self._waiting and self._waiting_chars + size > self._max_queue_chars:
            raise TokenizerBusyError
        due_s = time.monotonic() + size * LATER_S_PER_CHAR
        self._waiting_chars += size
        self._waiting.append(Waiting(inputs, truncation, future, size, due_s))
        if self._drainer is None:
            self._drainer = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while taken := self._take():
            try:
                results = await loop.run_in_executor(
                    self._worker, self.encode_many, [(inputs, one.truncation) for one, inputs in taken]
                )
            except Exception as error:  # every waiter hears of it
                results = [error] * len(taken)
            for (one, _), result in zip(taken, results, strict=True):
                if isinstance(result, list):
                    one.encoded += result
                if one.future.done():
                    continue
                if isinstance(result, Exception):
                    one.future.set_exception(result)
                elif len(one.encoded) == len(one.inputs):
                    one.future.set_result(one.encoded)
        self._drainer = None

    def _take(self) -> list[tuple[Waiting, Sequence[Input]]]:
        """What the next call encodes of each request; those that failed, or whose callers went away, are dropped."""
        self.num_cancelled += sum(one.future.cancelled() for one in self._waiting)
        here = [one for one in self._waiting if not one.future.done()]
        here.sort(key=lambda one: one.due_s)
        taken: list[tuple[Waiting, Sequence[Input]]] = []
        room = MAX_CALL_CHARS
        for one in here:
            if taken and num_chars(one.next_input) > room:
                break
            inputs = one.take(room)
            room -= sum(map(num_chars, inputs))
            taken.append((one, inputs))
        self._waiting = [one for one in here if one.num_left]
        self._waiting_chars = sum(one.num_chars for one in self._waiting)
        return taken

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------- on the worker thread

    def encode_many(
        self, requests: Sequence[tuple[Sequence[Input], Truncation]]
    ) -> list[list[Encoded] | Exception]:
        """One list for each request, or what it failed with; a failure is its own request's alone."""
        flat = [(one, truncation) for inputs, truncation in requests for one in inputs]
        try:
            encoded = iter(self._encode_flat(flat))
            return [[next(encoded) for _ in inputs] for inputs, _ in requests]
        except Exception as error:
            if len(requests) == 1:
                return [error]
        return [self.encode_many([request])[0] for request in requests]

    def _encode_flat(self, flat: Sequence[tuple[Input, Truncation]]) -> list[Encoded]:
        results: dict[int, Encoded] = {}
        texts: list[int] = []
        words: list[int] = []
        for index, (one, truncation) in enumerate(flat):
            if isinstance(one, TokenIds):
                results[index] = self._from_ids(one, truncation)
            elif self._fast is None:
                results[index] = self._encode_slowly(one, truncation)
            else:
                (words if isinstance(one, Words) else texts).append(index)
        for indices, pretokenized in ((texts, False), (words, True)):
            if not indices:
                continue
            encodings = self._fast_batch([flat[index][0] for index in indices], pretokenized)
            for index, encoding in zip(indices, encodings, strict=True):
                one, truncation = flat[index]
                results[index] = self._from_encoding(one, encoding, truncation, pretokenized)
        return [results[index] for index in range(len(flat))]

    def _fast_batch(self, inputs: Sequence[Input], pretokenized: bool) -> list[Any]:
        assert self._fast is not None
        raw = [
            (one.first, one.second)
            if isinstance(one, Pair)
            else one.text
            if isinstance(one, Text)
            else one.words
            for one in inputs
            if not isinstance(one, TokenIds)
        ]
        if len(raw) == 1 and num_chars(inputs[0]) <= MAX_CHARS_AT_ONCE:
            # Unlike a batch this keeps the interpreter to itself: to have it back could take longer.
            first, second = raw[0] if isinstance(inputs[0], Pair) else (raw[0], None)
            return [self._fast.encode(first, second, is_pretokenized=pretokenized)]
        encodings: list[Any] = self._fast.encode_batch(raw, is_pretokenized=pretokenized)
        return encodings

    def _from_encoding(
        self, one: Input, encoding: Any, truncation: Truncation, pretokenized: bool
    ) -> Encoded:
        num_tokens = len(encoding.ids)
        if num_tokens > self._max_tokens and truncation is not Truncation.NONE:
            assert self._fast is not None
            # The tokenizer's own truncation knows where the special tokens go. Its setting is global to
            # the tokenizer, which only this thread uses.
            direction = "right" if truncation is Truncation.END else "left"
            self._fast.enable_truncation(self._max_tokens, strategy="longest_first", direction=direction)
            try:
                encoding = self._fast_batch([one], pretokenized)[0]
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

    def _from_ids(self, one: TokenIds, truncation: Truncation) -> Encoded:
        kept = slice(None)
        num_dropped = max(len(one.ids) - self._max_tokens, 0)
        if num_dropped and truncation is not Truncation.NONE:
            kept = slice(None, self._max_tokens) if truncation is Truncation.END else slice(num_dropped, None)
        else:
            num_dropped = 0
        ids = one.ids[kept]
        type_ids = np.zeros_like(ids) if one.type_ids is None else one.type_ids[kept]

        def table() -> TokenTable:
            special = [int(token_id) in self._special_ids for token_id in ids]
            sequence_ids = [-1 if is_special else 0 for is_special in special]
            nothing = [0] * len(ids)
            tokens = [str(token) for token in self._tokenizer.convert_ids_to_tokens(ids.tolist())]
            return TokenTable(tokens, nothing, nothing, special, [-1] * len(ids), sequence_ids)

        return Encoded(ids, type_ids, num_dropped, False, 0, table)

    def _encode_slowly(self, one: Text | Pair | Words, truncation: Truncation) -> Encoded:
        tokenizer = self._tokenizer

        def plain_ids(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
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
        if num_tokens > self._max_tokens and truncation is not Truncation.NONE:
            room = self._max_tokens - num_special
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


def load_tokenizer(source: str, trust_remote_code: bool) -> Any:
    """The model's own tokenizer, refused when it knows no word at all."""
    from transformers import AutoTokenizer  # seconds of imports that `--help` does not need

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TokenizerLoadError(f"cannot load the tokenizer of '{source}': {error}") from error
    sample = tokenizer.encode("a b c d e 1 2 3 的 M A L K", add_special_tokens=False)
    if tokenizer.unk_token_id is not None and set(sample) <= {tokenizer.unk_token_id}:
        raise TokenizerLoadError(
            f"the tokenizer of '{source}' knows no letter and no digit: its vocabulary was not found. "
            "Add a tokenizer.json to the model (save_pretrained of the right tokenizer class writes one)"
        )
    return tokenizer


def fast_table(encoding: Any, prompt_chars: int) -> TokenTable:
    """The table of a Rust encoding, with offsets counted from behind the prompt."""
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
    """Leading tokens up to the last that lies in the prompt."""
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


def longest_first(num_first: int, num_second: int, room: int) -> int:
    """How many tokens to keep of the first of two sequences that have more than `room` together.

    The longer gives way until both are equal, then the second before the first, as in the
    `truncate_sequences` of transformers' own slow tokenizers.
    """
    return min(num_first, max(room - num_second, room - room // 2))


def cut(tokens: list[int], keep: int, truncation: Truncation) -> list[int]:
    return tokens[:keep] if truncation is Truncation.END else tokens[len(tokens) - keep :]

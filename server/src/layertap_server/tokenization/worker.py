"""Text to ids: what is short at once, all else on one worker thread, many requests in one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

from layertap_server.plan import TokenizerOptions
from layertap_server.tokenization.encoder import TextEncoder
from layertap_server.tokenization.inputs import Cut, Encoded, Input, Truncation, num_chars

# Characters that one call takes on, of one request or several, before who came meanwhile has a turn: some
# 10 ms of work.
MAX_CALL_CHARS = 1 << 15
# One input of up to so much is encoded on the event loop itself when the worker rests: in some 0.3 ms,
# while to hand it over and take it back costs more than half of that.
MAX_CHARS_AT_ONCE = 1 << 10
# Native code takes on so many times as much in that time, and needs no rest of the worker; each input counts
# as so many characters more.
NATIVE_TIMES = 16
CHARS_PER_INPUT = 128
# A long request lets short ones pass: each of its characters counts as if it had come so much later.
LATER_S_PER_CHAR = 1e-5


# Where nobody says otherwise: about a second's work.
MAX_QUEUE_CHARS = 1 << 23


class TokenizerBusyError(Exception):
    """As much waits to be tokenized as may."""


@dataclass(slots=True, eq=False)
class Waiting:
    """One request that waits for the worker, or has had a part of its inputs encoded."""

    inputs: Sequence[Input]
    truncation: Truncation | Cut
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
        options: TokenizerOptions | None = None,
    ) -> None:
        self._encoder = TextEncoder(source, max_tokens, trust_remote_code, options or TokenizerOptions())
        self._max_queue_chars = max_queue_chars
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
        self._waiting: list[Waiting] = []
        self._waiting_chars = 0
        self._drainer: asyncio.Task[None] | None = None
        # Of callers that went away before their turn.
        self.num_cancelled = 0

    def misfit(self, vocab_size: int, type_vocab_size: int) -> str:
        """As `TextEncoder.misfit`."""
        return self._encoder.misfit(vocab_size, type_vocab_size)

    @property
    def configured_max_tokens(self) -> int:
        """As many tokens as sentence-transformers gives the model of one text."""
        return self._encoder.configured_max_tokens

    async def encode(self, inputs: Sequence[Input], truncation: Truncation | Cut) -> list[Encoded]:
        """Encodes at once or with whatever else waits; over-long inputs are cut only where asked.

        Raises `TokenizerBusyError` at once when too much waits already.
        """
        size = sum(map(num_chars, inputs))
        if size + CHARS_PER_INPUT * (len(inputs) - 1) <= NATIVE_TIMES * MAX_CHARS_AT_ONCE:
            answers = [self._encoder.encode_now(one, truncation) for one in inputs]
            left = [one for one, answer in zip(inputs, answers, strict=True) if answer is None]
            if left:
                rest = iter(await self._encode_rest(left, truncation))
                answers = [answer or next(rest) for answer in answers]
            return cast("list[Encoded]", answers)
        return await self._encode_rest(inputs, truncation)

    async def _encode_rest(self, inputs: Sequence[Input], truncation: Truncation | Cut) -> list[Encoded]:
        """What native code does not take at once."""
        size = sum(map(num_chars, inputs))
        is_short = len(inputs) == 1 and size <= MAX_CHARS_AT_ONCE
        if is_short and self._encoder.is_fast and self._drainer is None:
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

    @property
    def is_busy(self) -> bool:
        """Whether its thread has something to do."""
        return self._drainer is not None

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    def encode_many(
        self, requests: Sequence[tuple[Sequence[Input], Truncation | Cut]]
    ) -> list[list[Encoded] | Exception]:
        """One list for each request, or what it failed with; on the worker thread, but for one short input."""
        return self._encoder.encode_many(requests)

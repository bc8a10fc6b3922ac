"""Tokenizes short texts on the event loop, all others on a worker thread, several requests in one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

from layertap_server.tokenization.encoder import TextEncoder
from layertap_server.tokenization.inputs import Cut, Encoded, Input, Truncation, num_chars
from layertap_server.tokenization.tokenizer_loading import LoadedTokenizer

# Characters that one call on the worker thread encodes, of one request or several: some 10 ms of work.
# Requests that arrive meanwhile can be part of the next call.
MAX_CALL_CHARS = 1 << 15
# A single input of up to so many characters is encoded on the event loop when the worker is idle: that takes
# some 0.3 ms, and passing it to the worker and back would cost more than half of that.
MAX_CHARS_AT_ONCE = 1 << 10
# Native code encodes so many times as many characters in that time, and runs on the event loop even while the
# worker is busy; each input after the first counts as `CHARS_PER_INPUT` more.
NATIVE_TIMES = 16
CHARS_PER_INPUT = 128
# Requests are encoded in the order of their arrival plus so many seconds for each character, so that short
# ones overtake long ones.
LATER_S_PER_CHAR = 1e-5


# The default limit of characters in the queue: about a second's work.
MAX_QUEUE_CHARS = 1 << 23


class TokenizerBusyError(Exception):
    """The queue of characters to tokenize is full."""


@dataclass(slots=True, eq=False)
class Waiting:
    """One request in the worker's queue; some of its inputs may be encoded already."""

    inputs: Sequence[Input]
    truncation: Truncation | Cut
    future: asyncio.Future[list[Encoded]]
    num_chars: int  # of the inputs that are not taken yet
    due_s: float  # in monotonic seconds; the queue is sorted by it
    encoded: list[Encoded] = field(default_factory=list)
    num_taken: int = 0

    @property
    def num_left(self) -> int:
        return len(self.inputs) - self.num_taken

    @property
    def next_input(self) -> Input:
        return self.inputs[self.num_taken]

    def take(self, max_chars: int) -> list[Input]:
        """Takes the next inputs, up to `max_chars` characters in all, but at least one input."""
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
    """The tokenizer of one model and its worker thread. Used on the event loop, except `encode_many`."""

    def __init__(
        self, tokenizer: LoadedTokenizer, *, max_tokens: int, max_queue_chars: int = MAX_QUEUE_CHARS
    ) -> None:
        """`max_tokens` is the model's limit, special tokens included."""
        self.tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer, max_tokens)
        self._max_queue_chars = max_queue_chars
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
        self._waiting: list[Waiting] = []
        self._waiting_chars = 0
        self._drainer: asyncio.Task[None] | None = None
        # Requests that were cancelled before all of their inputs were taken.
        self.num_cancelled = 0

    def misfit(self, vocab_size: int, type_vocab_size: int) -> str:
        """As `TextEncoder.misfit`."""
        return self._encoder.misfit(vocab_size, type_vocab_size)

    async def encode(self, inputs: Sequence[Input], truncation: Truncation | Cut) -> list[Encoded]:
        """Encodes the inputs, at once or through the worker's queue; truncates only as `truncation` says.

        Raises `TokenizerBusyError` at once when the queue is full.
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
        """Encodes inputs that native code cannot encode, or not at once."""
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
            except Exception as error:  # all requests of this call fail
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
        """The inputs of each request that the next call encodes.

        Drops requests that have failed or were cancelled.
        """
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
        """Whether the worker thread has work."""
        return self._drainer is not None

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    def encode_many(
        self, requests: Sequence[tuple[Sequence[Input], Truncation | Cut]]
    ) -> list[list[Encoded] | Exception]:
        """One list for each request, or the exception that it failed with.

        On the worker thread; on the event loop for a single short input.
        """
        return self._encoder.encode_many(requests)

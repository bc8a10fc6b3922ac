"""One served model: its tokenizer, its queue, its engine, and the thread that runs it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from layertap_server import errors
from layertap_server.config import Config
from layertap_server.fair_queue import Priority, Ticket
from layertap_server.plan import DType, ModelFacts, OutputPlan, Work
from layertap_server.scheduler import (
    ClosedError,
    DeadlinePassedError,
    DeadlineUnreachableError,
    QueueFullError,
    RefusedError,
    Runs,
    Scheduler,
)
from layertap_server.tokenization import Tokenization

logger = logging.getLogger(__name__)

# Tokens of the warm-up's batches, as (texts, tokens each): they start the cost model too.
WARM_UP_BATCHES = ((1, 8), (8, 32), (1, 24), (4, 128), (16, 32))


class ServedModel:
    """A model that answers requests. All but the engine's thread lives on the event loop."""

    def __init__(self, facts: ModelFacts, engine: Runs, tokenization: Tokenization, config: Config) -> None:
        self.facts = facts
        self.tokenization = tokenization
        self.scheduler = Scheduler(
            engine,
            self._deliver,
            max_batch_tokens=config.max_batch_tokens,
            max_queue_tokens=config.max_queue_tokens,
            num_layers=facts.num_layers,
        )
        self._engine = engine
        self._answers: dict[Ticket, asyncio.Future[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def warm_up(self) -> None:
        """Runs a few batches: memory is allocated, kernels are chosen, and the cost of a batch is known."""
        plan = OutputPlan(DType.FLOAT32, last_hidden_state=True)
        for is_cold in (True, False):  # the first time round pays for memory and code
            for num_texts, wanted_tokens in WARM_UP_BATCHES:
                num_tokens = min(wanted_tokens, self.facts.max_tokens)
                ids = np.full(num_tokens, min(5, self.facts.vocab_size - 1), np.int64)
                work = Work(ids, None, plan, plan.specs(num_tokens, self.facts.hidden_size))
                begun_ns = time.monotonic_ns()
                self._engine.run([work] * num_texts)
                if not is_cold:
                    self.scheduler.cost.observe(num_texts * num_tokens, time.monotonic_ns() - begun_ns)
        logger.debug("%s: a batch takes %s", self.facts.name, self.scheduler.cost)

    def start(self, on_death: Callable[[], None]) -> None:
        """Starts the engine's thread; `on_death` is called on the loop should it ever die."""
        loop = self._loop = asyncio.get_running_loop()

        def serve() -> None:
            try:
                self.scheduler.run_forever()
            except BaseException:
                loop.call_soon_threadsafe(on_death)

        self._thread = threading.Thread(target=serve, name=f"engine {self.facts.name}", daemon=True)
        self._thread.start()

    async def answer(self, works: Sequence[Work], priority: Priority, deadline_ns: int | None) -> Ticket:
        """The ticket of an answered request, or a `RequestError`. Cancelling it drops what is queued."""
        try:
            ticket = self.scheduler.submit(works, priority, deadline_ns)
        except RefusedError as refused:
            raise as_request_error(refused) from None
        assert self._loop is not None
        future = self._answers[ticket] = self._loop.create_future()
        try:
            await future
        finally:
            del self._answers[ticket]
            self.scheduler.cancel(ticket)
        if ticket.error is not None:
            raise as_request_error(ticket.error)
        return ticket

    def _deliver(self, tickets: list[Ticket]) -> None:
        """On the engine's thread: one call into the loop for the whole batch."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._resolve, tickets)

    def _resolve(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            future = self._answers.get(ticket)
            if future is not None and not future.done():
                future.set_result(None)

    async def stop(self) -> None:
        """Ends the engine's thread once its queue is empty."""
        self.scheduler.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self.tokenization.close()


def as_request_error(error: BaseException) -> errors.RequestError:
    """What the caller is told of a scheduler's or the engine's refusal."""
    match error:
        case QueueFullError():
            return errors.overloaded("QUEUE_FULL", str(error), error.retry_after_s)
        case DeadlineUnreachableError():
            return errors.overloaded("DEADLINE_UNREACHABLE", str(error), error.retry_after_s)
        case ClosedError():
            return errors.unavailable("ENGINE_DOWN", str(error), error.retry_after_s)
        case DeadlinePassedError():
            return errors.deadline_exceeded()
        case _:
            return errors.as_request_error(error)

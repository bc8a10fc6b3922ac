"""A scheduler on a virtual clock, with an engine that only says which inputs it saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from layertap_server.cost import Margin
from layertap_server.fair_queue import Priority, Ticket
from layertap_server.plan import DType, ModelFacts, OutputPlan, Outputs, Pooling, TensorData, Work
from layertap_server.scheduler import Scheduler

SECOND = 1_000_000_000
PLAN = OutputPlan(DType.FLOAT32, last_hidden_state=True)


class DeadError(BaseException):
    """Ends the engine's thread."""


def work(num_tokens: int, mark: int = 0) -> Work:
    """An input that the fake engine answers with its mark."""
    return Work(np.full(num_tokens, mark, np.int64), None, PLAN, ())


def facts() -> ModelFacts:
    """Of a BERT of twelve layers."""
    return ModelFacts(
        name="fake",
        architecture="bert",
        revision="",
        hidden_size=768,
        num_layers=12,
        num_attention_heads=12,
        vocab_size=1000,
        type_vocab_size=2,
        max_tokens=512,
        has_pooler=True,
        has_attentions=True,
        default_pooling=Pooling.MEAN,
        default_normalize=True,
        pool_prompt=True,
        prompts={},
        compute_dtype=DType.FLOAT32,
        device="cpu",
        packed=True,
        attention="none",
    )


def mark_of(one: Work) -> int:
    return int(one.input_ids[0])


class FakeEngine:
    """Answers each input with its mark and its number of tokens; fails on the marks in `poison`."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.batches: list[list[Work]] = []
        self.poison: set[int] = set()
        self.dies = False
        # Called in the middle of each pass.
        self.during: Callable[[], None] = lambda: None

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        self.batches.append(list(works))
        self.bench.now += sum(one.num_tokens for one in works) * 1000
        self.during()
        if self.dies:
            raise DeadError
        for one in works:
            if mark_of(one) in self.poison:
                raise RuntimeError(f"cannot bear {mark_of(one)}")
        return [(TensorData(np.array([mark_of(one), one.num_tokens])),) for one in works]

    @property
    def marks(self) -> list[list[int]]:
        return [[mark_of(one) for one in works] for works in self.batches]


class Bench:
    """A scheduler under test, with all that it delivered."""

    def __init__(self, max_batch_tokens: int = 10, max_queue_tokens: int = 100) -> None:
        self.now = 1000 * SECOND
        self.delivered: list[Ticket] = []
        self.deliveries = 0
        self.engine = FakeEngine(self)
        self.scheduler = Scheduler(
            self.engine,
            self._deliver,
            max_batch_tokens=max_batch_tokens,
            max_queue_tokens=max_queue_tokens,
            clock_ns=lambda: self.now,
            margin=Margin(1.0),
        )

    def _deliver(self, tickets: list[Ticket]) -> None:
        self.deliveries += 1
        self.delivered += tickets

    def submit(
        self,
        *sizes: int,
        mark: int = 0,
        priority: Priority = Priority.NORMAL,
        deadline_ns: int | None = None,
        client: str = "",
    ) -> Ticket:
        """One input of each size, all with one mark."""
        return self.scheduler.submit([work(size, mark) for size in sizes], priority, deadline_ns, client)

    def run(self) -> None:
        """Steps until nothing waits."""
        while self.scheduler.step():
            pass


def answers(ticket: Ticket) -> list[tuple[int, ...]]:
    """(mark, tokens) of each input, as the engine gave them."""
    assert ticket.error is None
    found = []
    for outputs in ticket.outputs:
        assert outputs is not None
        found.append(tuple(int(value) for value in outputs[0].data))
    return found

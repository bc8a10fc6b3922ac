"""A scheduler on a virtual clock, with an engine that only says which inputs it saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from layertap_server.enums import DType, OutputField, Pooling
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import OutputPlan, Outputs, TensorData, TensorSpec, Work
from layertap_server.scheduling.admission import Admission
from layertap_server.scheduling.cost_model import CostModel, Margin
from layertap_server.scheduling.engine_loop import EngineLoop
from layertap_server.scheduling.fair_queue import FairQueue, Priority, Ticket
from layertap_server.scheduling.scheduler import Scheduler

SECOND = 1_000_000_000
PLAN = OutputPlan(DType.FLOAT32, last_hidden_state=True)


class DeadError(BaseException):
    """Ends the engine's thread."""


def work(num_tokens: int, mark: int = 0, result_bytes: int = 0) -> Work:
    """An input that the fake engine answers with its mark."""
    specs = (TensorSpec(OutputField.EMBEDDINGS, DType.UINT8, (result_bytes,)),) if result_bytes else ()
    return Work(np.full(num_tokens, mark, np.int64), None, PLAN, specs)


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
        # A batch with more tokens does not fit into its memory.
        self.max_tokens = self.max_bytes = 1 << 30
        # Called in the middle of each pass.
        self.during: Callable[[], None] = lambda: None

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        self.batches.append(list(works))
        self.bench.now += sum(one.num_tokens for one in works) * 1000
        self.during()
        return self.answer(works)

    def answer(self, works: Sequence[Work]) -> list[Outputs]:
        if self.dies:
            raise DeadError
        if sum(one.num_tokens for one in works) > self.max_tokens:
            raise MemoryError
        if sum(one.result_bytes for one in works) > self.max_bytes:
            raise MemoryError
        for one in works:
            if mark_of(one) in self.poison:
                raise RuntimeError(f"cannot bear {mark_of(one)}")
        return [(TensorData(np.array([mark_of(one), one.num_tokens])),) for one in works]

    @property
    def marks(self) -> list[list[int]]:
        return [[mark_of(one) for one in works] for works in self.batches]


class FakeDevice(FakeEngine):
    """The same on a device that runs by itself: every batch takes it as long, and launching one the host."""

    def __init__(self, bench: Bench, batch_ns: int, launch_ns: int) -> None:
        super().__init__(bench)
        self.batch_ns, self.launch_ns = batch_ns, launch_ns
        self.free_ns = bench.now
        self.idle_ns = 0
        self.on_wait: Callable[[], None] = lambda: None
        self._events: list[tuple[int, Callable[[], None]]] = []

    def at(self, at_ns: int, event: Callable[[], None]) -> None:
        """Happens once the clock has come so far."""
        self._events.append((at_ns, event))

    def until(self, now: int) -> None:
        due = [one for one in self._events if one[0] <= now]
        self._events = [one for one in self._events if one[0] > now]
        for at_ns, event in due:
            self.bench.now = max(at_ns, self.bench.now)
            event()
        self.bench.now = max(now, self.bench.now)

    def launch(self, works: Sequence[Work]) -> FakePending:
        self.batches.append(list(works))
        self.until(self.bench.now + self.launch_ns)
        self.idle_ns += max(self.bench.now - self.free_ns, 0)
        self.free_ns = max(self.free_ns, self.bench.now) + self.batch_ns
        return FakePending(self, works, self.free_ns)

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        return self.launch(works).wait()


@dataclass(frozen=True, slots=True)
class FakePending:
    device: FakeDevice
    works: Sequence[Work]
    done_ns: int

    def wait(self) -> list[Outputs]:
        self.device.on_wait()
        self.device.until(self.done_ns)
        return self.device.answer(self.works)


def on_a_device(batch_ns: int, launch_ns: int) -> tuple[Bench, FakeDevice]:
    """A scheduler that knows what its device's batches take."""
    bench = Bench()
    device = bench.engine = FakeDevice(bench, batch_ns, launch_ns)
    bench.scheduler.engine = device
    bench.loop = EngineLoop(bench.scheduler, sleep_ns=lambda ns: device.until(bench.now + int(ns)))
    bench.scheduler.admission.cost = CostModel(fixed_ns=batch_ns)
    bench.loop._launch_ns = launch_ns
    return bench, device


class Bench:
    """A scheduler under test, with all that it delivered."""

    def __init__(self, max_batch_tokens: int = 10, max_queue_tokens: int = 100) -> None:
        self.now = 1000 * SECOND
        self.delivered: list[Ticket] = []
        self.deliveries = 0
        self.engine: FakeEngine = FakeEngine(self)
        self.scheduler = Scheduler(
            self.engine,
            self._deliver,
            Admission(FairQueue(), max_queue_tokens, margin=Margin(1.0)),
            max_batch_tokens,
            clock_ns=lambda: self.now,
        )
        self.loop = EngineLoop(self.scheduler)

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
        result_bytes: int = 0,
    ) -> Ticket:
        """One input of each size, all with one mark."""
        works = [work(size, mark, result_bytes) for size in sizes]
        return self.scheduler.submit(works, priority, deadline_ns, client)

    def run(self) -> None:
        """Steps until nothing waits."""
        while self.loop.step():
            pass


def answers(ticket: Ticket) -> list[tuple[int, ...]]:
    """(mark, tokens) of each input, as the engine gave them."""
    assert ticket.error is None
    found = []
    for outputs in ticket.outputs:
        assert outputs is not None
        found.append(tuple(int(value) for value in outputs[0].data))
    return found

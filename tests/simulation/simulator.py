"""The server's own scheduler on a virtual clock: arrivals in, what became of each out.

The engine only lets time pass, as long as a `CostModel` says, and what arrives or leaves meanwhile
reaches the scheduler in the middle of its pass. Invariants are checked after each step.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from layertap_server.enums import DType
from layertap_server.plan import OutputPlan, Outputs, TensorData, Work
from layertap_server.scheduling.admission import RESERVE, Admission, RefusedError
from layertap_server.scheduling.cost_model import CostModel
from layertap_server.scheduling.engine_loop import EngineLoop
from layertap_server.scheduling.fair_queue import FairQueue, Priority, Ticket
from layertap_server.scheduling.running_batch import Cores as ForCores
from layertap_server.scheduling.running_batch import RunningBatch
from layertap_server.scheduling.scheduler import DeadlinePassedError, Scheduler

SECOND = 1_000_000_000
NUM_LAYERS = 6
ANSWER: Outputs = (TensorData(np.zeros(1)),)


@dataclass(slots=True, eq=False)
class Call:
    """One request, and what became of it."""

    at_ns: int
    sizes: tuple[int, ...]  # tokens of its inputs
    client: str = "one"
    priority: Priority = Priority.NORMAL
    timeout_ns: int | None = None
    # Its caller cancels this long after its arrival.
    patience_ns: int | None = None
    layers: int = NUM_LAYERS
    # refused, answered, late, left, or failed.
    outcome: str = ""
    done_ns: int = 0
    ticket: Ticket | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes)

    @property
    def latency_ns(self) -> int:
        return self.done_ns - self.at_ns

    @property
    def is_good(self) -> bool:
        in_time = self.timeout_ns is None or self.latency_ns <= self.timeout_ns
        return self.outcome == "answered" and in_time


@dataclass
class Simulation:
    """Runs a trace to its end. `noise` multiplies the time of each pass."""

    calls: Sequence[Call]
    truth: CostModel
    max_batch_tokens: int = 512
    max_queue_tokens: int = 65536
    weights: dict[str, float] = field(default_factory=dict)
    noise: Callable[[], float] = lambda: 1.0
    # Time of the host before and after each pass, in which a device without `launch` is idle.
    host_ns: int = 0
    # Whether the invariants are checked at each step; for long traces only the results matter.
    is_checked: bool = True
    now: int = 0
    busy_ns: int = 0
    computed_tokens: int = 0
    # Called between two steps.
    max_running: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self,
            self._deliver,
            Admission(
                FairQueue(self.weights),
                self.max_queue_tokens,
                CostModel(self.truth.fixed_ns, self.truth.per_token_ns, self.truth.per_byte_ns),
            ),
            self.max_batch_tokens,
            num_layers=NUM_LAYERS,
            clock_ns=lambda: self.now,
        )
        self.loop = EngineLoop(self.scheduler, sleep_ns=lambda ns: self._advance(self.now + int(ns)))
        self._numbers = itertools.count()
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._by_ticket: dict[Ticket, Call] = {}
        for call in self.calls:
            self._at(call.at_ns, lambda call=call: self._submit(call))  # type: ignore[misc]

    def to_the_end(self) -> Simulation:
        while True:
            if self.step():
                self.check()
            elif self._events:
                self._advance(self._events[0][0])
                self.check()
            else:
                break
        assert all(call.outcome for call in self.calls), "somebody was left waiting"
        assert self.scheduler.queued_tokens == 0
        assert not any(
            one.size or one.num_waiting_flows for one in self.scheduler.admission.queue._classes.values()
        )
        return self

    def step(self) -> bool:
        """Whether there was something to do."""
        return self.loop.step()

    def check(self) -> None:
        if not self.is_checked:
            return
        scheduler, open_calls = self.scheduler, [one for one in self._by_ticket.values() if not one.outcome]
        remaining = {
            id(one.ticket): sum(one.sizes[one.ticket.next_work :])
            for one in open_calls
            if one.ticket is not None
        }
        assert scheduler.queued_tokens == sum(remaining.values())
        assert {id(ticket) for ticket in scheduler.admission.queue} == {
            key for key, left in remaining.items() if left
        }
        by_depth = scheduler.admission.queue.tokens_by_depth
        assert sum(by_depth.values()) == scheduler.queued_tokens
        assert all(count > 0 for count in by_depth.values())
        largest = max((call.num_tokens for call in self.calls), default=0)
        assert (
            scheduler.queued_tokens <= max(self.max_queue_tokens, largest) + RESERVE * self.max_queue_tokens
        )
        assert len(scheduler._running) <= self.max_running
        assert not scheduler._settled

    # --------------------------------------------------------------------------- the engine

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        self._advance(self.now + self.host_ns)
        self._advance(self.now + self._takes(works))
        self._advance(self.now + self.host_ns)
        return [ANSWER] * len(works)

    def _takes(self, works: Sequence[Work]) -> int:
        """Nanoseconds of the device for a batch."""
        num_tokens = sum(work.num_tokens for work in works)
        assert len(works) == 1 or num_tokens <= self.max_batch_tokens
        deepest = max(work.plan.hidden_states[0] for work in works if work.plan.hidden_states)
        depth = (deepest + 0.5) / (NUM_LAYERS + 0.5)
        elapsed_ns = int(self.truth.predict(num_tokens, depth=depth) * self.noise())
        self.busy_ns += elapsed_ns
        self.computed_tokens += num_tokens
        return elapsed_ns

    # ---------------------------------------------------------------------------- its events

    def _at(self, at_ns: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_ns, next(self._numbers), event))

    def _advance(self, until_ns: int) -> None:
        while self._events and self._events[0][0] <= until_ns:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = until_ns

    def _submit(self, call: Call) -> None:
        plan = OutputPlan(DType.FLOAT32, hidden_states=(call.layers,))
        works = [Work(np.zeros(size, np.int64), None, plan, ()) for size in call.sizes]
        deadline_ns = None if call.timeout_ns is None else self.now + call.timeout_ns
        try:
            call.ticket = self.scheduler.submit(works, call.priority, deadline_ns, call.client)
        except RefusedError:
            call.outcome, call.done_ns = "refused", self.now
            return
        self._by_ticket[call.ticket] = call
        for after_ns, outcome in ((call.patience_ns, "left"), (call.timeout_ns, "late")):
            if after_ns is not None:
                self._at(self.now + after_ns, lambda outcome=outcome: self._leave(call, outcome))  # type: ignore[misc]

    def _leave(self, call: Call, outcome: str) -> None:
        """As the server does when a call is cancelled, or its deadline passes."""
        if not call.outcome:
            assert call.ticket is not None
            call.outcome, call.done_ns = outcome, self.now
            self.scheduler.cancel(call.ticket)

    def _deliver(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            call = self._by_ticket[ticket]
            assert not call.outcome, "answered twice, or after it left"
            call.done_ns = self.now
            if ticket.error is None:
                assert all(output is ANSWER for output in ticket.outputs)
                call.outcome = "answered"
            else:
                call.outcome = "late" if isinstance(ticket.error, DeadlinePassedError) else "failed"


class Device(Simulation):
    """An engine that runs by itself: the host launches a batch, and may do so while it has another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_running = 1
        self.free_ns = 0

    def launch(self, works: Sequence[Work]) -> Launched:
        self._advance(self.now + self.host_ns)
        self.free_ns = max(self.free_ns, self.now) + self._takes(works)
        return Launched(self, len(works), self.free_ns)


@dataclass(frozen=True, slots=True)
class Launched:
    device: Device
    num_works: int
    done_ns: int

    def wait(self) -> list[Outputs]:
        self.device._advance(max(self.done_ns, self.device.now))
        self.device._advance(self.device.now + self.device.host_ns)
        return [ANSWER] * self.num_works


class Cores(Simulation):
    """Two cores that take batches apart from each other, and share what fits into one while they have nothing
    else: each of their threads as far as it gets without waiting, and its pass an event at its end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scheduler.num_cores = self.max_running = 2

    def step(self) -> bool:
        scheduler = self.scheduler
        formed = scheduler.form(ForCores.ALL) or scheduler.form(ForCores.ONE)
        scheduler.deliver_settled()
        if formed is None:
            return False
        assert len(scheduler._running) == 1 or all(one.share < 1 for one in scheduler._running)
        takes_ns = self.host_ns + self._takes([unit.work for unit in formed.units]) / formed.share
        self._at(self.now + int(takes_ns), lambda: self._finish(formed))
        return True

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        return [ANSWER] * len(works)

    def _finish(self, one: RunningBatch) -> None:
        self.loop.finish(one)
        self.scheduler.deliver_settled()


def capacity(truth: CostModel, max_batch_tokens: int) -> float:
    """Tokens a second that full batches at full depth come to."""
    return max_batch_tokens / truth.predict(max_batch_tokens) * SECOND


def goodput(calls: Iterable[Call], from_ns: int, until_ns: int) -> float:
    """Tokens a second of answers in time, of those that came between."""
    tokens = sum(call.num_tokens for call in calls if call.is_good and from_ns <= call.done_ns < until_ns)
    return tokens / (until_ns - from_ns) * SECOND


def percentile(calls: Iterable[Call], share: float) -> float:
    """Milliseconds that so many of the answered waited at most."""
    latencies = [call.latency_ns / 1e6 for call in calls if call.outcome == "answered"]
    return float(np.quantile(latencies, share)) if latencies else 0.0

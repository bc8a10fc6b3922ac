"""Random lives of a scheduler: every ticket is answered exactly once, and the accounts are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from drawings import drawings
from layertap_server.scheduling.admission import ClosedError, RefusedError
from layertap_server.scheduling.engine_loop import EngineLoop
from layertap_server.scheduling.fair_queue import Priority, Ticket
from layertap_server.scheduling.running_batch import Cores, RunningBatch
from scheduling.fake_engine import SECOND, Bench, DeadError, answers, mark_of, work

NUM_MARKS = 6


class Life(RuleBasedStateMachine):
    """Submits, cancels, passes and failures in any order; ends by draining, by closing or by dying."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(max_batch_tokens=12, max_queue_tokens=60)
        self.admitted: list[Ticket] = []
        self.cancelled: list[Ticket] = []

    @rule(
        inputs=st.lists(st.tuples(st.integers(1, 15), st.integers(0, NUM_MARKS - 1)), min_size=1, max_size=5),
        priority=st.sampled_from(Priority),
        deadline=st.none() | st.integers(0, 3 * SECOND),
    )
    def submit(self, inputs: list[tuple[int, int]], priority: Priority, deadline: int | None) -> None:
        works = [work(size, mark) for size, mark in inputs]
        before = self.bench.scheduler.queued_tokens
        deadline_ns = None if deadline is None else self.bench.now + deadline
        try:
            self.admitted.append(self.bench.scheduler.submit(works, priority, deadline_ns))
        except RefusedError:
            assert self.bench.scheduler.queued_tokens == before

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        self._cancel(data.draw(st.sampled_from(self.admitted)))

    def _cancel(self, ticket: Ticket) -> None:
        if not ticket.closed:  # otherwise it is already answered
            self.cancelled.append(ticket)
        self.bench.scheduler.cancel(ticket)

    @rule(ns=st.integers(1, SECOND))
    def wait(self, ns: int) -> None:
        self.bench.now += ns

    @rule(poison=st.sets(st.integers(0, NUM_MARKS - 1), max_size=2))
    def poison(self, poison: set[int]) -> None:
        self.bench.engine.poison = poison

    @rule()
    def step(self) -> None:
        self.bench.loop.step()

    @precondition(lambda self: self.admitted)
    @rule(data=st.data(), inputs=st.lists(st.integers(1, 8), min_size=1, max_size=2))
    def step_amid_arrivals_and_cancels(self, data: Any, inputs: list[int]) -> None:
        leaving = data.draw(st.sampled_from(self.admitted))

        def meanwhile() -> None:
            self.bench.engine.during = lambda: None
            self._cancel(leaving)
            self.submit([(size, 0) for size in inputs], Priority.NORMAL, None)

        self.bench.engine.during = meanwhile
        self.bench.loop.step()
        self.bench.engine.during = lambda: None

    @precondition(lambda self: self.admitted)
    @rule(dies_at=st.none() | st.integers(0, 6))
    def close(self, dies_at: int | None) -> None:
        """The engine's thread serves what is left, or dies at one of its passes."""
        passes = 0

        def count() -> None:
            nonlocal passes
            self.bench.engine.dies = passes == dies_at
            passes += 1

        self.bench.engine.during = count
        self.bench.scheduler.close()
        try:
            self.bench.loop.run()
        except DeadError:
            assert passes - 1 == dies_at
        self.check_everyone_was_answered()
        with pytest.raises(ClosedError):
            self.bench.submit(1)
        self.__init__()  # type: ignore[misc]  # after a restart

    @invariant()
    def queued_tokens_are_exact(self) -> None:
        scheduler = self.bench.scheduler
        assert scheduler.queued_tokens == sum(
            one.num_tokens
            for ticket in self.admitted
            if not ticket.closed
            for one in ticket.works[ticket.next_work :]
        )
        assert scheduler.queued_tokens >= 0
        assert not scheduler._running
        assert not scheduler._settled

    @invariant()
    def nobody_is_answered_twice_or_after_leaving(self) -> None:
        delivered = [id(ticket) for ticket in self.bench.delivered]
        assert len(set(delivered)) == len(delivered)
        assert not set(delivered) & {id(ticket) for ticket in self.cancelled}

    @invariant()
    def batches_keep_to_their_tokens(self) -> None:
        assert all(
            len(works) == 1 or sum(one.num_tokens for one in works) <= 12
            for works in self.bench.engine.batches
        )
        self.bench.engine.batches.clear()

    def teardown(self) -> None:
        self.bench.run()
        self.check_everyone_was_answered()

    def check_everyone_was_answered(self) -> None:
        assert self.bench.scheduler.queued_tokens == 0
        answered = {id(ticket) for ticket in [*self.bench.delivered, *self.cancelled]}
        assert answered == {id(ticket) for ticket in self.admitted}
        for ticket in self.bench.delivered:
            if ticket.error is None:
                assert answers(ticket) == [(mark_of(one), one.num_tokens) for one in ticket.works]


@dataclass(eq=False)
class Worker:
    """A thread of the engine, as far as it has come."""

    cores: Cores
    at: Literal["awake", "asleep", "about to form", "in a pass", "ended"] = "awake"
    running: RunningBatch | None = None


class AsleepError(Exception):
    """The thread that called would sleep now."""


@dataclass
class Sleep:
    """The part of a `threading.Condition` that is used, for threads that are only played."""

    workers: list[Worker]

    def wait_for(self, predicate: Callable[[], bool]) -> bool:
        if not predicate():
            raise AsleepError
        return True

    def notify(self, number: int = 1) -> None:
        for worker in [one for one in self.workers if one.at == "asleep"][:number]:
            worker.at = "awake"

    def notify_all(self) -> None:
        self.notify(len(self.workers))


class LifeOnCores(RuleBasedStateMachine):
    """The threads of a scheduler on several cores, one step of one of them at a time, in any order, with anything
    else between: none may sleep beside work that only it and others that sleep may take."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(max_batch_tokens=12, max_queue_tokens=200)
        scheduler = self.scheduler = self.bench.scheduler
        scheduler.num_cores = 2
        self.workers = [Worker(Cores.ALL), Worker(Cores.ONE), Worker(Cores.ONE)]
        scheduler._changed = {
            cores: cast("Any", Sleep([one for one in self.workers if one.cores is cores])) for cores in Cores
        }
        self.admitted: list[Ticket] = []
        self.cancelled: list[Ticket] = []
        # Between `submit` and `wake`.
        self.is_wake_due = False
        self.is_closed = False

    @rule(
        sizes=st.lists(st.integers(1, 15), min_size=1, max_size=4),
        deadline=st.none() | st.integers(1, 200),
        wakes=st.booleans(),
    )
    def submit(self, sizes: list[int], deadline: int | None, wakes: bool) -> None:
        deadline_ns = None if deadline is None else self.bench.now + deadline
        works = [work(size, size % NUM_MARKS) for size in sizes]
        try:
            self.admitted.append(self.scheduler.submit(works, Priority.NORMAL, deadline_ns))
        except RefusedError:
            return
        self.is_wake_due = True
        if wakes:
            self.wake()

    @rule()
    def wake(self) -> None:
        self.scheduler.wake()
        self.is_wake_due = False

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        ticket = data.draw(st.sampled_from(self.admitted))
        if not ticket.closed:
            self.cancelled.append(ticket)
        self.scheduler.cancel(ticket)

    @rule(ns=st.integers(1, 200))
    def wait(self, ns: int) -> None:
        self.bench.now += ns

    @rule(poison=st.sets(st.integers(0, NUM_MARKS - 1), max_size=2), max_tokens=st.sampled_from((4, 1000)))
    def poison(self, poison: set[int], max_tokens: int) -> None:
        self.bench.engine.poison, self.bench.engine.max_tokens = poison, max_tokens

    @rule(number=st.integers(0, 2))
    def go_on(self, number: int) -> None:
        self._go_on(self.workers[number])

    def _go_on(self, worker: Worker) -> bool:
        """One step of a thread's `EngineLoop.run`; False for one that sleeps or has ended."""
        scheduler = self.scheduler
        if worker.at == "awake":
            try:
                worker.at = "about to form" if scheduler.wait_for_work(worker.cores, 0) else "ended"
            except AsleepError:
                worker.at = "asleep"
        elif worker.at == "about to form":
            worker.running = scheduler.form(worker.cores)
            scheduler.deliver_settled()
            worker.at = "awake" if worker.running is None else "in a pass"
        elif worker.at == "in a pass":
            assert worker.running is not None
            EngineLoop(scheduler, worker.cores).finish(worker.running)
            scheduler.deliver_settled()
            worker.at, worker.running = "awake", None
        else:
            return False
        return True

    @rule(is_abandoned=st.booleans())
    def end(self, is_abandoned: bool) -> None:
        """Closed, or abandoned: all threads end, and everyone is answered."""
        if is_abandoned:
            self.scheduler.abandon("given up")
        else:
            self.scheduler.close()
            self.is_closed = True
        self.is_wake_due = False
        self.no_thread_sleeps_beside_its_work()
        self._to_rest()
        assert [worker.at for worker in self.workers] == ["ended"] * 3
        self.check_everyone_was_answered()
        self.__init__()  # type: ignore[misc]  # after a restart

    def _to_rest(self) -> None:
        while any(self._go_on(worker) for worker in self.workers):
            self.no_thread_sleeps_beside_its_work()

    @invariant()
    def no_thread_sleeps_beside_its_work(self) -> None:
        if self.is_wake_due:
            return
        for cores in Cores:
            if self.scheduler._may_take(cores):
                assert any(one.at in ("awake", "about to form") for one in self.workers if one.cores is cores)
        if self.is_closed and not self.scheduler.queued_tokens:
            assert not any(one.at == "asleep" for one in self.workers)

    @invariant()
    def cores_are_not_taken_twice(self) -> None:
        running = self.scheduler._running
        assert len(running) <= 2
        assert len(running) == 1 or all(one.share < 1 for one in running)

    def teardown(self) -> None:
        self.wake()
        self._to_rest()
        self.check_everyone_was_answered()

    def check_everyone_was_answered(self) -> None:
        assert self.scheduler.queued_tokens == 0
        delivered = [id(ticket) for ticket in self.bench.delivered]
        assert len(set(delivered)) == len(delivered)
        cancelled = {id(ticket) for ticket in self.cancelled}
        assert not set(delivered) & cancelled
        assert set(delivered) | cancelled == {id(ticket) for ticket in self.admitted}


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=drawings(80), stateful_step_count=40, deadline=None)
TestLifeOnCores = LifeOnCores.TestCase
TestLifeOnCores.settings = settings(max_examples=drawings(100), stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("leaves_by", ["cancel", "deadline"])
def test_what_leaves_the_queue_wakes_the_thread_that_the_rest_is_for(leaves_by: str) -> None:
    """A batch's worth and more waits, for cores by themselves; without it, the rest is for all of them together."""
    life = LifeOnCores()
    life.submit([3], None, wakes=True)
    shared, *alone = life.workers
    life._go_on(shared)
    life._go_on(shared)
    life.submit([10, 10], 100 if leaves_by == "deadline" else None, wakes=False)
    life.submit([3], None, wakes=True)
    for worker in alone:
        life._go_on(worker)
    life._go_on(shared)  # its pass ends
    life._go_on(shared)
    assert [worker.at for worker in life.workers] == ["asleep", "awake", "asleep"]
    if leaves_by == "cancel":
        life.scheduler.cancel(life.admitted[1])
    else:
        life._go_on(alone[0])
        life.bench.now += 100
        life._go_on(alone[0])
    life.no_thread_sleeps_beside_its_work()
    assert shared.at == "awake"

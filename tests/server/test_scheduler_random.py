"""Random lives of a scheduler: every ticket is answered exactly once, and the accounts are exact."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from layertap_server.admission import ClosedError, RefusedError
from layertap_server.fair_queue import Priority, Ticket

from .fake_engine import SECOND, Bench, DeadError, answers, mark_of, work

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
        if not ticket.closed:  # else its answer is on the way already
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
        self.bench.scheduler.step()

    @precondition(lambda self: self.admitted)
    @rule(data=st.data(), inputs=st.lists(st.integers(1, 8), min_size=1, max_size=2))
    def step_amid_arrivals_and_cancels(self, data: Any, inputs: list[int]) -> None:
        leaving = data.draw(st.sampled_from(self.admitted))

        def meanwhile() -> None:
            self.bench.engine.during = lambda: None
            self._cancel(leaving)
            self.submit([(size, 0) for size in inputs], Priority.NORMAL, None)

        self.bench.engine.during = meanwhile
        self.bench.scheduler.step()
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
            self.bench.scheduler.run_forever()
        except DeadError:
            assert passes - 1 == dies_at
        self.check_everyone_was_answered()
        with pytest.raises(ClosedError):
            self.bench.submit(1)
        self.__init__()  # type: ignore[misc]  # another life

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


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

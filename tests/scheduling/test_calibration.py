"""Warm-up on an engine whose cost is known: which budget it chooses, and what it teaches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from layertap_server.plan import Outputs, Work
from layertap_server.scheduling.calibration import Calibrated, calibrate
from layertap_server.scheduling.cost_model import CostModel
from scheduling.fake_engine import SECOND, facts


@dataclass
class Machine:
    """Takes its time on a clock of its own; the first run of each size takes ten times as long."""

    truth: CostModel
    # The number of tokens above which throughput falls.
    knee: int = 1 << 30
    now: int = 0
    seen: set[int] = field(default_factory=set)

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        num_tokens = sum(work.num_tokens for work in works)
        slowness = 1 if num_tokens in self.seen else 10
        slowness *= 2 if num_tokens > self.knee else 1
        self.seen.add(num_tokens)
        num_bytes = sum(work.result_bytes for work in works)
        self.now += int(self.truth.predict(num_tokens, num_bytes=num_bytes)) * slowness
        return [()] * len(works)


@pytest.mark.parametrize(
    ("fixed_us", "knee", "budget"),
    [
        (10, 1 << 30, 64),  # a token takes 10 µs: 64 of them are 98 % busy
        (50, 1 << 30, 128),
        (200, 1 << 30, 512),
        (2000, 1 << 30, 4096),
        (2000, 1024, 1024),
    ],
)
def test_the_smallest_budget_that_makes_good_use(fixed_us: int, knee: int, budget: int) -> None:
    machine = Machine(CostModel(fixed_ns=fixed_us * 1e3, per_token_ns=1e4), knee)
    assert calibrate(machine, facts(), CostModel(), clock_ns=lambda: machine.now) == Calibrated(budget, 1)


def test_a_slow_machine_does_not_take_long() -> None:
    machine = Machine(CostModel(fixed_ns=1e6, per_token_ns=1e6))
    assert calibrate(machine, facts(), CostModel(), clock_ns=lambda: machine.now).batch_tokens <= 256
    assert machine.now < 12 * SECOND
    assert max(machine.seen) == 256


def test_no_batch_is_larger_than_it_may_be() -> None:
    machine = Machine(CostModel(fixed_ns=1e7, per_token_ns=1e3))
    assert calibrate(machine, facts(), CostModel(), 300, clock_ns=lambda: machine.now).batch_tokens == 256


@dataclass
class TwoCores(Machine):
    """Of which each can take batches of its own, at a cost of their own."""

    apart: CostModel = field(default_factory=CostModel)
    num_cores: int = 2
    is_one: threading.local = field(default_factory=threading.local)
    seen_apart: set[int] = field(default_factory=set)
    both: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=30))

    def use_one_core(self) -> None:
        self.is_one.yes = True

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        if not hasattr(self.is_one, "yes"):
            return super().run(works)
        num_tokens = sum(work.num_tokens for work in works)
        if self.both.wait() == 0:  # at once: one clock for both
            slowness = 1 if num_tokens in self.seen_apart else 10
            self.seen_apart.add(num_tokens)
            num_bytes = sum(work.result_bytes for work in works)
            self.now += int(self.apart.predict(num_tokens, num_bytes=num_bytes)) * slowness
        self.both.wait()
        return [()] * len(works)


@pytest.mark.parametrize(
    ("fixed_us", "per_token_us", "expected"),
    [
        (2000, 20, Calibrated(2048, 2)),  # judged by its own batches, though shared batches of 64 are as good
        (50, 24, Calibrated(256, 2)),  # no smaller
        (200, 40, Calibrated(64, 1)),  # half as fast: never apart
    ],
)
def test_cores_that_take_batches_apart_are_measured_so(
    fixed_us: int, per_token_us: int, expected: Calibrated
) -> None:
    apart = CostModel(fixed_ns=fixed_us * 1e3, per_token_ns=per_token_us * 1e3)
    machine = TwoCores(CostModel(fixed_ns=1e4, per_token_ns=1e4), apart=apart)
    cost = CostModel()
    assert calibrate(machine, facts(), cost, clock_ns=lambda: machine.now) == expected
    if expected.num_cores == 2:
        half = machine.apart.predict(expected.batch_tokens) / 2
        assert cost.predict(expected.batch_tokens) == pytest.approx(half, rel=0.1), "of the engine's time"


def test_a_budget_that_was_set_bounds_the_batches_of_each_core() -> None:
    machine = TwoCores(CostModel(per_token_ns=1e4), apart=CostModel(per_token_ns=2e4))
    measured = calibrate(machine, facts(), CostModel(), 160, clock_ns=lambda: machine.now)
    assert measured == Calibrated(160, 2)
    assert machine.seen_apart == {160}


def test_the_cost_is_known_afterwards() -> None:
    truth = CostModel(fixed_ns=2e6, per_token_ns=2e4, per_byte_ns=0.2)
    cost, machine = CostModel(), Machine(truth)
    calibrate(machine, facts(), cost, clock_ns=lambda: machine.now)
    for num_tokens, num_bytes in ((10, 0), (100, 10_000), (1000, 0), (500, 1 << 20)):
        expected = truth.predict(num_tokens, num_bytes=num_bytes)
        assert cost.predict(num_tokens, num_bytes=num_bytes) == pytest.approx(expected, rel=0.2)


def test_a_model_of_short_texts_only_is_calibrated_too() -> None:
    machine = Machine(CostModel(fixed_ns=1e4, per_token_ns=1e4))
    short = replace(facts(), max_tokens=6)
    assert calibrate(machine, short, CostModel(), clock_ns=lambda: machine.now).batch_tokens == 64

"""Warm-up on an engine whose cost is known: which budget it chooses, and what it teaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from layertap_server.calibration import calibrate
from layertap_server.cost import CostModel
from layertap_server.plan import Outputs, Work

from .fake_engine import SECOND, facts


@dataclass
class Machine:
    """Takes its time on a clock of its own; the first run of each size takes ten times as long."""

    truth: CostModel
    # Tokens past which throughput falls.
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
    assert calibrate(machine, facts(), CostModel(), clock_ns=lambda: machine.now) == budget


def test_a_slow_machine_does_not_take_long() -> None:
    machine = Machine(CostModel(fixed_ns=1e6, per_token_ns=1e6))
    assert calibrate(machine, facts(), CostModel(), clock_ns=lambda: machine.now) <= 256
    assert machine.now < 12 * SECOND
    assert max(machine.seen) == 256


def test_no_batch_is_larger_than_it_may_be() -> None:
    machine = Machine(CostModel(fixed_ns=1e7, per_token_ns=1e3))
    assert calibrate(machine, facts(), CostModel(), 300, clock_ns=lambda: machine.now) == 256


@dataclass
class PartingMachine(Machine):
    """Runs batches of `min_tokens` in another way, which takes longer for each."""

    min_tokens: float = 128
    apart: CostModel = field(default_factory=CostModel)

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        num_tokens = sum(work.num_tokens for work in works)
        before, self.truth = self.truth, self.apart if num_tokens >= self.min_tokens else self.truth
        outputs = super().run(works)
        self.truth = before
        return outputs


@pytest.mark.parametrize(
    ("fixed_us", "per_token_us", "budget", "min_tokens"),
    [
        (2000, 10, 4096, 2048),  # judged by what it takes apart, though 64 shared are as good
        (50, 12, 256, 128),  # no less than twice what the engine begins with
        (200, 20, 64, math.inf),  # twice as slow: never apart
    ],
)
def test_where_cores_part_their_texts_full_batches_are_parted(
    fixed_us: int, per_token_us: int, budget: int, min_tokens: float
) -> None:
    apart = CostModel(fixed_ns=fixed_us * 1e3, per_token_ns=per_token_us * 1e3)
    machine = PartingMachine(CostModel(fixed_ns=1e4, per_token_ns=1e4), apart=apart)
    assert calibrate(machine, facts(), CostModel(), clock_ns=lambda: machine.now) == budget
    assert machine.min_tokens == min_tokens


def test_an_engine_that_parts_whatever_it_is_given_is_calibrated_too() -> None:
    machine = PartingMachine(CostModel(per_token_ns=1e4), apart=CostModel(per_token_ns=1e4), min_tokens=0)
    assert calibrate(machine, facts(), CostModel(), clock_ns=lambda: machine.now) == 64


def test_a_budget_that_was_set_bounds_what_cores_part() -> None:
    machine = PartingMachine(CostModel(per_token_ns=1e4), apart=CostModel(per_token_ns=1e4))
    assert calibrate(machine, facts(), CostModel(), 160, clock_ns=lambda: machine.now) == 160
    assert max(machine.seen) == 160
    assert machine.min_tokens == 80


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
    assert calibrate(machine, short, CostModel(), clock_ns=lambda: machine.now) == 64

"""The cost model alone: it finds what a batch's time is made of, and is not misled for long."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from layertap_server.plan import OutputCost
from layertap_server.scheduling.cost_model import (
    MAX_MARGIN,
    USUAL_MAP_NS,
    USUAL_POOLED_NS,
    USUAL_STEP_NS,
    CostModel,
    Margin,
)

TIMES = {"fixed_ns": 3e6, "per_token_ns": 6e4, "per_byte_ns": 0.3}


def teach(
    cost: CostModel, num_batches: int, noise: Callable[[], float] = lambda: 1.0, **times: float
) -> CostModel:
    truth, chance = CostModel(**(TIMES | times)), random.Random(0)
    for _ in range(num_batches):
        num_tokens, depth = chance.randint(4, 1000), chance.choice((0.2, 1.0, 1.0))
        num_bytes = chance.choice((0, num_tokens * 1500, num_tokens**2 * 50))
        ns = truth.predict(num_tokens, depth=depth, num_bytes=num_bytes) * noise()
        cost.observe(num_tokens, int(ns), depth=depth, num_bytes=num_bytes)
    return cost


def test_it_finds_what_the_time_is_made_of() -> None:
    cost = teach(CostModel(), 60)
    for name, value in TIMES.items():
        assert getattr(cost, name) == pytest.approx(value, rel=0.05), name
    assert cost.predict(500, depth=0.5, num_bytes=1000) == pytest.approx(3e6 + 6e4 * 250 + 300, rel=0.05)


def test_the_fixed_time_keeps_half_of_what_the_calibration_found() -> None:
    cost = teach(CostModel(), 60)
    cost.end_calibration()
    teach(cost, 300, fixed_ns=0.0)
    assert cost.fixed_ns == pytest.approx(1.5e6, rel=0.05)
    teach(cost, 300, fixed_ns=9e6)
    assert cost.fixed_ns == pytest.approx(9e6, rel=0.1)


def test_the_first_batch_teaches_something_already() -> None:
    cost = CostModel()
    assert cost.predict(100) == 0
    cost.observe(100, 5_000_000)
    assert cost.predict(100) == pytest.approx(5e6, rel=0.02)
    assert cost.predict(200) == pytest.approx(1e7, rel=0.05), "of one size only, the time is the tokens'"


def test_batches_of_one_size_leave_the_rest_as_it_was() -> None:
    cost = teach(CostModel(), 60)
    for _ in range(500):
        cost.observe(600, int(3e6 + 6e4 * 600))
    assert cost.predict(10) == pytest.approx(3.6e6, rel=0.1)


def test_bytes_are_not_blamed_for_what_texts_cost() -> None:
    """Vectors are of one size, so that their bytes count the texts: a large reply is no matter of seconds."""
    chance, cost = random.Random(0), CostModel()
    for _ in range(100):
        num_texts = chance.randint(1, 40)
        num_tokens = sum(chance.randint(3, 60) for _ in range(num_texts))
        cost.observe(num_tokens, int(2e6 + 6e4 * num_tokens + 1.5e6 * num_texts), num_bytes=1536 * num_texts)
    assert cost.per_byte_ns <= 2
    assert cost.predict(600, num_bytes=1536 * 20) == pytest.approx(2e6 + 6e4 * 600 + 1.5e6 * 20, rel=0.15)
    assert cost.predict(600, num_bytes=1 << 20) < 2 * cost.predict(600, num_bytes=1536 * 20)


def test_disturbed_batches_mislead_it_little() -> None:
    chance = random.Random(1)
    cost = teach(CostModel(), 300, lambda: 20.0 if chance.random() < 0.03 else chance.uniform(0.9, 1.1))
    assert cost.predict(500) == pytest.approx(3e6 + 6e4 * 500, rel=0.15)


def test_it_follows_a_machine_that_becomes_slower_or_faster() -> None:
    cost = teach(CostModel(), 60)
    teach(cost, 200, **{name: 3 * value for name, value in TIMES.items()})
    assert cost.predict(500) == pytest.approx(3 * (3e6 + 6e4 * 500), rel=0.1)
    teach(cost, 200)
    assert cost.predict(500) == pytest.approx(3e6 + 6e4 * 500, rel=0.1)


def test_its_error_is_known() -> None:
    chance = random.Random(2)
    assert teach(CostModel(), 300).error < 0.05
    assert 0.1 < teach(CostModel(), 300, lambda: chance.uniform(0.6, 1.4)).error < 0.4


def test_a_size_is_in_tokens_at_full_depth() -> None:
    cost = CostModel(**TIMES)
    size = cost.size(100, depth=0.5, num_bytes=10_000)
    assert size * cost.per_token_ns == pytest.approx(cost.predict(100, depth=0.5, num_bytes=10_000) - 3e6)
    assert CostModel().size(100, depth=0.5, num_bytes=10_000) == 50


def test_what_outputs_take_is_part_of_time_and_size() -> None:
    cost = CostModel(
        **TIMES, per_map_element_ns=5.0, per_pooled_element_ns=0.5, per_step_ns=1000.0, slowdown=2.0
    )
    output_ns = cost.output_ns(OutputCost(map_elements=1000, pooled_elements=2000, num_steps=3))
    assert output_ns == 5000 + 1000 + 3000
    assert cost.predict(100, output_ns=output_ns) == pytest.approx(2 * (9e6 + output_ns))
    assert cost.size(100, depth=1.0, num_bytes=0, output_ns=6e6) == pytest.approx(200)


@pytest.mark.parametrize("error", [0.3, 1.0, 3.0])
def test_batches_of_outputs_do_not_mislead_it_about_tokens(error: float) -> None:
    """Whether they take less or more than what an operation was measured to take."""
    cost = teach(CostModel(), 60)
    for _ in range(200):
        cost.observe(64, int(3e6 + 6e4 * 64 + error * 1e9), output_ns=1e9)
    for _ in range(30):
        cost.observe(500, int(3e6 + 6e4 * 500))
    assert cost.predict(500) == pytest.approx(3e6 + 6e4 * 500, rel=0.3)
    assert cost.predict(64, output_ns=1e9) > 0.9e9


@pytest.mark.parametrize("measured", [-5.0, 0.0, 1e9])
def test_a_disturbed_measurement_of_outputs_is_not_believed(measured: float) -> None:
    cost = CostModel()
    cost.learn_outputs(step_ns=measured, pooled_ns=measured)
    cost.learn_maps(map_ns=measured)
    for found, usual in (
        (cost.per_step_ns, USUAL_STEP_NS),
        (cost.per_pooled_element_ns, USUAL_POOLED_NS),
        (cost.per_map_element_ns, USUAL_MAP_NS),
    ):
        assert usual / 5 < found < 60 * usual


def test_a_margin_follows_what_is_late() -> None:
    """Few are late for it in the long run, whatever the surprises are."""
    chance, margin, num_late = random.Random(0), Margin(), 0
    for _ in range(200_000):
        is_late = chance.gauss(1.0, 0.1) > margin.factor
        num_late += is_late
        margin.observe(is_late)
    assert num_late / 200_000 < 0.006
    assert 1.2 < margin.factor < 1.4
    for _ in range(2000):
        margin.observe(True)
    assert margin.factor == MAX_MARGIN


@pytest.mark.parametrize("measured_share", [0.1, 5.0])
def test_wrong_predictions_of_outputs_do_not_move_the_slowdown(measured_share: float) -> None:
    cost = CostModel(**TIMES)
    output_ns = 3e9
    for _ in range(3):
        cost.observe(16, int(measured_share * output_ns), output_ns=output_ns)
    assert cost.slowdown == pytest.approx(1.0, rel=0.02)

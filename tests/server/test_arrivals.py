"""What lately came, and what is to be expected of it."""

from __future__ import annotations

import pytest

from layertap_server.arrivals import FORGOTTEN_NS, HORIZON_NS, WINDOW_NS, Arrivals
from layertap_server.fair_queue import Priority

SECOND = 1_000_000_000
ONE, OTHER = (Priority.NORMAL, "one"), (Priority.HIGH, "other")


def test_a_steady_rate_is_expected_to_go_on() -> None:
    arrivals = Arrivals()
    for now in range(0, 5 * SECOND, SECOND // 100):
        arrivals.note(*ONE, 10.0, now)
        if now % (SECOND // 10) == 0:
            arrivals.note(*OTHER, 1.0, now)
    expected = arrivals.expected(5 * SECOND, 2 * SECOND)
    assert expected[ONE] == pytest.approx(2 * 1000.0, rel=0.05)
    assert expected[OTHER] == pytest.approx(2 * 10.0, rel=0.15)


def test_a_burst_says_nothing_of_the_next_hour() -> None:
    arrivals = Arrivals()
    arrivals.note(*ONE, 1000.0, 0)
    assert arrivals.expected(0, 3600 * SECOND) == arrivals.expected(0, HORIZON_NS) == {ONE: 6000.0}


def test_who_stays_away_is_forgotten() -> None:
    arrivals = Arrivals()
    arrivals.note(*ONE, 10.0, 0)
    at_once = arrivals.expected(0, SECOND)[ONE]
    assert arrivals.expected(int(WINDOW_NS), SECOND)[ONE] == pytest.approx(at_once / 2.718, rel=1e-3)
    arrivals.note(*OTHER, 10.0, int(FORGOTTEN_NS))
    arrivals.note(*ONE, 10.0, int(FORGOTTEN_NS) + 1)
    assert set(arrivals.expected(2 * int(FORGOTTEN_NS) + 1, SECOND)) == {ONE}


def test_names_without_end_take_no_memory_without_end() -> None:
    arrivals = Arrivals()
    for number in range(10_000):
        arrivals.note(Priority.NORMAL, str(number), 1.0, number * SECOND // 100)
    assert len(arrivals._recent) <= 2 + FORGOTTEN_NS / (SECOND / 100)

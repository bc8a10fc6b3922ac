"""One priority of the queue: what is expected of its clients, what goes before a request, and who is forgotten."""

from __future__ import annotations

import itertools
import random

import pytest

from layertap_server.scheduling.admission import Admission
from layertap_server.scheduling.cost_model import CostModel
from layertap_server.scheduling.fair_queue import FairQueue, Priority, Ticket
from layertap_server.scheduling.priority_class import (
    FORGOTTEN_NS,
    HORIZON_NS,
    MAX_IDLE_CLIENTS,
    WINDOW_NS,
    PriorityClass,
)
from scheduling.fake_engine import SECOND, work

NUMBERS = itertools.count()


def ticket(client: str, *sizes: int, now: int = 0, priority: Priority = Priority.NORMAL) -> Ticket:
    return Ticket(
        works=[work(size) for size in sizes],
        priority=priority,
        deadline_ns=None,
        client=client,
        number=next(NUMBERS),
        submitted_ns=now,
        predicted_latency_ns=0.0,
        depth=1.0,
        token_cost=1.0,
        queued_tokens=sum(sizes),
        outputs=[None] * len(sizes),
        num_unanswered=len(sizes),
    )


def came_and_went(priority_class: PriorityClass, client: str, size: int, now: int) -> None:
    one = ticket(client, size, now=now)
    priority_class.push(one, 1.0)
    priority_class.serve(one, size, is_last=True)


# --------------------------------------------------------------------- what is expected


def test_a_steady_rate_is_expected_to_go_on() -> None:
    priority_class = PriorityClass(Priority.NORMAL)
    for now in range(0, 5 * SECOND, SECOND // 100):
        came_and_went(priority_class, "one", 10, now)
    assert priority_class.expected(5 * SECOND, 2 * SECOND) == pytest.approx(2 * 1000.0, rel=0.05)


def test_a_burst_says_nothing_of_the_next_hour() -> None:
    priority_class = PriorityClass(Priority.NORMAL)
    came_and_went(priority_class, "one", 1000, 0)
    assert priority_class.expected(0, 3600 * SECOND) == priority_class.expected(0, HORIZON_NS) == 6000.0


def test_who_stays_away_is_forgotten() -> None:
    priority_class = PriorityClass(Priority.NORMAL)
    came_and_went(priority_class, "one", 10, 0)
    at_once = priority_class.expected(0, SECOND)
    assert priority_class.expected(int(WINDOW_NS), SECOND) == pytest.approx(at_once / 2.718, rel=1e-3)
    came_and_went(priority_class, "other", 10, int(FORGOTTEN_NS) + 1)
    assert set(priority_class._flows) == {"other"}


def test_the_expected_of_others_goes_before_by_their_shares() -> None:
    queue = FairQueue()
    queue.push(ticket("one", 10))
    for one in (ticket("often", 100), ticket("seldom", 1)):
        queue.push(one)
        queue.remove(one)
    assert queue.size_ahead(Priority.NORMAL, "one", 10.0) == 10
    # In half a second, the expected arrivals of each client are as many as it has sent.
    assert queue.size_ahead(Priority.NORMAL, "one", 10.0, until=(0, WINDOW_NS)) == 10 + 20 + 1


# ------------------------------------------------------------------- names without end


def test_clients_without_end_take_no_memory_without_end() -> None:
    """Also with one that always has something waiting, so that the queue is never empty."""
    priority_class = PriorityClass(Priority.NORMAL)
    priority_class.push(ticket("stays", *[5] * 1000), 1.0)
    for number in range(20_000):
        came_and_went(priority_class, str(number), 1, number)
    assert len(priority_class._rows) == len(priority_class._flows) <= MAX_IDLE_CLIENTS + 2
    assert len(priority_class._line) < 100
    for number in range(20_000):
        came_and_went(priority_class, f"later {number}", 1, number * SECOND // 100)
    assert len(priority_class._rows) <= 2 + FORGOTTEN_NS / (SECOND / 100)


def test_a_client_that_comes_and_cancels_leaves_nothing_in_line() -> None:
    queue = FairQueue()
    queue.push(ticket("stays", 5))
    for _ in range(1000):
        gone = ticket("leaves", 5)
        queue.push(gone)
        queue.remove(gone)
    assert len(queue._classes[Priority.NORMAL]._line) < 100


def test_rows_stay_with_their_clients_when_others_are_forgotten() -> None:
    chance, queue, lane_sizes = random.Random(0), FairQueue(), {}
    for number in range(500):
        now = number * SECOND // 50
        one = ticket(str(chance.randrange(200)), chance.randint(1, 9), now=now)
        queue.push(one)
        if chance.random() < 0.9:
            queue.remove(one)
        else:
            lane_sizes[one.client] = lane_sizes.get(one.client, 0) + one.queued_tokens
    priority_class = queue._classes[Priority.NORMAL]
    for row, flow in enumerate(priority_class._rows):
        assert flow.row == row
        assert priority_class._flows[flow.client] is flow
        assert priority_class._waiting[row] == lane_sizes.get(flow.client, 0)
    assert queue.tokens_by_client == lane_sizes


def test_a_full_queue_knows_who_has_less_than_his_share_whatever_he_waits_behind() -> None:
    """The largest of the others counts, where it has more than the whole queue holds."""
    admission = Admission(FairQueue(), 100, CostModel())
    for client, size in (("giant", 250), ("small", 10)):
        admission.push(ticket(client, size))
    assert admission._room("third", 5) == 250 + 25
    assert admission._room("giant", 5) == 100


# --------------------------------------------------------------------------- the order


@pytest.mark.parametrize("seed", range(30))
def test_what_is_reckoned_to_go_before_a_request_does(seed: int) -> None:
    """As the queue serves it, input by input: within an input of each other client."""
    chance = random.Random(seed)
    weights = {str(number): chance.choice((0.5, 1.0, 1.0, 3.0)) for number in range(6)}
    queue = FairQueue(weights)

    def push() -> Ticket:
        client, number = str(chance.randrange(6)), chance.randint(1, 5)
        one = ticket(client, *[chance.randint(1, 40)] * number, priority=chance.choice(list(Priority)[1:]))
        queue.push(one)
        return one

    for _ in range(60):
        push()
        if chance.random() < 0.6:
            take_one(queue)
    ours = ticket(str(chance.randrange(6)), *[chance.randint(1, 40)] * chance.randint(1, 8))
    size = float(ours.queued_tokens)
    reckoned = queue.size_ahead(ours.priority, ours.client, size)
    queue.push(ours)
    before = 0.0
    while ours.queued_tokens:
        [unit] = take_one(queue)
        before += unit.work.num_tokens if unit.ticket is not ours else 0
    assert reckoned == pytest.approx(before, abs=6 * 40)


def take_one(queue: FairQueue) -> list:  # type: ignore[type-arg]
    taken = []

    def is_first(one: Ticket) -> bool:
        taken.append(one)
        return len(taken) == 1

    return queue.take(0, is_first)

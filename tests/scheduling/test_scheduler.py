"""The scheduler alone: a fake engine, a virtual clock, and `step` for its thread."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from layertap_server.engine_host import as_request_error
from layertap_server.enums import DType
from layertap_server.plan import OutputCost, OutputPlan, TensorData, Work
from layertap_server.scheduling.admission import ClosedError, DeadlineUnreachableError, QueueFullError
from layertap_server.scheduling.batch_builder import MAX_PASSED_OVER
from layertap_server.scheduling.cost_model import CostModel
from layertap_server.scheduling.engine_loop import EngineLoop
from layertap_server.scheduling.fair_queue import Priority, Ticket
from layertap_server.scheduling.running_batch import Cores, RunningBatch
from layertap_server.scheduling.scheduler import DeadlinePassedError, TooLargeError
from layertap_server.scheduling.watchdog import Watchdog
from scheduling.fake_engine import SECOND, Bench, DeadError, answers, mark_of, on_a_device, work

WAIT_S = 30.0


@pytest.fixture
def bench() -> Bench:
    return Bench()


# ------------------------------------------------------------------------ forming a batch


def test_a_batch_is_formed_from_all_that_waits(bench: Bench) -> None:
    tickets = [bench.submit(3, mark=1), bench.submit(2, mark=2), bench.submit(1, mark=3)]
    assert bench.scheduler.queued_tokens == 6
    assert bench.loop.step()
    assert bench.engine.marks == [[1, 2, 3]]
    assert bench.delivered == tickets
    assert bench.deliveries == 1, "the whole batch in one call"
    assert [answers(ticket) for ticket in tickets] == [[(1, 3)], [(2, 2)], [(3, 1)]]
    assert bench.scheduler.queued_tokens == 0
    assert not bench.loop.step()


def test_it_is_formed_when_the_engine_is_free_and_not_before(bench: Bench) -> None:
    """What comes during a pass rides in the next one, together with what waited already."""
    bench.submit(6, mark=1)
    bench.submit(6, mark=2)
    late = iter([3, 4])

    def arrive() -> None:
        for mark in late:
            bench.submit(2, mark=mark)

    bench.engine.during = arrive
    bench.run()
    assert bench.engine.marks == [[1], [2, 3, 4]]


def test_a_batch_keeps_to_its_tokens(bench: Bench) -> None:
    for mark, size in enumerate((4, 6, 1, 9, 1, 5)):
        bench.submit(size, mark=mark)
    bench.run()
    assert bench.engine.marks == [[0, 1], [2, 3], [4, 5]]


def test_an_input_over_the_limit_runs_alone(bench: Bench) -> None:
    for mark, size in enumerate((2, 25, 3)):
        bench.submit(size, mark=mark)
    bench.run()
    assert bench.engine.marks == [[0, 2], [1]]


def test_what_does_not_fit_lets_others_pass_and_goes_first_next(bench: Bench) -> None:
    for mark, size in enumerate((7, 9, 2, 1, 1)):
        bench.submit(size, mark=mark)
    bench.run()
    assert bench.engine.marks == [[0, 2, 3], [1, 4]]


def test_a_request_over_several_batches_comes_together_in_order(bench: Bench) -> None:
    wide = bench.submit(4, 5, 6, 3, 2, mark=1)
    other = bench.submit(1, mark=2)
    bench.loop.step()
    assert (wide.next_work, wide.queued_tokens, bench.scheduler.queued_tokens) == (2, 11, 11)
    assert bench.delivered == [other], "what fits beside it need not wait for it"
    bench.run()
    assert bench.engine.marks == [[1, 1, 2], [1, 1], [1]]
    assert bench.delivered == [other, wide]
    assert answers(wide) == [(1, 4), (1, 5), (1, 6), (1, 3), (1, 2)]
    assert (wide.batch_inputs, wide.batch_tokens) == (1, 2), "the last batch that it rode in"
    assert wide.compute_ns == 1000 * (10 + 9 + 2), "all of the batches that it rode in"
    assert (other.compute_ns, other.batch_inputs) == (10_000, 3)
    assert wide.started_ns == wide.submitted_ns


def test_a_higher_priority_goes_first(bench: Bench) -> None:
    for mark, priority in ((1, Priority.LOW), (2, Priority.NORMAL), (3, Priority.HIGH), (4, Priority.NORMAL)):
        bench.submit(10, mark=mark, priority=priority)
        bench.now += 1
    bench.run()
    assert bench.engine.marks == [[3], [2], [4], [1]]


def test_low_priority_is_never_starved(bench: Bench) -> None:
    """With new urgent work always there, an old request still has its turn, by its age."""
    bench.submit(10, mark=1, priority=Priority.LOW)
    for _ in range(40):
        bench.submit(10, mark=9, priority=Priority.HIGH)
        bench.now += SECOND // 10
        bench.loop.step()
    order = [marks[0] for marks in bench.engine.marks]
    assert order.index(1) == 20, "two head starts of a second each, in tenths"


def test_a_neglected_priority_gets_a_batch_at_each_turn_and_no_more() -> None:
    """However much of it waits: its age is that of its last ride."""
    bench = Bench(max_queue_tokens=1000)
    bench.submit(*[10] * 50, mark=1, priority=Priority.LOW)
    for _ in range(66):
        bench.submit(10, mark=9, priority=Priority.HIGH)
        bench.now += SECOND // 10
        bench.loop.step()
    order = [marks[0] for marks in bench.engine.marks]
    assert [place for place, mark in enumerate(order) if mark == 1] == [20, 41, 62]


# ------------------------------------------------------------------------- fair shares


def test_clients_take_turns_by_tokens(bench: Bench) -> None:
    """A request larger than the whole queue leaves room for others, too."""
    giant = bench.submit(*[5] * 40, mark=1, client="a")
    for mark in (2, 3):
        bench.submit(5, mark=mark, client="b")
        bench.submit(5, mark=mark + 2, client="c")
    bench.run()
    assert bench.engine.marks[:4] == [[1, 2], [4, 1], [3, 5], [1, 1]]
    assert len(answers(giant)) == 40


def test_a_share_goes_by_weight(bench: Bench) -> None:
    bench.scheduler.admission.queue.weights = {"heavy": 3.0}
    bench.submit(*[1] * 30, mark=1, client="light")
    bench.submit(*[1] * 30, mark=3, client="heavy")
    bench.loop.step()
    bench.loop.step()
    assert [mark for marks in bench.engine.marks for mark in marks].count(3) == 15


def test_who_was_idle_has_no_claim_on_the_past(bench: Bench) -> None:
    bench.submit(*[1] * 50, mark=1, client="a")
    for _ in range(3):
        bench.loop.step()
    bench.submit(*[1] * 30, mark=2, client="b")
    bench.loop.step()
    assert sorted(bench.engine.marks[-1]) == [1] * 5 + [2] * 5


def test_of_one_client_the_earliest_deadline_goes_first(bench: Bench) -> None:
    bench.submit(10, mark=1)
    bench.submit(10, mark=2, deadline_ns=bench.now + 9 * SECOND)
    bench.submit(10, mark=3, deadline_ns=bench.now + 5 * SECOND)
    bench.submit(10, mark=4, deadline_ns=bench.now + 9999 * SECOND)
    bench.run()
    assert bench.engine.marks == [[3], [2], [1], [4]], "patience ends: none waits for ever"


def test_a_prediction_counts_the_turns_of_others_not_their_backlog(bench: Bench) -> None:
    bench.scheduler.admission.cost = CostModel(per_token_ns=SECOND)
    bench.submit(*[10] * 8, client="giant")
    bench.submit(2, client="small", deadline_ns=bench.now + 4 * SECOND)
    with pytest.raises(DeadlineUnreachableError):
        bench.submit(1, client="small", deadline_ns=bench.now + 5 * SECOND)
    bench.submit(1, client="small", deadline_ns=bench.now + 6 * SECOND)
    bench.submit(1, client="giant", priority=Priority.HIGH, deadline_ns=bench.now + SECOND)


def test_a_queue_that_one_client_filled_has_room_for_another(bench: Bench) -> None:
    bench.submit(*[10] * 10, client="giant")
    with pytest.raises(QueueFullError):
        bench.submit(1, client="giant")
    bench.submit(25, client="small")
    with pytest.raises(QueueFullError):
        bench.submit(1, client="third")
    assert bench.scheduler.queued_tokens == 125


# -------------------------------------------------------------------------------- depth


def shallow(bench: Bench, size: int, mark: int) -> Ticket:
    plan = OutputPlan(DType.FLOAT32, hidden_states=(2,))
    return bench.scheduler.submit([Work(np.full(size, mark), None, plan, ())], Priority.NORMAL, None)


def test_texts_of_like_depth_ride_together_where_that_saves_time(bench: Bench) -> None:
    bench.scheduler.num_layers = 12
    bench.scheduler.admission.cost = CostModel(fixed_ns=1000, per_token_ns=1000)
    for _ in range(10):
        bench.submit(5, mark=12)
        shallow(bench, 5, mark=2)
    bench.run()
    assert bench.engine.marks == [[12, 12], [2, 2]] * 5


def test_few_texts_ride_together_whatever_their_depth(bench: Bench) -> None:
    bench.scheduler.num_layers = 12
    bench.scheduler.admission.cost = CostModel(fixed_ns=20_000, per_token_ns=1000)
    bench.submit(5, mark=12)
    shallow(bench, 5, mark=2)
    bench.run()
    assert bench.engine.marks == [[12, 2]]


def test_no_text_is_passed_over_for_its_depth_for_long(bench: Bench) -> None:
    bench.scheduler.num_layers = 12
    bench.scheduler.admission.cost = CostModel(per_token_ns=1000)
    for _ in range(8):
        bench.submit(5, mark=12, client="deep")
    shallow(bench, 5, mark=2)
    bench.run()
    assert [2 in marks for marks in bench.engine.marks].index(True) <= MAX_PASSED_OVER


def test_a_batch_keeps_to_its_time(bench: Bench) -> None:
    bench.scheduler.admission.cost = CostModel(fixed_ns=1000, per_token_ns=1000)
    bench.scheduler.max_batch_ns = 5000
    bench.submit(2, 2, 2, 9, 1, mark=1)
    bench.run()
    assert [len(works) for works in bench.engine.batches] == [2, 1, 1, 1]


# ------------------------------------------------------------------------------ admission


def test_what_is_sure_to_be_refused_is_known_before_its_tokens_are(bench: Bench) -> None:
    bench.scheduler.admission.cost = CostModel(per_token_ns=SECOND)
    bench.submit(*[10] * 10)
    for deadline_ns, refusal in ((None, QueueFullError), (bench.now, QueueFullError)):
        with pytest.raises(refusal):
            bench.scheduler.check(1, Priority.NORMAL, deadline_ns)
    bench.loop.step()
    bench.scheduler.admission.cost = CostModel(per_token_ns=SECOND)
    bench.scheduler.check(10, Priority.NORMAL, None)
    with pytest.raises(DeadlineUnreachableError):
        bench.scheduler.check(1, Priority.NORMAL, bench.now + 80 * SECOND)
    assert bench.scheduler.queued_tokens == 90


def test_a_full_queue_refuses_and_says_when_to_come_again(bench: Bench) -> None:
    bench.scheduler.admission.cost = CostModel(fixed_ns=0.5e9, per_token_ns=1e7)
    for _ in range(9):
        bench.submit(10)
    with pytest.raises(QueueFullError) as refused:
        bench.submit(11)
    assert refused.value.retry_after_s == pytest.approx(9 * 0.5 + 90 * 0.01)
    bench.submit(10)
    assert bench.scheduler.queued_tokens == 100
    with pytest.raises(QueueFullError):
        bench.submit(1)
    bench.loop.step()
    bench.submit(10)


def test_an_empty_queue_takes_a_request_of_any_size(bench: Bench) -> None:
    ticket = bench.submit(*[10] * 50)
    with pytest.raises(QueueFullError):
        bench.submit(1)
    bench.run()
    assert len(answers(ticket)) == 50


def costly(seconds: float, num_tokens: int = 1) -> Work:
    """An input whose outputs take so long beside the layers, by the cost model of `with_outputs`."""
    return replace(work(num_tokens), cost=OutputCost(pooled_elements=int(seconds * 1000)))


def with_outputs(per_token_ns: float = 1e6) -> CostModel:
    return CostModel(per_token_ns=per_token_ns, per_pooled_element_ns=1e6)


def test_what_outputs_take_counts_at_the_door(bench: Bench) -> None:
    bench.scheduler.admission.cost = with_outputs()
    scheduler, second = bench.scheduler, bench.now + SECOND
    scheduler.submit([work(10)], Priority.NORMAL, second)
    with pytest.raises(DeadlineUnreachableError):
        scheduler.submit([costly(3)], Priority.NORMAL, second)
    scheduler.submit([costly(3)], Priority.NORMAL, None)
    with pytest.raises(DeadlineUnreachableError):
        scheduler.submit([work(10)], Priority.NORMAL, second)


def test_a_pass_is_predicted_with_its_outputs_and_hangs_later(bench: Bench) -> None:
    bench.scheduler.admission.cost = with_outputs()
    bench.scheduler.submit([costly(3)], Priority.NORMAL, None)
    formed = bench.scheduler.form()
    assert formed is not None
    assert formed.predicted_ns == pytest.approx(3.001 * SECOND, rel=0.01)
    # By the clock alone, if the system has no times of threads; between two checks at most 2 s count.
    watchdog = Watchdog("m", SECOND, lambda: bench.now, lambda _: None)
    looks = []
    for _ in range(20):
        looks.append(watchdog.look(bench.scheduler.under_way()) is None)
        bench.now += 2 * SECOND
    assert looks.index(False) == 16, "ten times what was predicted"


def test_a_batch_holds_no_more_outputs_than_twice_its_layers(bench: Bench) -> None:
    bench.scheduler.max_batch_tokens = 10
    bench.scheduler.admission.cost = with_outputs(per_token_ns=SECOND / 10)
    for seconds in (0.9, 0.9, 0.9, 5, 0.1):
        bench.scheduler.submit([costly(seconds)], Priority.NORMAL, None)
    bench.run()
    assert [len(works) for works in bench.engine.batches] == [3, 1, 1]  # the last fits beside the first two


def test_a_client_pays_for_its_outputs(bench: Bench) -> None:
    bench.scheduler.admission.cost = with_outputs()
    tickets = [
        bench.scheduler.submit([costly(1, num_tokens=10)] * 3, Priority.NORMAL, None, "maps"),
        bench.scheduler.submit([work(10)] * 3, Priority.NORMAL, None, "vectors"),
    ]
    assert tickets[0].token_cost > 50 * tickets[1].token_cost


def test_a_deadline_out_of_reach_is_refused(bench: Bench) -> None:
    bench.scheduler.admission.cost = CostModel(per_token_ns=SECOND)
    bench.submit(6)
    assert bench.submit(4, deadline_ns=bench.now + 10 * SECOND)
    with pytest.raises(DeadlineUnreachableError) as refused:
        bench.submit(1, deadline_ns=bench.now + 10 * SECOND)
    assert refused.value.retry_after_s == pytest.approx(10)
    assert bench.scheduler.queued_tokens == 10


def test_above_capacity_the_smallest_is_not_the_one_that_finds_room() -> None:
    bench = Bench(max_queue_tokens=10_000)
    bench.scheduler.admission.cost = CostModel(per_token_ns=SECOND)
    for _ in range(160):
        bench.submit(2)

    def finds_room(num_tokens: int, seconds: int) -> bool:
        try:
            bench.scheduler.cancel(bench.submit(num_tokens, deadline_ns=bench.now + seconds * SECOND))
        except DeadlineUnreachableError:
            return False
        return True

    assert [finds_room(size, 323) for size in (1, 2, 4)] == [False] * 3
    assert [finds_room(size, 325) for size in (1, 2, 4)] == [True] * 3
    assert not finds_room(6, 325)


def test_an_idle_engine_tries_whatever_it_predicts(bench: Bench) -> None:
    """A wrong estimate would otherwise refuse for ever the work that would mend it."""
    bench.scheduler.admission.cost = CostModel(per_token_ns=SECOND)
    ticket = bench.submit(5, deadline_ns=bench.now + 1_000_000)
    bench.run()
    assert answers(ticket) == [(0, 5)]
    assert bench.scheduler.admission.cost.per_token_ns < SECOND / 1000


def test_the_batch_under_way_counts_for_what_is_left_of_it(bench: Bench) -> None:
    bench.scheduler.admission.cost = CostModel(per_token_ns=SECOND)
    bench.submit(8)

    def arrive() -> None:
        bench.engine.during = lambda: None
        bench.now += 3 * SECOND
        with pytest.raises(DeadlineUnreachableError):
            bench.submit(1, deadline_ns=bench.now + 5 * SECOND)
        bench.submit(1, deadline_ns=bench.now + 6 * SECOND)

    bench.engine.during = arrive
    bench.run()
    assert len(bench.delivered) == 2


def test_a_deadline_that_passes_in_the_queue_drops_the_work(bench: Bench) -> None:
    late = bench.submit(5, mark=1, deadline_ns=bench.now + SECOND)
    in_time = bench.submit(5, mark=2, deadline_ns=bench.now + 2 * SECOND)
    bench.now += SECOND
    bench.run()
    assert bench.engine.marks == [[2]]
    assert isinstance(late.error, DeadlinePassedError)
    assert in_time.error is None
    assert sorted(bench.delivered, key=id) == sorted([late, in_time], key=id)


def test_a_deadline_that_passes_halfway_drops_the_rest(bench: Bench) -> None:
    ticket = bench.submit(10, 10, 10, mark=1, deadline_ns=bench.now + 15_000)
    bench.run()
    assert bench.engine.marks == [[1], [1]]
    assert isinstance(ticket.error, DeadlinePassedError)
    assert bench.delivered == [ticket]
    assert bench.scheduler.queued_tokens == 0


# --------------------------------------------------------------------------------- cancel


def test_a_cancel_frees_its_tokens_at_once(bench: Bench) -> None:
    gone, stays = bench.submit(60, 30, mark=1), bench.submit(10, mark=2)
    with pytest.raises(QueueFullError):
        bench.submit(1)
    bench.scheduler.cancel(gone)
    assert bench.scheduler.queued_tokens == 10
    bench.submit(90, mark=3)
    bench.scheduler.cancel(gone)
    assert bench.scheduler.queued_tokens == 100
    bench.run()
    assert bench.engine.marks == [[2], [3]]
    assert gone not in bench.delivered
    assert stays in bench.delivered


def test_a_cancel_during_its_batch_is_not_delivered(bench: Bench) -> None:
    gone, stays = bench.submit(4, 9, mark=1), bench.submit(1, mark=2)
    bench.engine.during = lambda: bench.scheduler.cancel(gone)
    bench.run()
    assert bench.engine.marks == [[1, 2]], "its second input never runs"
    assert bench.delivered == [stays]
    assert bench.scheduler.stats.dropped == {("cancelled", "queued"): 1}


def test_a_cancel_is_counted_where_it_finds_the_work(bench: Bench) -> None:
    gone = [bench.submit(8, mark=mark) for mark in range(3)]
    bench.engine.during = lambda: bench.scheduler.cancel(gone[0])
    bench.loop.step()
    bench.engine.during = lambda: None
    bench.loop.step()
    for ticket in gone[1:]:
        bench.scheduler.cancel(ticket)
    stages = {stage: count for (_, stage), count in bench.scheduler.stats.dropped.items()}
    assert stages == {"running": 1, "sending": 1, "queued": 1}


# ------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("guilty", range(8))
def test_a_failing_batch_is_halved_down_to_the_guilty(bench: Bench, guilty: int) -> None:
    tickets = [bench.submit(1, mark=mark) for mark in range(8)]
    bench.engine.poison = {guilty}
    bench.run()
    assert sorted(ticket.works[0].input_ids[0] for ticket in bench.delivered) == list(range(8))
    for mark, ticket in enumerate(tickets):
        if mark == guilty:
            assert str(ticket.error) == f"cannot bear {guilty}"
        else:
            assert answers(ticket) == [(mark, 1)]
    assert len(bench.engine.batches) == 1 + 2 * 3, "the whole, then two halves at each of three levels"


def test_a_request_with_one_guilty_input_fails_and_is_not_run_further(bench: Bench) -> None:
    bench.engine.poison = {1}
    ticket, other = bench.submit(5, 5, 5, mark=1), bench.submit(2, mark=2)
    bench.run()
    assert str(ticket.error) == "cannot bear 1"
    assert answers(other) == [(2, 2)]
    assert bench.engine.marks == [[1, 1], [1], [2]]
    assert bench.delivered.count(ticket) == 1


def test_a_failed_pass_teaches_no_cost(bench: Bench) -> None:
    bench.submit(5, mark=1)
    bench.engine.poison = {1}
    bench.run()
    assert bench.scheduler.admission.cost == CostModel()


# ------------------------------------------------------------------------- out of memory


def test_a_batch_that_does_not_fit_is_run_in_parts_and_nobody_is_blamed(bench: Bench) -> None:
    bench.engine.max_tokens = 5
    tickets = [bench.submit(2, mark=mark) for mark in range(5)]
    bench.run()
    assert [answers(ticket) for ticket in tickets] == [[(mark, 2)] for mark in range(5)]
    assert bench.engine.marks == [[0, 1, 2, 3, 4], [0, 1], [2, 3, 4], [2], [3, 4]]


def test_batches_keep_to_what_fits_and_grow_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.engine.max_tokens = 8
    for mark in range(10):
        bench.submit(5, mark=mark)
    bench.run()
    assert bench.engine.marks == [[0, 1], [0], [1], *([mark] for mark in range(2, 10))]
    assert bench.scheduler.batch_tokens == 7
    assert "did not fit into memory" in caplog.text
    bench.engine.max_tokens = 100
    for _ in range(400):
        bench.submit(1)
        bench.run()
    assert bench.scheduler.batch_tokens == 10, "as many as were configured"


def test_large_results_are_blamed_where_as_many_tokens_fit_before(bench: Bench) -> None:
    bench.engine.max_bytes = 100
    bench.submit(10)
    bench.run()
    for mark in range(4):
        bench.submit(2, mark=mark, result_bytes=50)
    bench.run()
    assert [len(works) for works in bench.engine.batches] == [1, 4, 2, 2]
    assert bench.scheduler.batch_tokens == 10
    assert bench.scheduler.memory_limit.max_bytes < 200


def test_an_input_that_does_not_fit_alone_is_told_so(bench: Bench) -> None:
    bench.engine.max_tokens = 5
    large, small = bench.submit(6), bench.submit(2, mark=2)
    bench.run()
    assert isinstance(large.error, TooLargeError)
    refusal = as_request_error(large.error)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")
    assert refusal.retry_after_s is None
    assert answers(small) == [(2, 2)]


# -------------------------------------------------------------- a device that runs by itself


def test_the_next_batch_is_chosen_late_in_a_pass_and_launched_before_its_end() -> None:
    """What comes during a pass rides in the next one, and that one is launched before this one ends."""
    bench, device = on_a_device(batch_ns=10_000, launch_ns=500)
    bench.submit(6, mark=0)
    bench.submit(6, mark=1)
    bench.loop.step()
    device.at(bench.now + 6000, lambda: bench.submit(4, mark=2))
    device.at(bench.now + 9900, lambda: bench.submit(2, mark=3))
    bench.run()
    assert bench.engine.marks == [[0], [1, 2], [3]]
    assert device.idle_ns == 500, "until the first was launched, and never again"
    assert [answers(ticket)[0][0] for ticket in bench.delivered] == [0, 1, 2, 3]


def test_an_idle_device_is_given_what_comes_at_once() -> None:
    bench, _ = on_a_device(batch_ns=10_000, launch_ns=500)
    ticket = bench.submit(1)
    bench.loop.step()
    assert (bench.engine.marks, bench.delivered) == ([[0]], [])
    assert not bench.scheduler.admission.queue
    bench.loop.step()
    assert bench.delivered == [ticket]
    assert bench.now - ticket.submitted_ns == 10_500


def test_a_launched_batch_that_fails_is_halved_while_the_next_one_waits() -> None:
    bench, _ = on_a_device(batch_ns=10_000, launch_ns=500)
    bench.engine.poison = {1}
    tickets = [bench.submit(5, mark=mark) for mark in range(4)]
    bench.run()
    assert str(tickets[1].error) == "cannot bear 1"
    assert [answers(tickets[mark]) for mark in (0, 2, 3)] == [[(0, 5)], [(2, 5)], [(3, 5)]]


def test_all_that_a_device_has_is_answered_when_it_is_abandoned() -> None:
    bench, device = on_a_device(batch_ns=10_000, launch_ns=500)
    for mark in range(3):
        bench.submit(10, mark=mark)
    bench.loop.step()
    device.on_wait = lambda: bench.scheduler.abandon("it hangs")
    bench.loop.step()
    assert sorted(str(ticket.error) for ticket in bench.delivered) == ["it hangs"] * 3
    assert not bench.scheduler._running


# ------------------------------------------------------- cores that take batches of their own


def on_two_cores(**settings: Any) -> Bench:
    bench = Bench(**settings)
    bench.scheduler.num_cores = 2
    return bench


def taken(one: RunningBatch | None) -> list[int]:
    """The marks in a batch."""
    return [] if one is None else [mark_of(unit.work) for unit in one.units]


def test_what_fits_into_a_batch_is_shared_by_cores_with_nothing_else_to_do() -> None:
    bench = on_two_cores()
    for mark in range(3):
        bench.submit(3, mark=mark)
    assert bench.scheduler.form(Cores.ONE) is None
    shared = bench.scheduler.form(Cores.ALL)
    assert taken(shared) == [0, 1, 2]
    bench.submit(3, mark=3)
    bench.submit(10, mark=4)
    assert bench.scheduler.form(Cores.ALL) is bench.scheduler.form(Cores.ONE) is None, "all of them are busy"
    assert shared is not None
    bench.loop.finish(shared)
    assert bench.scheduler.form(Cores.ALL) is None, "more waits now than fits into a batch"
    assert taken(bench.scheduler.form(Cores.ONE)) == [3]


def test_cores_with_nothing_to_do_part_what_waits() -> None:
    bench = on_two_cores()
    for mark in range(4):
        bench.submit(3, mark=mark)
    assert bench.scheduler.form(Cores.ALL) is None
    first, second = (bench.scheduler.form(Cores.ONE) for _ in range(2))
    assert (taken(first), taken(second)) == ([0, 1], [2, 3])
    for mark in range(4, 9):
        bench.submit(3, mark=mark)
    assert bench.scheduler.form(Cores.ALL) is None
    assert first is not None
    bench.loop.finish(first)
    assert taken(bench.scheduler.form(Cores.ONE)) == [4, 5, 6], "a full batch, beside one that goes on"


def test_a_core_takes_what_comes_while_another_is_busy() -> None:
    bench = on_two_cores()
    for mark in range(2):
        bench.submit(10, mark=mark)
    first, second = (bench.scheduler.form(Cores.ONE) for _ in range(2))
    assert first is not None
    assert second is not None
    bench.loop.finish(second)
    bench.submit(1, mark=2)
    assert bench.scheduler.form(Cores.ALL) is None
    alone = bench.scheduler.form(Cores.ONE)
    assert taken(alone) == [2]
    assert alone is not None
    for one in (first, alone):
        bench.loop.finish(one)
    bench.submit(1, mark=3)
    assert bench.scheduler.form(Cores.ONE) is None
    assert taken(bench.scheduler.form(Cores.ALL)) == [3]


def test_one_long_input_is_shared() -> None:
    bench = on_two_cores()
    bench.submit(30, mark=1)
    assert taken(bench.scheduler.form(Cores.ALL)) == [1]
    bench = on_two_cores()
    bench.submit(30, 30, mark=1)
    assert bench.scheduler.form(Cores.ALL) is None


def test_cores_may_share_less_than_fits_into_a_batch() -> None:
    bench = on_two_cores()
    bench.scheduler.max_shared_tokens = 5
    for mark in range(2):
        bench.submit(3, mark=mark)
    assert bench.scheduler.form(Cores.ALL) is None
    assert taken(bench.scheduler.form(Cores.ONE)) == [0]


def test_the_time_of_a_core_is_a_part_of_the_engines() -> None:
    bench = on_two_cores(max_queue_tokens=1000)
    scheduler = bench.scheduler
    # The time of twenty tokens on two cores.
    scheduler.admission.cost = CostModel(per_token_ns=1e6)
    for mark in range(4):
        bench.submit(10, mark=mark)
    first, second = (scheduler.form(Cores.ONE) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.predicted_ns == second.predicted_ns == 20e6, "one core alone"
    assert sum(one.remaining_ns(bench.now) for one in (first, second)) == 20e6
    # The running ones, the queued ones, and its own.
    with pytest.raises(DeadlineUnreachableError, match=r"the predicted time of 0\.050 s"):
        bench.submit(10, deadline_ns=bench.now + 49_000_000)
    bench.now += 20_000_000
    for one in (first, second):
        one.outputs = lambda: [(TensorData(np.zeros(1)),)]
        bench.loop.finish(one)
    assert scheduler.stats.busy_ns == 20_000_000
    assert scheduler.admission.cost.error == 0
    assert scheduler.admission.cost.predict(10) == pytest.approx(10e6)


def test_a_bound_of_time_is_that_of_a_core() -> None:
    bench = on_two_cores(max_batch_tokens=100)
    bench.scheduler.admission.cost = CostModel(per_token_ns=1e6)
    bench.scheduler.max_batch_ns = 40e6
    bench.scheduler.max_shared_tokens = 1
    for mark in range(20):
        bench.submit(5, mark=mark)
    assert taken(bench.scheduler.form(Cores.ONE)) == [0, 1, 2, 3]


def test_the_passes_of_all_cores_are_under_way() -> None:
    bench = on_two_cores()
    for mark in range(2):
        bench.submit(10, mark=mark)
    first, second = (bench.scheduler.form(Cores.ONE) for _ in range(2))
    assert bench.scheduler.under_way() == [first, second]
    assert first is not None
    assert first.thread_id == threading.get_native_id()
    bench.loop.finish(first)
    assert bench.scheduler.under_way() == [second]


class Threads:
    """The threads of a scheduler on two cores."""

    def __init__(self, bench: Bench) -> None:
        self.failures: list[BaseException] = []
        self._scheduler = bench.scheduler
        self._threads = [
            threading.Thread(target=self._serve, args=(cores,), daemon=True)
            for cores in (Cores.ALL, Cores.ONE, Cores.ONE)
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, cores: Cores) -> None:
        try:
            EngineLoop(self._scheduler, cores).run()
        except BaseException as error:
            self.failures.append(error)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()


def test_threads_take_what_is_theirs_and_end_when_all_is_done() -> None:
    """A batch for all cores; two at once, each of which goes on only beside the other; then one for all again."""
    bench = on_two_cores()
    both = threading.Barrier(2)
    shared: list[int] = []

    def during() -> None:
        marks = [mark_of(one) for one in bench.engine.batches[-1]]
        if marks in ([0], [5]):
            shared.append(marks[0])
        else:
            both.wait(WAIT_S)

    bench.engine.during = during
    threads = Threads(bench)

    def done(tickets: list[Ticket]) -> None:
        for ticket in tickets:
            while ticket not in bench.delivered:
                assert threads._threads[0].is_alive()

    first = bench.submit(3, mark=0)
    bench.scheduler.wake()
    done([first])
    many = [bench.submit(10, mark=mark) for mark in (1, 2, 3, 4)]
    bench.scheduler.wake()
    done(many)
    last = bench.submit(3, mark=5)
    bench.scheduler.close()
    threads.join()
    assert not threads.failures
    assert shared == [0, 5]
    assert {id(ticket) for ticket in bench.delivered} == {id(ticket) for ticket in [first, *many, last]}
    assert all(answers(ticket) for ticket in bench.delivered)


def test_when_one_thread_dies_all_end_and_each_caller_is_told_once() -> None:
    bench = on_two_cores()
    both = threading.Barrier(2)
    deaths = itertools.count()

    def during() -> None:
        both.wait(WAIT_S)
        if next(deaths):
            return
        raise DeadError

    bench.engine.during = during
    tickets = [bench.submit(10, mark=mark) for mark in range(4)]
    threads = Threads(bench)
    bench.scheduler.wake()
    threads.join()
    assert [type(one) for one in threads.failures] == [DeadError]
    assert sorted(map(id, bench.delivered)) == sorted(map(id, tickets))
    assert all(isinstance(ticket.error, ClosedError) for ticket in tickets if ticket.error)
    assert sum(ticket.error is not None for ticket in tickets) >= 3
    assert not bench.scheduler._running


def test_a_batch_that_fails_on_a_core_is_halved_there() -> None:
    bench = on_two_cores()
    bench.engine.poison = {1}
    tickets = [bench.submit(3, mark=mark) for mark in range(4)]
    threads = Threads(bench)
    bench.scheduler.wake()
    bench.scheduler.close()
    threads.join()
    assert str(tickets[1].error) == "cannot bear 1"
    assert [answers(tickets[mark]) for mark in (0, 2, 3)] == [[(0, 3)], [(2, 3)], [(3, 3)]]


# ------------------------------------------------------------------------------ death


def serve_until_dead(bench: Bench) -> None:
    with pytest.raises(DeadError):
        bench.loop.run()


def test_a_dead_thread_answers_everyone(bench: Bench) -> None:
    running, waiting = bench.submit(10, 10, mark=1), bench.submit(10, mark=2)
    cancelled = bench.submit(10, mark=3)
    bench.scheduler.cancel(cancelled)
    bench.engine.dies = True
    serve_until_dead(bench)
    assert bench.delivered == [running, waiting]
    assert all(isinstance(ticket.error, ClosedError) for ticket in bench.delivered)
    assert bench.scheduler.queued_tokens == 0
    with pytest.raises(ClosedError):
        bench.submit(1)
    bench.engine.dies = False
    assert bench.scheduler.reopen(1)
    again = bench.submit(10, mark=4)
    bench.run()
    assert answers(again) == [(4, 10)]


def test_who_waits_for_a_pass_that_hangs_is_answered_once(bench: Bench) -> None:
    """From another thread, as the watchdog does; the pass may return after all."""
    running, waiting = bench.submit(10, mark=1), bench.submit(10, mark=2)

    def hang() -> None:
        assert len(bench.scheduler.under_way()) == 1
        watchdog = threading.Thread(target=bench.scheduler.abandon, args=("it hangs",))
        watchdog.start()
        watchdog.join(WAIT_S)
        assert bench.delivered == [running, waiting]

    assert not bench.scheduler.under_way()
    bench.engine.during = hang
    bench.run()
    assert not bench.scheduler.under_way()
    assert bench.delivered == [running, waiting]
    assert [str(ticket.error) for ticket in bench.delivered] == ["it hangs"] * 2


def test_what_was_settled_before_the_thread_died_is_delivered_too(bench: Bench) -> None:
    """Late ones dropped at forming, and the good half of a batch whose other half kills."""
    late = bench.submit(1, mark=0, deadline_ns=bench.now + SECOND)
    bench.now += SECOND
    good, fatal = bench.submit(1, mark=1), bench.submit(1, mark=2)
    passes = itertools.count()

    def fail_then_die() -> None:
        number = next(passes)
        if number == 0:
            raise RuntimeError("the batch fails, and is halved")
        bench.engine.dies = number == 2

    bench.engine.during = fail_then_die
    serve_until_dead(bench)
    assert sorted(map(id, bench.delivered)) == sorted(map(id, [late, good, fatal]))
    assert isinstance(late.error, DeadlinePassedError)
    assert answers(good) == [(1, 1)]
    assert isinstance(fatal.error, ClosedError)


def test_an_engine_that_miscounts_fails_its_batch_and_lives(bench: Bench) -> None:
    tickets = [bench.submit(1, mark=mark) for mark in range(3)]
    run = bench.engine.run
    bench.engine.run = lambda works: run(works)[:1]  # type: ignore[method-assign]
    bench.run()
    assert bench.delivered == tickets
    assert [answers(ticket) for ticket in tickets] == [[(mark, 1)] for mark in range(3)]


# ------------------------------------------------------------------------------ the thread


def test_close_drains_and_admits_no_more(bench: Bench) -> None:
    tickets = [bench.submit(10, mark=mark) for mark in range(3)]
    bench.scheduler.close()
    with pytest.raises(ClosedError):
        bench.submit(1)
    bench.loop.run()
    assert bench.delivered == tickets
    assert [answers(ticket) for ticket in tickets] == [[(mark, 10)] for mark in range(3)]


def test_a_waiting_thread_is_woken_by_work_and_by_close() -> None:
    bench = Bench()
    answered = threading.Event()
    bench.engine.during = answered.set
    thread = threading.Thread(target=bench.loop.run, daemon=True)
    thread.start()
    bench.submit(3, mark=7)
    bench.scheduler.wake()
    assert answered.wait(WAIT_S)
    bench.scheduler.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert [answers(ticket) for ticket in bench.delivered] == [[(7, 3)]]

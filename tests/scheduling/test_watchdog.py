"""What counts as hanging: a clock and a thread's activity that the test moves, and no waiting."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import pytest

from layertap_server.scheduling.running_batch import RunningBatch
from layertap_server.scheduling.watchdog import Activity, Watchdog, activity_of

SECOND = 1_000_000_000


@dataclass
class Machine:
    """Two looks a second at one pass; each second its thread computes, or waits for a core, for so long."""

    predicted_s: float = 0.1
    timeout_s: float = 30.0
    tells: bool = True
    now: int = 1000 * SECOND
    computed_ns: float = 5.0 * SECOND
    queued_ns: float = 0.0
    running: list[RunningBatch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watchdog = Watchdog("bert", self.timeout_s * SECOND, lambda: self.now, self._activity)
        self.begin()

    def _activity(self, thread_id: int) -> Activity | None:
        assert thread_id == 7
        return Activity(int(self.computed_ns), int(self.queued_ns)) if self.tells else None

    def begin(self) -> None:
        self.running = [RunningBatch([], 1.0, self.predicted_s * SECOND, self.now, 7)]

    def hangs_after(self, computes: float, queues: float, at_most_s: int = 200) -> float | None:
        """The seconds until the pass is said to hang."""
        for half in range(1, 2 * at_most_s + 1):
            self.now += SECOND // 2
            self.computed_ns += computes * SECOND / 2
            self.queued_ns += queues * SECOND / 2
            if self.watchdog.look(self.running):
                return half / 2
        return None


def test_an_endless_loop_is_found() -> None:
    assert Machine().hangs_after(computes=1.0, queues=0.0) == pytest.approx(31, abs=1)


def test_a_thread_that_waits_for_what_never_comes_is_found() -> None:
    assert Machine().hangs_after(computes=0.0, queues=0.0) == pytest.approx(31, abs=1)


@pytest.mark.parametrize("computes", [0.1, 0.01, 0.0001])
def test_a_thread_that_is_short_of_a_core_does_not_hang(
    computes: float, caplog: pytest.LogCaptureFixture
) -> None:
    assert Machine().hangs_after(computes=computes, queues=0.99 - computes) is None
    [said] = [record.getMessage() for record in caplog.records]
    assert (
        "bert: a forward pass is slow, but makes progress: it has run for 30.5 s; 0.100 s was predicted"
        in said
    )
    assert "waited for a core for" in said


def test_a_thread_that_waits_for_others_that_are_short_of_a_core_does_not_hang() -> None:
    """Of the cores that share a pass, it goes on only now and then."""
    machine = Machine()
    for _ in range(10):
        assert machine.hangs_after(computes=0.0, queues=0.0, at_most_s=20) is None
        assert machine.hangs_after(computes=0.05, queues=0.5, at_most_s=1) is None


def test_an_endless_loop_short_of_a_core_is_found_in_the_end() -> None:
    assert Machine().hangs_after(computes=0.25, queues=0.75) == pytest.approx(122, abs=2)


def test_a_pass_that_was_predicted_to_take_long_has_ten_times_as_long() -> None:
    assert Machine(predicted_s=6.0).hangs_after(computes=1.0, queues=0.0) == pytest.approx(61, abs=1)
    assert Machine(predicted_s=6.0).hangs_after(computes=0.0, queues=0.0) == pytest.approx(61, abs=1)


def test_a_process_that_was_stopped_is_not_blamed_for_it() -> None:
    machine = Machine()
    machine.watchdog.look(machine.running)
    machine.now += 3600 * SECOND
    assert machine.watchdog.look(machine.running) is None
    assert machine.hangs_after(computes=0.0, queues=0.0) == pytest.approx(29, abs=1)


def test_each_pass_has_its_own_time() -> None:
    machine = Machine()
    for _ in range(5):
        assert machine.hangs_after(computes=1.0, queues=0.0, at_most_s=25) is None
        machine.begin()
    for _ in range(5):  # the halves of one that failed
        assert machine.hangs_after(computes=1.0, queues=0.0, at_most_s=25) is None
        machine.running[0].since_ns = machine.now


def test_where_the_system_does_not_tell_the_clock_counts() -> None:
    assert Machine(tells=False).hangs_after(computes=1.0, queues=0.0) == pytest.approx(31, abs=1)


def test_what_is_said_of_one_that_hangs() -> None:
    machine = Machine()
    machine.hangs_after(computes=1.0, queues=0.0, at_most_s=25)
    machine.computed_ns += 60 * SECOND
    said = machine.watchdog.look(machine.running)
    assert said is not None
    assert said.startswith("it has run for 25.0 s; 0.100 s was predicted; its thread computed for 84.5 s")


def test_the_system_counts_what_a_thread_computes() -> None:
    own = threading.get_native_id()
    before = activity_of(own)
    if before is None:
        pytest.skip("the system does not tell")
    until = time.thread_time() + 0.05
    while time.thread_time() < until:
        pass
    after = activity_of(own)
    assert after is not None
    assert after.computed_ns - before.computed_ns > 0.02 * SECOND
    assert activity_of(2**30) is None

"""Processes that are killed or stopped under load, by chance; more of them with `python -m processes.faults`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import layertap
from processes import faults
from processes.faults import processes_of
from server.process import process
from server.support import WAIT_S
from server.test_metrics import free_port

SERVER = (sys.executable, str(Path(faults.__file__).with_name("instant_server.py")))


def test_every_call_ends_and_nothing_is_left() -> None:
    report = faults.main(number=24, seed=7)
    assert not report.wrong
    assert report.ended["OK"] > 0
    assert len(report.faults) > 1


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_supervisor_that_is_killed_leaves_no_process() -> None:
    with process(str(free_port()), command=SERVER) as server:
        address = server.wait_until_serving()
        children = [pid for pids in processes_of(server.pid).values() for pid in pids]
        assert len(children) == 3
        server.send(signal.SIGKILL)
        pause = threading.Event()
        for _ in range(int(WAIT_S / 0.05)):
            if all(map(gone, children)):
                break
            pause.wait(0.05)
        assert all(map(gone, children))
    assert address


def test_a_front_that_hangs_is_started_again() -> None:
    with process(str(free_port()), command=SERVER) as server:
        address = server.wait_until_serving()
        [first, *_] = processes_of(server.pid)["front"]
        os.kill(first, signal.SIGSTOP)
        server.wait_for_line("no sign of life")
        server.wait_for_line("ended with SIGKILL")
        server.wait_for_line("front process .* is ready")
        with layertap.Client(address) as client:
            assert client.encode(layertap.TokenIds([7]), last_hidden_state=True).last_hidden_state[0, 0] == 7
        server.send(signal.SIGTERM)
        assert server.wait() == 0

"""A running `layertap-server`, as a process of its own."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from server.support import WAIT_S

START_S = 240.0
"""Importing torch takes seconds, and more on a busy machine."""
SCRIPT = Path(sys.executable).with_name("layertap-server")


class Process:
    """A running `layertap-server`, and what it wrote to stderr."""

    def __init__(self, arguments: Sequence[str], command: Sequence[str]) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LAYERTAP_")}
        self._process = subprocess.Popen(
            [*command, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"HF_HUB_OFFLINE": "1"},
        )
        self.lines: list[str] = []
        self._unread: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line.rstrip("\n"))
            self._unread.put(line)
        self._unread.put(None)

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        while (line := self._unread.get(timeout=START_S)) is not None:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"it ended without a line like {pattern!r}: {self.lines}")

    def wait_until_serving(self) -> str:
        """Its address."""
        return self.wait_for_line(r"serving on (\S+), ready in")[1]

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit status."""
        status = self._process.wait(START_S)
        self._reader.join(WAIT_S)
        return status

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextmanager
def process(*arguments: str, command: Sequence[str] = (str(SCRIPT),)) -> Iterator[Process]:
    started = Process(arguments, command)
    try:
        yield started
    finally:
        started.end()

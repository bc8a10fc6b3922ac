"""The line to the engine: what the scheduler asks of it, and a batch while it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from layertap_server.fair_queue import Unit
from layertap_server.plan import Outputs, Work


class Runs(Protocol):
    """What the scheduler needs of an engine."""

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        """Answers each, in order; raises when the batch fails as a whole."""


class Pending(Protocol):
    """A batch that was launched."""

    def wait(self) -> list[Outputs]:
        """Returns when it is done, or raises."""


# What an engine offers beside `run` when its device runs by itself: it is given a batch, while it may
# still have one, and returns at once. Batches are done in the order of their launches. None: this one had
# better be `run`, when the device has nothing else.
Launch = Callable[[Sequence[Work]], Pending | None]


@dataclass(slots=True, eq=False)
class Pass:
    """A batch on its way through the engine."""

    units: list[Unit]
    predicted_ns: float
    # When the device began with it, as far as is known here.
    since_ns: int
    # Its outputs: runs the pass, or waits for the one that was launched.
    outputs: Callable[[], list[Outputs]]

    @property
    def ends_ns(self) -> float:
        """By prediction."""
        return self.since_ns + self.predicted_ns

    def remaining_ns(self, now: int) -> float:
        """What to reckon with: one that takes longer than predicted may well take as long again. Never 0."""
        return max(abs(self.ends_ns - now), 1.0)


def launched(launch: Launch, works: Sequence[Work]) -> Callable[[], list[Outputs]] | None:
    """Gives the device a batch; what goes wrong with that is raised where its outputs are awaited."""
    try:
        pending = launch(works)
        return None if pending is None else pending.wait
    except Exception as error:
        failure = error

    def fail() -> list[Outputs]:
        raise failure

    return fail

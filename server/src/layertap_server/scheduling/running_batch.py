"""The line to the engine: what the scheduler asks of it, and a batch while it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from layertap_server.plan import Outputs, Work
from layertap_server.scheduling.fair_queue import Unit


class Engine(Protocol):
    """What the scheduler needs of an engine."""

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        """Answers each, in order; raises when the batch fails as a whole."""


class MultiCoreEngine(Engine, Protocol):
    """What an engine offers beside `run` when its cores may take batches apart from each other: so many
    threads may call `run` at once then, each of which has said that it computes with one core."""

    num_cores: int

    def use_one_core(self) -> None:
        """For what the calling thread computes from now on."""


class Pending(Protocol):
    """A batch that was launched."""

    def wait(self) -> list[Outputs]:
        """Returns when it is done, or raises."""


# What an engine offers beside `run` when its device runs by itself: it is given a batch, while it may
# still have one, and returns at once. Batches are done in the order of their launches.
Launch = Callable[[Sequence[Work]], Pending]


class Cores(Enum):
    """What an engine's thread computes with."""

    ALL = "all"
    ONE = "one"


@dataclass(slots=True, eq=False)
class RunningBatch:
    """A batch on its way through the engine."""

    units: list[Unit]
    # Of the engine that it takes: with one of its cores, that part.
    share: float
    # Until its end.
    predicted_ns: float
    # When the device began with it, as far as is known here.
    since_ns: int
    # Of the thread that computes it, or that waits for its device: the system's number of it.
    thread_id: int
    # Waits for its outputs, where the engine's device runs by itself.
    outputs: Callable[[], list[Outputs]] | None = None

    @property
    def ends_ns(self) -> float:
        """By prediction."""
        return self.since_ns + self.predicted_ns

    def remaining_ns(self, now: int) -> float:
        """Of the whole engine's time, what to reckon with: one that takes longer than predicted may well take as
        long again. Never 0."""
        return max(self.share * abs(self.ends_ns - now), 1.0)


def launched(launch: Launch, works: Sequence[Work]) -> Callable[[], list[Outputs]]:
    """Gives the device a batch; what goes wrong with that is raised where its outputs are awaited."""
    try:
        return launch(works).wait
    except Exception as error:
        failure = error

    def fail() -> list[Outputs]:
        raise failure

    return fail

"""The interface between the scheduler and an engine, and a batch while the engine has it."""

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
        """Returns the outputs of each input, in order; raises when the batch fails as a whole."""


class MultiCoreEngine(Engine, Protocol):
    """An engine whose cores can take batches separately. Up to `num_cores` threads may call `run` at the same
    time, each after it has called `use_one_core`."""

    num_cores: int

    def use_one_core(self) -> None:
        """Makes the calling thread compute with one core from now on."""


class Pending(Protocol):
    """A batch that was launched."""

    def wait(self) -> list[Outputs]:
        """Blocks until the batch is done; returns its outputs, or raises."""


# The method `launch` of an engine whose device runs asynchronously. It launches a batch, also while the
# device still computes an earlier one, and returns at once. Batches are done in the order of their launches.
Launch = Callable[[Sequence[Work]], Pending]


class Cores(Enum):
    """The cores that an engine thread computes with."""

    ALL = "all"
    ONE = "one"


@dataclass(slots=True, eq=False)
class RunningBatch:
    """A batch that the engine computes, or is about to compute."""

    units: list[Unit]
    # The part of the engine that computes it: 1, or one core's part.
    share: float
    # The predicted time from `since_ns` to its end.
    predicted_ns: float
    # When the engine began to compute it, as far as is known here.
    since_ns: int
    # Native id of the thread that computes it, or that waits for the device.
    thread_id: int
    # Waits for its outputs, if it was launched.
    outputs: Callable[[], list[Outputs]] | None = None

    @property
    def ends_ns(self) -> float:
        """The predicted end."""
        return self.since_ns + self.predicted_ns

    def remaining_ns(self, now: int) -> float:
        """The predicted rest, in time of the whole engine. Once a batch is overdue, this is the time by which
        it is overdue, since it may well take as long again. Never 0."""
        return max(self.share * abs(self.ends_ns - now), 1.0)


def launched(launch: Launch, works: Sequence[Work]) -> Callable[[], list[Outputs]]:
    """Launches a batch, and returns the function that waits for its outputs. That function also raises any
    error of the launch."""
    try:
        return launch(works).wait
    except Exception as error:
        failure = error

    def fail() -> list[Outputs]:
        raise failure

    return fail

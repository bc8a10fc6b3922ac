"""A served model as the API sees it, wherever its engine runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from layertap_server import errors
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import Outputs, Work
from layertap_server.scheduling.fair_queue import Priority
from layertap_server.tokenization.inputs import Cut, Encoded, Input, Truncation
from layertap_server.tokenization.worker import Tokenization, TokenizerBusyError


class EngineState(Enum):
    UP = "up"
    # It is being started again, after a thread or its process died.
    RESTARTING = "restarting"
    # Only a new process can help.
    LOST = "lost"


class Computed(Protocol):
    """What the engine gives for a request: the outputs of each of its works, and its times.

    The memory of the outputs may be lent for as long as this object lives, so whoever reads them keeps it.
    """

    @property
    def outputs(self) -> Sequence[Outputs | None]: ...
    @property
    def submitted_ns(self) -> int: ...
    @property
    def started_ns(self) -> int: ...
    @property
    def compute_ns(self) -> int: ...
    @property
    def batch_inputs(self) -> int: ...
    @property
    def batch_tokens(self) -> int: ...


class ServedModel(Protocol):
    """A model that answers requests. All methods but `check` are called on the event loop."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def tokenization(self) -> Tokenization: ...

    @property
    def state(self) -> EngineState: ...

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued and nothing runs, as far as this process knows."""

    def start(self, on_change: Callable[[], None]) -> None:
        """`on_change` is called on the event loop when `state` has changed."""

    def check(self, num_inputs: int, priority: Priority, deadline_ns: int | None, client: str) -> None:
        """Raises the `RequestError` that is certain already for a request that is not tokenized yet. Any
        thread may call it."""

    async def answer(
        self, works: Sequence[Work], priority: Priority, deadline_ns: int | None, client: str
    ) -> Computed:
        """Computes a request's works, or raises a `RequestError`. If the task is cancelled, the works that
        have not begun are dropped."""

    def give_up(self, reason: str) -> None:
        """Fails all requests with UNAVAILABLE and this reason. No further request is answered."""

    async def stop(self, timeout_s: float) -> bool:
        """Ends what runs once all requests are answered, within `timeout_s`; returns whether it has ended."""


async def encode(model: ServedModel, inputs: Sequence[Input], truncation: Truncation | Cut) -> list[Encoded]:
    """The inputs' token ids. Raises a `RequestError`."""
    try:
        return await model.tokenization.encode(inputs, truncation)
    except TokenizerBusyError:
        raise errors.overloaded(
            "QUEUE_FULL", "the queue of texts to tokenize is full (max_queue_chars); try again", 1.0
        ) from None

"""A served model whose engine runs in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layertap_server.engine_host import EngineHost, as_request_error
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import Work
from layertap_server.scheduling.admission import RefusedError
from layertap_server.scheduling.fair_queue import Priority, Ticket
from layertap_server.scheduling.scheduler import Scheduler
from layertap_server.serving import EngineState
from layertap_server.tokenization.worker import Tokenization


class LocalModel:
    """A `ServedModel`: a tokenizer, and an engine in the same process."""

    def __init__(self, host: EngineHost, tokenization: Tokenization) -> None:
        self.host = host
        self.facts: ModelFacts = host.facts
        self.tokenization = tokenization

    @property
    def scheduler(self) -> Scheduler:
        return self.host.scheduler

    @property
    def state(self) -> EngineState:
        return self.host.state

    @property
    def is_idle(self) -> bool:
        return self.host.scheduler.is_idle

    def start(self, on_change: Callable[[], None]) -> None:
        self.host.start(on_change)

    def check(self, num_inputs: int, priority: Priority, deadline_ns: int | None, client: str) -> None:
        try:
            self.host.scheduler.check(num_inputs, priority, deadline_ns, client)
        except RefusedError as refused:
            raise as_request_error(refused) from None

    async def answer(
        self, works: Sequence[Work], priority: Priority, deadline_ns: int | None, client: str
    ) -> Ticket:
        return await self.host.answer(works, priority, deadline_ns, client)

    def give_up(self, reason: str) -> None:
        self.host.give_up(reason)

    async def stop(self, timeout_s: float) -> bool:
        """Returns whether all threads of the engine have ended and the tokenizer is idle."""
        has_ended = await self.host.stop(timeout_s)
        self.tokenization.close()
        return has_ended and not self.tokenization.is_busy

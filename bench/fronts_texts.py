"""What a text costs in the engine process at batches of a GPU's size: the part of `bench.fronts` in one thread.

Requests are taken in, formed into batches of some 190 texts, and answered, as in the engine process, but
without sockets and threads, so that waking them does not count. The engine takes no time.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np

from bench.scheduler_server import Instant, facts
from layertap_server.api.budget import ByteBudget
from layertap_server.config import Config
from layertap_server.engine_host import EngineHost
from layertap_server.link import records
from layertap_server.link.engine_side import EngineServer, FrontLink
from layertap_server.link.plans import plan_to_json
from layertap_server.plan import OutputPlan
from layertap_server.scheduling.calibration import warm_up_work
from layertap_server.scheduling.engine_loop import EngineLoop
from layertap_server.scheduling.fair_queue import Priority, Ticket

NUM_TEXTS, NUM_BATCHES, NUM_WARM = 192, 60, 10
LENGTHS = (16, 24, 32, 40)


class Nowhere:
    """A transport that drops what is written."""

    def write(self, data: bytes) -> None:
        """It is gone."""

    def set_write_buffer_limits(self, high: int) -> None:
        """There is no buffer."""

    def is_closing(self) -> bool:
        return False


def plan_of(num_tokens: int) -> OutputPlan:
    """One pooled vector."""
    return replace(warm_up_work(facts("bench"), num_tokens).plan, hidden_states=None)


def batch_of(per_call: int, first: int) -> bytes:
    """The requests of one batch."""
    requests = []
    for number in range(NUM_TEXTS // per_call):
        plans = [(number + text) % len(LENGTHS) for text in range(per_call)]
        lengths = [LENGTHS[plan] for plan in plans]
        ids = np.full(sum(lengths), 5, np.int64)
        submit = records.Submit(
            first + number, None, 0, Priority.NORMAL, "client", plans, lengths, ids, np.zeros_like(ids)
        )
        requests.append(records.submit_record(submit))
    return b"".join(requests)


async def text_us(per_call: int) -> float:
    """CPU microseconds of a text, with `per_call` texts in each request."""
    host = EngineHost(facts("bench"), Instant(), Config(max_batch_tokens=1 << 14))
    host._loop = asyncio.get_running_loop()
    settled: list[list[Ticket]] = []
    host.scheduler.deliver = settled.append
    loop = EngineLoop(host.scheduler)
    link = FrontLink(EngineServer([host], {}, None, ByteBudget(1 << 40), 1 << 30, 4096))
    link.connection_made(Nowhere())  # type: ignore[arg-type]
    for number, length in enumerate(LENGTHS):
        plan = plan_to_json(plan_of(length))
        link.data_received(records.json_record(records.Type.PLAN, plan, records.PLAN.pack(number, 0)))
    batches = [batch_of(per_call, number * NUM_TEXTS) for number in range(NUM_BATCHES)]
    begun = 0.0
    for number, batch in enumerate(batches):
        if number == NUM_WARM:
            begun = time.thread_time()
        link.data_received(batch)
        while host.scheduler.queued_tokens:
            loop.step()
        for tickets in settled:
            host._resolve(tickets)
        settled.clear()
        link._write()
    return (time.thread_time() - begun) / (NUM_BATCHES - NUM_WARM) / NUM_TEXTS * 1e6

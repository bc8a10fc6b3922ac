"""The engine's end of a link: what is alike is one ticket, each request ends by itself, and nothing is trusted."""

from __future__ import annotations

import asyncio
import random
import struct
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from layertap_server.api.budget import ByteBudget
from layertap_server.config import Config
from layertap_server.engine_host import EngineHost
from layertap_server.enums import DType
from layertap_server.link import records
from layertap_server.link.engine_side import EngineServer, FrontLink
from layertap_server.link.plans import plan_to_json
from layertap_server.link.records import Submit, Type
from layertap_server.plan import OutputPlan, Outputs, TensorData, Work
from scheduling.fake_engine import facts

WAIT_S = 30.0
POISON = 13
PLAN = OutputPlan(DType.FLOAT32, last_hidden_state=True)
DEEP = OutputPlan(DType.FLOAT32, hidden_states=(1,))


class Engine:
    """Fills the outputs with the first id; fails over `POISON`; stands still while the gate is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        assert self.gate.wait(WAIT_S)
        ids = [int(work.input_ids[0]) for work in works]
        self.batches.append(ids)
        if POISON in ids:
            raise RuntimeError("poison")
        return [
            [TensorData(np.full(spec.nbytes // 4, first, np.float32)) for spec in work.specs]
            for first, work in zip(ids, works, strict=True)
        ]


class Transport:
    """Keeps what is written, as records."""

    def __init__(self) -> None:
        self.received: list[tuple[int, bytes]] = []
        self.arrived = asyncio.Event()
        self.is_aborted = False
        self._reader = records.Reader(1 << 30)

    def write(self, data: bytes) -> None:
        self.received += [(kind, bytes(body)) for kind, body in self._reader.feed(data)]
        self.arrived.set()

    def set_write_buffer_limits(self, high: int) -> None:
        """Nothing is kept back."""

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True

    def close(self) -> None:
        self.is_aborted = True


@dataclass
class Bench:
    host: EngineHost
    engine: Engine
    server: EngineServer
    link: FrontLink
    transport: Transport
    ended: dict[int, str] = field(default_factory=dict)

    def send(self, *data: bytes) -> None:
        self.link.data_received(b"".join(data))

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.transport.arrived.clear()
            await asyncio.wait_for(self.transport.arrived.wait(), WAIT_S)

    def answers(self) -> dict[int, float | str]:
        """By request: its value, or the reason of its error."""
        found: dict[int, float | str] = {}
        for kind, body in self.transport.received:
            if kind == Type.REPLY:
                reply = records.parse_reply(memoryview(body))
                assert reply.request not in found
                values = np.frombuffer(reply.inline, np.float32)
                assert len(set(values.tolist())) == 1
                found[reply.request] = float(values[0])
            elif kind == Type.FAIL:
                request = records.parse_request(memoryview(body))
                assert request not in found
                found[request] = records.parse_json(memoryview(body)[8:])["reason"]
        return found


@asynccontextmanager
async def bench(**changed: int) -> AsyncIterator[Bench]:
    engine = Engine()
    config = Config(max_batch_tokens=512, **changed)  # type: ignore[arg-type]
    host = EngineHost(facts(), engine, config)
    host.start(lambda: None)
    server = EngineServer([host], {}, None, ByteBudget(1 << 30), 1 << 28, 64)
    link, transport = FrontLink(server), Transport()
    link.connection_made(transport)  # type: ignore[arg-type]
    one = Bench(host, engine, server, link, transport)
    for number, plan in enumerate((PLAN, DEEP)):
        one.send(records.json_record(Type.PLAN, plan_to_json(plan), records.PLAN.pack(number, 0)))
    try:
        yield one
    finally:
        engine.gate.set()
        link.connection_lost(None)
        assert server.budget.reserved_bytes == 0
        assert link.num_requests == link.num_lent == 0
        await host.stop(WAIT_S)


def submit(
    request: int, first: int, *, plan: int = 0, deadline_ns: int | None = None, client: str = "c"
) -> bytes:
    ids = np.full(3, first, np.int64)
    return records.submit_record(
        Submit(request, deadline_ns, 0, 2, client, [plan], [3], ids, np.zeros(3, np.int64))
    )


async def test_requests_that_come_together_are_one_ticket_and_are_answered_each() -> None:
    async with bench() as one:
        one.engine.gate.clear()
        one.send(submit(1, 5))
        one.send(*(submit(n, 10 * n) for n in range(2, 7)), submit(7, 70, plan=1), submit(8, 80, client="d"))
        one.engine.gate.set()
        await one.until(lambda: len(one.answers()) == 8)
        assert one.answers() == {1: 5.0, **{n: 10.0 * n for n in range(2, 9)}}
        assert one.host.scheduler.stats.num_admitted == one.host.scheduler.stats.num_answered == 8
        assert one.host.scheduler.waiting() == (0, 0.0)


async def test_one_that_fails_fails_alone() -> None:
    async with bench() as one:
        one.send(submit(1, 5), submit(2, POISON), submit(3, 7))
        await one.until(lambda: len(one.answers()) == 3)
        assert one.answers() == {1: 5.0, 2: "INTERNAL", 3: 7.0}


async def test_one_that_is_cancelled_leaves_the_others() -> None:
    async with bench() as one:
        one.engine.gate.clear()
        one.send(submit(1, 5))
        one.send(submit(2, 6), submit(3, 7), records.about(Type.CANCEL, 2), submit(4, 8))
        one.send(records.about(Type.CANCEL, 4))
        one.engine.gate.set()
        await one.until(lambda: len(one.answers()) == 2)
        assert one.answers() == {1: 5.0, 3: 7.0}
        assert one.host.scheduler.queued_tokens == 0


async def test_where_not_all_are_admitted_some_are() -> None:
    async with bench(max_queue_tokens=512) as one:
        one.engine.gate.clear()
        one.send(submit(0, 5))
        one.send(*(submit(n, n) for n in range(20, 220)))
        refused = len(one.answers())
        one.engine.gate.set()
        await one.until(lambda: len(one.answers()) == 201)
        reasons = [value for value in one.answers().values() if isinstance(value, str)]
        assert set(reasons) == {"QUEUE_FULL"}
        assert 0 <= refused <= len(reasons) <= 40


async def test_a_lost_engine_fails_all_of_a_group_once() -> None:
    async with bench() as one:
        one.engine.gate.clear()
        one.send(submit(1, 5))
        one.send(*(submit(n, n) for n in range(20, 30)))
        one.host.give_up("it is gone")
        await one.until(lambda: len(one.answers()) == 11)
        assert set(one.answers().values()) == {"ENGINE_DOWN"}
        one.engine.gate.set()


async def test_a_late_group_is_told_so() -> None:
    async with bench() as one:
        one.send(*(submit(n, n, deadline_ns=1) for n in range(20, 24)))
        await one.until(lambda: len(one.answers()) == 4)
        assert set(one.answers().values()) <= {"DEADLINE_UNREACHABLE", "DEADLINE_EXCEEDED"}


WRONG = {
    "an unknown plan": submit(9, 5, plan=3),
    "a request twice": submit(1, 5) + submit(1, 5),
    "an id that the model does not have": submit(9, 1000),
    "a release of nothing": records.about(Type.RELEASE, 5),
    "no JSON": records.record(Type.PLAN, records.PLAN.pack(0, 0), b"{"),
    "JSON that is too deep": records.record(Type.PLAN, records.PLAN.pack(0, 0), b"[" * 100_000),
    "a plan of a number that no float holds": records.record(
        Type.PLAN, records.PLAN.pack(0, 0), b"[1,false,false,[-1" + b"0" * 400 + b"],null,[],null]"
    ),
    "a plan of another model": records.record(Type.PLAN, records.PLAN.pack(0, 1), b"[]"),
    "an impossible size": struct.pack("<IB3x", 3, 17),
    "a priority that is none": records.submit_record(
        Submit(9, None, 0, 7, "c", [0], [1], np.array([5]), np.array([0]))
    ),
    "no types": records.submit_record(Submit(9, None, 0, 2, "c", [0], [1], np.array([5]), None)),
    "too many tokens": records.submit_record(
        Submit(9, None, 0, 2, "c", [0], [513], np.full(513, 5), np.zeros(513, np.int64))
    ),
    "no tokens": records.submit_record(
        Submit(9, None, 0, 2, "c", [0], [0], np.zeros(0, np.int64), np.zeros(0, np.int64))
    ),
}


async def test_a_front_that_sends_what_is_not_allowed_is_cut_off() -> None:
    for name, data in WRONG.items():
        async with bench() as one:
            one.send(data)
            assert one.transport.is_aborted, name


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), noise=st.binary(max_size=60))
def test_changed_records_do_no_harm(seed: int, noise: bytes) -> None:
    dice = random.Random(seed)

    async def run() -> None:
        async with bench() as one:
            data = bytearray(b"".join([submit(n, n + 5, plan=n % 2) for n in range(4)] + [noise]))
            for _ in range(dice.randrange(1, 4)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            one.send(bytes(data))

    asyncio.run(run())

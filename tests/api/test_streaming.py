"""The frames of one stream: whose share a message, and who is told when they are gone."""

from __future__ import annotations

from collections.abc import Callable

from layertap.v1 import encoder_pb2 as pb
from layertap_server.api.bandwidth import BandwidthLimiter
from layertap_server.api.serialization import WHOLE_BYTES
from layertap_server.api.streaming import FrameQueue, Reply

Done = Callable[[], None]


def frame(number: int, size: int = 10) -> bytes:
    """As `frames_of` reads it back."""
    end = pb.RequestEnd(timing=pb.Timing(batch_inputs=1))
    end.status.message = "x" * size
    return pb.EncodeStreamResponse(request_id=number, end=end).SerializeToString()


def frames_of(message: bytes) -> list[int]:
    read = pb.EncodeStreamResponse.FromString(message)
    return [one.request_id for one in read.grouped.frames or [read]]


def queue_of(*sizes: tuple[int, bool]) -> tuple[FrameQueue, list[int]]:
    """One reply of one frame each: its bytes, and whether it joins others; and who is done."""
    queue, done = FrameQueue(BandwidthLimiter(0)), []

    def said(number: int) -> Done:
        return lambda: done.append(number)

    for number, (size, joins) in enumerate(sizes, 1):
        queue.add(Reply(iter([frame(number, size)]), said(number), joins=joins))
    return queue, done


async def test_small_ones_go_together_in_their_order() -> None:
    queue, done = queue_of((9, True), (9, True), (9, False), (9, True), (9, True))
    queue.end()
    assert [frames_of(message) async for message in queue] == [[1, 2], [3], [4, 5]]
    assert sorted(done) == [1, 2, 3, 4, 5]


async def test_a_message_holds_no_more_than_pays() -> None:
    third = WHOLE_BYTES // 3
    queue, done = queue_of(*[(third, True)] * 9)
    queue.end()
    messages = [message async for message in queue]
    assert [number for message in messages for number in frames_of(message)] == list(range(1, 10))
    assert len(messages) > 1
    assert max(map(len, messages)) < 2 * WHOLE_BYTES
    assert done == list(range(1, 10))


async def test_who_is_being_written_is_told_once_when_the_caller_leaves() -> None:
    queue, done = queue_of((9, True), (9, True), (9, False))
    messages = queue.__aiter__()
    assert frames_of(await anext(messages)) == [1, 2]
    queue.add(Reply(iter([frame(4)]), lambda: done.append(4), joins=True))
    assert done == []
    queue.close()
    await messages.aclose()
    assert sorted(done) == [1, 2, 3, 4]


async def test_those_that_come_while_others_are_written_are_next() -> None:
    queue, done = queue_of((9, True), (9, True))
    messages = queue.__aiter__()
    assert frames_of(await anext(messages)) == [1, 2]
    for number in (3, 4):
        queue.add(Reply(iter([frame(number)]), lambda: None, joins=True))
    assert frames_of(await anext(messages)) == [3, 4]
    assert done == [1, 2]

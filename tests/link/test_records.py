"""Records survive the way over the link, in any pieces, and what is no record is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layertap_server.link import records
from layertap_server.link.records import INLINE, Reader, RecordError, Reply, Submit, Type

MAX_BYTES = 1 << 20
U32, I64 = st.integers(0, 2**32 - 1), st.integers(0, 2**62)


@st.composite
def submits(draw: st.DrawFn) -> Submit:
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    num_ids = sum(lengths)
    ids = np.array(draw(st.lists(st.integers(0, 2**32 - 1), min_size=num_ids, max_size=num_ids)), np.int64)
    types = None
    if draw(st.booleans()):
        types = np.array(draw(st.lists(st.integers(0, 255), min_size=num_ids, max_size=num_ids)), np.int64)
    return Submit(
        draw(I64),
        draw(st.none() | I64),
        draw(U32),
        draw(st.integers(0, 255)),
        draw(st.text(max_size=20)),
        draw(st.lists(U32, min_size=len(lengths), max_size=len(lengths))),
        lengths,
        ids,
        types,
    )


def plain(one: Submit) -> list[Any]:
    return [
        one.request,
        one.deadline_ns,
        one.model,
        one.priority,
        one.client.encode(errors="replace"),
        list(one.plans),
        list(one.lengths),
        one.ids.tolist(),
        None if one.types is None else one.types.tolist(),
    ]


@settings(max_examples=150, deadline=None)
@given(several=st.lists(submits(), min_size=1, max_size=4), cuts=st.lists(st.integers(1, 60), min_size=1))
def test_requests_in_any_pieces(several: list[Submit], cuts: list[int]) -> None:
    data = b"".join(map(records.submit_record, several))
    reader, read, begin, turn = Reader(MAX_BYTES), [], 0, 0
    while begin < len(data):
        end = begin + cuts[turn % len(cuts)]
        for kind, body in reader.feed(data[begin:end]):
            assert kind == Type.SUBMIT
            read.append(plain(records.parse_submit(body)))
        begin, turn = end, turn + 1
    assert read == [plain(one) for one in several]


@given(
    places=st.lists(st.integers(0, 2**40) | st.integers(INLINE, INLINE + 99)), inline=st.binary(max_size=99)
)
def test_replies(places: list[int], inline: bytes) -> None:
    reply = Reply(2**63, 1, 2, 3, 4, 5, tuple(places), inline)
    [(kind, body)] = Reader(MAX_BYTES).feed(records.reply_record(reply))
    assert kind == Type.REPLY
    assert records.parse_reply(body) == reply
    assert reply.is_lent == any(place < INLINE for place in places)


def test_an_unknown_record_is_passed_over() -> None:
    data = records.HEADER.pack(records.HEADER.size + 3, 99) + b"abc" + records.about(Type.CANCEL, 7)
    kinds = [kind for kind, _ in Reader(MAX_BYTES).feed(data)]
    assert kinds == [99, Type.CANCEL]


@pytest.mark.parametrize("size", [0, records.HEADER.size - 1, MAX_BYTES + 1, 2**32 - 1])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(RecordError, match="bytes"):
        list(Reader(MAX_BYTES).feed(records.HEADER.pack(size, Type.SUBMIT) + bytes(16)))


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=120), one=submits(), at=st.integers(0, 60), value=st.integers(0, 255))
def test_a_body_of_anything_is_a_record_or_an_error(body: bytes, one: Submit, at: int, value: int) -> None:
    changed = bytearray(records.submit_record(one)[records.HEADER.size :])
    changed[at % len(changed)] = value
    for some in (body, bytes(changed)):
        for parse in (records.parse_submit, records.parse_reply, records.parse_request, records.parse_json):
            with contextlib.suppress(RecordError):
                parse(memoryview(some))

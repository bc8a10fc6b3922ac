"""The records that a front process and an engine process exchange, as bytes. Little-endian, length first.

    record   len u32 │ type u8 │ 3 unused bytes │ body          len counts the whole record

    from the engine
    HELLO    JSON: version of these records, models and their tokenizers
    STATE    JSON: the state of one model's engine
    REPLY    request u64 │ submitted_ns i64 │ started_ns i64 │ compute_ns u64 │ batch_inputs u32 │
             batch_tokens u32 │ num_places u32 │ unused u32 │ places u64[num_places] │ inline bytes
    FAIL     request u64 │ JSON: the error

    from the front
    PLAN     plan u32 │ model u32 │ JSON: the outputs of an input (plans.py)
    SUBMIT   request u64 │ deadline_ns i64 │ model u32 │ num_inputs u32 │ num_ids u32 │ priority u8 │
             has_types u8 │ client_bytes u16 │ plans u32[num_inputs] │ lengths u32[num_inputs] │
             ids u32[num_ids] │ types u8[num_ids] if has_types │ client
    CANCEL   request u64
    RELEASE  request u64

A plan is sent before the first request with it, and stays known for the life of the link; the same number may
be given to another plan later. A REPLY has one place for each tensor of each input, in the order of the
works' specs, and for each tensor with scales one more, after it, and for one whose size is only bound one
more, before it, with `INLINE` added to its bytes. A place is the offset in the engine's arena or, with
`INLINE` added, the offset in the record's inline bytes. A reply with places in the arena lends that memory,
until RELEASE. Times are of CLOCK_MONOTONIC, which all processes of a host share; a deadline of `NO_DEADLINE`
is none.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from layertap_server.plan import Int64Array

# The version of these layouts; `plans.VERSION` has those of plans and facts with it.
FORMAT = 1
INLINE = 1 << 63
NO_DEADLINE = -1
HEADER = struct.Struct("<IB3x")

REQUEST = struct.Struct("<Q")
PLAN = struct.Struct("<II")
SUBMIT = struct.Struct("<QqIIIBBH")
REPLY = struct.Struct("<QqqQIIII")


class Type(IntEnum):
    HELLO = 1
    STATE = 2
    REPLY = 3
    FAIL = 4
    PLAN = 16
    SUBMIT = 17
    CANCEL = 18
    RELEASE = 19


class RecordError(Exception):
    """The peer has sent bytes that are no record, or a record that is not allowed."""


class Reader:
    """Cuts a stream of bytes into records."""

    def __init__(self, max_bytes: int) -> None:
        """A record of more than `max_bytes` is refused."""
        self._max_bytes = max_bytes
        self._left = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, memoryview]]:
        """The type and the body of each record that is complete now. A body is valid until the next call.
        Raises `RecordError`."""
        if self._left:
            data = self._left + data
        view, begin, end = memoryview(data), 0, len(data)
        try:
            while end - begin >= HEADER.size:
                size, kind = HEADER.unpack_from(view, begin)
                if not HEADER.size <= size <= self._max_bytes:
                    raise RecordError(f"a record of {size} bytes")
                if end - begin < size:
                    break
                yield kind, view[begin + HEADER.size : begin + size]
                begin += size
        finally:
            self._left = data[begin:]


def max_plans(max_inputs: int) -> int:
    """How many plans a link knows at the same time, for requests of up to `max_inputs` inputs."""
    return max(4096, 2 * max_inputs)


def record(kind: Type, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return HEADER.pack(HEADER.size + len(body), kind) + body


def json_record(kind: Type, data: Any, before: bytes = b"") -> bytes:
    return record(kind, before, json.dumps(data, separators=(",", ":")).encode())


def parse_json(body: memoryview) -> Any:
    """Raises `RecordError`."""
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"no JSON: {error}") from None


def about(kind: Type, request: int) -> bytes:
    """CANCEL or RELEASE."""
    return HEADER.pack(HEADER.size + REQUEST.size, kind) + REQUEST.pack(request)


def parse_request(body: memoryview) -> int:
    """The request of a CANCEL or RELEASE, or that at the begin of another record. Raises `RecordError`."""
    if len(body) < REQUEST.size:
        raise RecordError("a record without its request")
    request: int
    (request,) = REQUEST.unpack_from(body)
    return request


@dataclass(slots=True)
class Submit:
    """A request: for each input its plan's number and its length, and the ids and types of all inputs."""

    request: int
    deadline_ns: int | None
    model: int
    priority: int
    client: str
    plans: Sequence[int]
    lengths: Sequence[int]
    ids: Int64Array
    types: Int64Array | None


def submit_record(one: Submit) -> bytes:
    num_inputs = len(one.plans)
    parts = [
        struct.pack(f"<{2 * num_inputs}I", *one.plans, *one.lengths),
        one.ids.astype(np.uint32).tobytes(),
    ]
    if one.types is not None:
        parts.append(one.types.astype(np.uint8).tobytes())
    client = one.client.encode(errors="replace")
    head = SUBMIT.pack(
        one.request,
        NO_DEADLINE if one.deadline_ns is None else one.deadline_ns,
        one.model,
        num_inputs,
        len(one.ids),
        one.priority,
        one.types is not None,
        len(client),
    )
    return record(Type.SUBMIT, head, *parts, client)


def parse_submit(body: memoryview) -> Submit:
    """Raises `RecordError`. Copies what it needs of the body."""
    if len(body) < SUBMIT.size:
        raise RecordError("a SUBMIT that is too short")
    request, deadline_ns, model, num_inputs, num_ids, priority, has_types, client_bytes = SUBMIT.unpack_from(
        body
    )
    if has_types > 1 or not num_inputs:
        raise RecordError("a SUBMIT without inputs")
    begin = SUBMIT.size
    ids_at = begin + 8 * num_inputs
    types_at = ids_at + 4 * num_ids
    client_at = types_at + has_types * num_ids
    if len(body) != client_at + client_bytes:
        raise RecordError("a SUBMIT of another size than its numbers say")
    numbers = struct.unpack_from(f"<{2 * num_inputs}I", body, begin)
    plans, lengths = numbers[:num_inputs], numbers[num_inputs:]
    if sum(lengths) != num_ids:
        raise RecordError("a SUBMIT whose lengths are not those of its ids")
    # As they are unsigned, a negative id is one that no model has.
    ids = np.frombuffer(body, np.uint32, num_ids, ids_at).astype(np.int64)
    types = np.frombuffer(body, np.uint8, num_ids, types_at).astype(np.int64) if has_types else None
    try:
        client = str(body[client_at:], "utf-8")
    except UnicodeDecodeError:
        raise RecordError("a SUBMIT whose client is no text") from None
    return Submit(
        request,
        None if deadline_ns == NO_DEADLINE else deadline_ns,
        model,
        priority,
        client,
        plans,
        lengths,
        ids,
        types,
    )


def joined(parts: Sequence[Int64Array]) -> Int64Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def split(values: Int64Array, lengths: Sequence[int]) -> list[Int64Array]:
    """The opposite of `joined`."""
    if len(lengths) == 1:
        return [values]
    parts, begin = [], 0
    for length in lengths:
        parts.append(values[begin : begin + length])
        begin += length
    return parts


@dataclass(slots=True)
class Reply:
    request: int
    submitted_ns: int
    started_ns: int
    compute_ns: int
    batch_inputs: int
    batch_tokens: int
    places: Sequence[int]
    inline: bytes

    @property
    def is_lent(self) -> bool:
        """Whether any tensor is in the arena, so that the reply must be released."""
        return min(self.places, default=INLINE) < INLINE


def reply_record(one: Reply) -> bytes:
    head = REPLY.pack(
        one.request,
        one.submitted_ns,
        one.started_ns,
        one.compute_ns,
        one.batch_inputs,
        one.batch_tokens,
        len(one.places),
        0,
    )
    places = struct.pack(f"<{len(one.places)}Q", *one.places)
    return record(Type.REPLY, head, places, one.inline)


def parse_reply(body: memoryview) -> Reply:
    """Raises `RecordError`."""
    if len(body) < REPLY.size:
        raise RecordError("a REPLY that is too short")
    request, submitted, started, compute, inputs, tokens, num_places, _ = REPLY.unpack_from(body)
    inline_at = REPLY.size + 8 * num_places
    if len(body) < inline_at:
        raise RecordError("a REPLY that is shorter than its places")
    places = struct.unpack_from(f"<{num_places}Q", body, REPLY.size)
    inline = bytes(body[inline_at:])
    return Reply(request, submitted, started, compute, inputs, tokens, places, inline)

"""What the server's tests share: raw calls, refusals read as data, and a gate before the engine."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from harness import IS_LINKED, Running
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.local_model import LocalModel
from layertap_server.plan import Outputs, Work
from layertap_server.scheduling.running_batch import Engine

WAIT_S = 30.0
"""How long anything here is waited for; nothing takes a tenth of it."""

CLS, SEP = 2, 3  # of the tiny BERT
NUMPY_DTYPES = {
    1: np.dtype("<f4"),
    2: np.dtype("<f2"),
    3: np.dtype("<u2"),
    4: np.dtype("i1"),
    5: np.dtype("u1"),
}


# Of tests that look into the server where the API and the engine share their objects.
needs_one_process = pytest.mark.skipif(IS_LINKED, reason="it looks behind the link")
# Of tests that only the fast gRPC server can pass; `make test-stock` runs the others on grpc.aio.
needs_fast_server = pytest.mark.skipif(
    os.environ.get("LAYERTAP_GRPC_SERVER") == "stock", reason="only the fast gRPC server does this"
)

# ------------------------------------------------------------------------------- requests


def texts(*contents: str, **fields: Any) -> pb.EncodeRequest:
    """An EncodeRequest of plain texts; `outputs` defaults to one CLS vector."""
    fields.setdefault("outputs", pb.OutputSelection(embeddings=[pb.EmbeddingSpec(pooling=pb.POOLING_CLS)]))
    return pb.EncodeRequest(inputs=[pb.Input(text=content) for content in contents], **fields)


def tokens(*contents: Sequence[int], **fields: Any) -> pb.EncodeRequest:
    """The same of ready token ids."""
    request = texts(**fields)
    request.inputs.extend(pb.Input(token_ids=pb.TokenIds(ids=ids)) for ids in contents)
    return request


def large(num_copies: int, num_tokens: int = 64) -> pb.EncodeRequest:
    """One input whose result has `num_copies` × `num_tokens` × 128 bytes."""
    outputs = pb.OutputSelection(
        hidden_states=pb.HiddenStateSelection(layers=[i % 5 for i in range(num_copies)])
    )
    return tokens([CLS, *range(10, 8 + num_tokens), SEP], outputs=outputs)


def array(tensor: pb.Tensor) -> np.ndarray:
    return np.frombuffer(tensor.data, NUMPY_DTYPES[tensor.dtype]).reshape(tuple(tensor.shape))


# --------------------------------------------------------------------------------- errors


@dataclass(frozen=True, slots=True)
class Refusal:
    """A failed call, with its google.rpc details."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    metadata: dict[str, str]
    fields: list[str]
    # None: no RetryInfo.
    retry_s: float | None


def read_status(status: status_pb2.Status) -> Refusal:
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), None
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
        else:
            message = error_details_pb2.RetryInfo()
            assert detail.Unpack(message), detail.type_url
            retry = message.retry_delay.ToTimedelta().total_seconds()
    [code] = [code for code in grpc.StatusCode if code.value[0] == status.code]
    fields = [violation.field for violation in bad.field_violations]
    return Refusal(code, status.message, info.reason, info.domain, dict(info.metadata), fields, retry)


def read_error(error: grpc.RpcError) -> Refusal:
    """Of a call that the server refused: its details say what its status says."""
    found = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    assert len(found) == 1, f"{error.code()} without details: {error.details()}"
    refusal = read_status(status_pb2.Status.FromString(found[0]))
    assert (refusal.code, refusal.message) == (error.code(), error.details())
    return refusal


def refusal_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Refusal:
    try:
        answer = call(*args, **kwargs)
    except grpc.RpcError as error:
        return read_error(error)
    raise AssertionError(f"it was answered: {str(answer)[:200]}")


# -------------------------------------------------------------------------------- streams


class Stream:
    """One EncodeStream call: send when you like, iterate over the frames."""

    def __init__(self, stub: EncoderServiceStub, timeout: float = WAIT_S) -> None:
        self._outbox: queue.SimpleQueue[pb.EncodeStreamRequest | None] = queue.SimpleQueue()
        self.call = stub.EncodeStream(iter(self._outbox.get, None), timeout=timeout)

    def send(self, request_id: int, request: pb.EncodeRequest) -> None:
        self._outbox.put(pb.EncodeStreamRequest(request_id=request_id, request=request))

    def half_close(self) -> None:
        self._outbox.put(None)

    def __iter__(self) -> Iterator[pb.EncodeStreamResponse]:
        return iter(self.call)

    def reply(self) -> Reply:
        """Reads until some request has ended, and gives that one; the frames must all be its own."""
        frames = []
        for frame in self.call:
            frames.append(frame)
            if frame.HasField("end"):
                [reply] = assemble(frames).values()
                return reply
        raise AssertionError("the stream ended")


@contextmanager
def streaming(stub: EncoderServiceStub, timeout: float = WAIT_S) -> Iterator[Stream]:
    stream = Stream(stub, timeout)
    try:
        yield stream
    finally:
        stream.half_close()
        stream.call.cancel()


@dataclass(slots=True)
class Reply:
    """One request's frames put together."""

    results: list[pb.EncodeResult] = field(default_factory=list)
    status: status_pb2.Status | None = None
    timing: pb.Timing | None = None


def tensors_of(result: pb.EncodeResult) -> list[pb.Tensor]:
    """In field order, which is how TensorChunk counts them."""
    before = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
    after = ("logits", "logit_ids", "sparse_ids", "sparse_weights", "contacts")

    def named(names: Iterable[str]) -> list[pb.Tensor]:
        return [getattr(result, name) for name in names if result.HasField(name)]

    return [*named(before), *result.embeddings, *named(after)]


def assert_same_results(some: Iterable[pb.EncodeResult], others: Iterable[pb.EncodeResult]) -> None:
    """The same results but for rounding: another batch, or another division of it, sums in another order."""
    for one, other in zip(some, others, strict=True):
        for got, expected in zip(tensors_of(one), tensors_of(other), strict=True):
            np.testing.assert_allclose(array(got), array(expected), atol=1e-5, rtol=1e-4)
        bare = [pb.EncodeResult.FromString(result.SerializeToString()) for result in (one, other)]
        for result in bare:
            for tensor in tensors_of(result):
                tensor.data = b""
        assert bare[0] == bare[1]


def assemble(frames: Iterable[pb.EncodeStreamResponse]) -> dict[int, Reply]:
    """Replies by request id; fails where the frames break the contract's order."""
    replies: dict[int, Reply] = {}
    # By request, input and tensor.
    data: defaultdict[tuple[int, int, int], bytearray] = defaultdict(bytearray)
    for frame in frames:
        reply = replies.setdefault(frame.request_id, Reply())
        assert reply.status is None, "a frame after the end"
        match frame.WhichOneof("frame"):
            case "header":
                assert frame.header.input_index == len(reply.results)
                assert all(not tensor.data for tensor in tensors_of(frame.header.result))
                reply.results.append(frame.header.result)
            case "chunk":
                chunk = frame.chunk
                assert chunk.input_index == len(reply.results) - 1
                so_far = data[frame.request_id, chunk.input_index, chunk.tensor]
                assert chunk.offset == len(so_far)
                assert chunk.data
                so_far += chunk.data
            case "end":
                reply.status = frame.end.status
                reply.timing = frame.end.timing
            case other:
                raise AssertionError(other)
    for (request_id, index, number), whole in data.items():
        tensors_of(replies[request_id].results[index])[number].data = bytes(whole)
    return replies


# --------------------------------------------------------------------------- the server's inside


def served(running: Running, name: str = "bert") -> LocalModel:
    return running.models[name]


def eventually(running: Running, condition: Callable[[], bool]) -> None:
    """Returns once the condition, asked on the server's loop, holds."""
    deadline = time.monotonic() + WAIT_S
    pause = threading.Event()
    while not running.call(condition):
        assert time.monotonic() < deadline, "it never came about"
        pause.wait(0.002)


def at_rest(running: Running) -> bool:
    """Nothing is under way and nothing is held for anyone."""
    service = running.server.service
    return (
        service.budget.reserved_bytes == 0
        and service.answering.num_in_flight == 0
        and not service._stream_readers
        and all(
            model.scheduler.queued_tokens == 0
            and not model.scheduler._running
            and not model.host._waiting
            and not model.tokenization._waiting
            for model in running.models.values()
        )
    )


class Gate:
    """Stands before an engine: holds every pass until it is opened, and keeps what came by."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.batches: list[list[Work]] = []
        # Raises for a batch that is to fail.
        self.fault: Callable[[Sequence[Work]], None] = lambda works: None
        self._entered = threading.Semaphore(0)
        self._opened = threading.Event()

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        self.batches.append(list(works))
        self._entered.release()
        assert self._opened.wait(WAIT_S), "nobody opened the gate"
        self.fault(works)
        return self.engine.run(works)

    def wait_for_batch(self) -> None:
        """Returns once the engine's thread stands at the gate, a further time for each call."""
        assert self._entered.acquire(timeout=WAIT_S), "no batch came"

    def open(self) -> None:
        self._opened.set()

    @property
    def seen_ids(self) -> set[int]:
        """Every token id that any pass has seen."""
        return {int(i) for works in self.batches for work in works for i in work.input_ids}


@contextmanager
def gated(running: Running, name: str = "bert") -> Iterator[Gate]:
    """Puts a closed gate before the model's engine, and takes it away."""
    scheduler = served(running, name).scheduler
    gate = Gate(scheduler.engine)
    scheduler.engine = gate
    try:
        yield gate
    finally:
        gate.open()
        scheduler.engine = gate.engine

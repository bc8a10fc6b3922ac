"""An input that cannot be answered fails alone, where the request says so."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import grpc
import pytest

from harness import Running
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.plan import Work
from layertap_server.scheduling.scheduler import TooLargeError
from layertap_server.tokenization.inputs import Encoded, Input
from server.support import (
    CLS,
    SEP,
    WAIT_S,
    assemble,
    eventually,
    gated,
    needs_fast_server,
    needs_one_process,
    read_status,
    refusal_of,
    served,
    streaming,
    texts,
)

pytestmark = pytest.mark.usefixtures("unharmed")

FINE = pb.Input(text="fine")
LONG = "a " * 98
# name: (input, reason, field)
BAD_INPUTS: dict[str, tuple[pb.Input, str, str]] = {
    "too long a text": (pb.Input(text=LONG), "TOO_MANY_TOKENS", "inputs[1].text"),
    "too many words": (pb.Input(words=pb.Words(words=["a"] * 63)), "TOO_MANY_TOKENS", "inputs[1].words"),
    "nothing": (pb.Input(), "EMPTY_INPUT", "inputs[1]"),
    "no ids": (pb.Input(token_ids=pb.TokenIds()), "EMPTY_INPUT", "inputs[1].token_ids.ids"),
    "an id beyond the vocabulary": (
        pb.Input(token_ids=pb.TokenIds(ids=[CLS, 505, SEP])),
        "OUT_OF_RANGE",
        "inputs[1].token_ids.ids[1]",
    ),
    "a type that there is not": (
        pb.Input(token_ids=pb.TokenIds(ids=[CLS, SEP], type_ids=[0, 2])),
        "OUT_OF_RANGE",
        "inputs[1].token_ids.type_ids[1]",
    ),
    "types of another number": (
        pb.Input(token_ids=pb.TokenIds(ids=[CLS, SEP], type_ids=[0])),
        "LENGTH_MISMATCH",
        "inputs[1].token_ids.type_ids",
    ),
    "too large to be read": (
        pb.Input(token_ids=pb.TokenIds(ids=[5] * 70_000)),
        "INPUT_TOO_LARGE",
        "inputs[1].token_ids",
    ),
}
OUTPUTS = pb.OutputSelection(last_hidden_state=True, embeddings=[pb.EmbeddingSpec()])


def answers(stub: EncoderServiceStub, asked: pb.EncodeRequest) -> list[pb.EncodeResult]:
    """What Encode answers, which is the same in frames, whole and grouped."""
    results = list(stub.Encode(asked, timeout=WAIT_S).results)
    with streaming(stub) as stream:
        stream.send(7, asked)
        reply = stream.reply()
        assert reply.status.code == 0
        assert reply.results == results
    for grouped in (False, True):
        sent = pb.EncodeStreamRequest(
            request_id=1, request=asked, accepts_whole=True, accepts_grouped=grouped
        )
        frames = list(stub.EncodeStream(iter([sent]), timeout=WAIT_S))
        if frames[0].HasField("whole"):
            assert list(frames[0].whole.results) == results
        else:
            assert assemble(frames)[1].results == results
    return results


def check_failed(result: pb.EncodeResult, reason: str, *fields: str) -> None:
    refusal = read_status(result.status)
    assert (refusal.reason, refusal.fields) == (reason, list(fields))
    assert result == pb.EncodeResult(status=result.status)


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_input_fails_alone(stub: EncoderServiceStub, name: str) -> None:
    bad, reason, field = BAD_INPUTS[name]
    asked = pb.EncodeRequest(inputs=[FINE, bad, FINE], outputs=OUTPUTS, fail_each_alone=True)
    first, failed, last = answers(stub, asked)
    check_failed(failed, reason, field)
    assert first == last == stub.Encode(texts("fine", outputs=OUTPUTS), timeout=WAIT_S).results[0]
    asked.fail_each_alone = False
    refusal = refusal_of(stub.Encode, asked, timeout=WAIT_S)
    assert refusal == read_status(failed.status)


@pytest.mark.parametrize(
    ("outputs", "reason", "field"),
    [
        (
            pb.OutputSelection(attentions=pb.AttentionSelection(query_positions=[4])),
            "OUT_OF_RANGE",
            "outputs.attentions.query_positions[0]",
        ),
        (
            pb.OutputSelection(embeddings=[pb.EmbeddingSpec(spans=[pb.Span(start=2, end=3)])]),
            "SPAN_OUTSIDE",
            "outputs.embeddings[0].spans[0]",
        ),
    ],
    ids=["row", "span"],
)
def test_what_one_input_has_not_fails_it_alone(
    stub: EncoderServiceStub, outputs: pb.OutputSelection, reason: str, field: str
) -> None:
    asked = texts("a b c", "a", outputs=outputs, fail_each_alone=True)
    whole, failed = answers(stub, asked)
    check_failed(failed, reason, field)
    assert whole.token_count == 5


def test_when_all_fail_the_call_succeeds_and_nothing_is_computed(
    server: Running, stub: EncoderServiceStub
) -> None:
    before = server.server.service.refused["EMPTY_INPUT"]
    num_batches = served(server).scheduler.stats.num_batches
    asked = pb.EncodeRequest(inputs=[pb.Input()] * 20, outputs=OUTPUTS, fail_each_alone=True)
    for result in answers(stub, asked):
        assert read_status(result.status).reason == "EMPTY_INPUT"
    assert served(server).scheduler.stats.num_batches == num_batches
    assert server.server.service.refused["EMPTY_INPUT"] == before + 4 * 20


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (texts("a", model="none"), "MODEL_NOT_FOUND"),
        (texts("a", outputs=pb.OutputSelection()), "NOTHING_SELECTED"),
        (texts("a", outputs=pb.OutputSelection(hidden_states={"layers": [9]})), "OUT_OF_RANGE"),
        (texts("a", prompt_name="none"), "UNKNOWN_PROMPT"),
        (pb.EncodeRequest(outputs=OUTPUTS), "NO_INPUTS"),
        (pb.EncodeRequest(inputs=[FINE] * 301, outputs=OUTPUTS), "TOO_MANY_INPUTS"),
    ],
)
def test_what_is_wrong_with_the_request_fails_it(
    stub: EncoderServiceStub, asked: pb.EncodeRequest, reason: str
) -> None:
    asked.fail_each_alone = True
    assert refusal_of(stub.Encode, asked, timeout=WAIT_S).reason == reason


@needs_one_process
def test_a_prompt_fails_what_it_cannot_stand_before(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served(server)
    monkeypatch.setattr(model, "facts", replace(model.facts, prompts={"query": "find: "}))
    asked = texts("fine", prompt_name="query", fail_each_alone=True)
    asked.inputs.add(token_ids=pb.TokenIds(ids=[CLS, SEP]))
    fine, failed = answers(stub, asked)
    check_failed(failed, "PROMPT_NEEDS_TEXT", "inputs[1].token_ids")
    assert fine.token_count


@pytest.mark.parametrize("num_inputs", [1, 3])
@pytest.mark.parametrize(
    ("fault", "reason"), [(TooLargeError, "OUT_OF_MEMORY"), (ValueError, "INTERNAL")], ids=["memory", "fault"]
)
def test_what_the_engine_fails_at_fails_alone(
    server: Running, stub: EncoderServiceStub, num_inputs: int, fault: type[Exception], reason: str
) -> None:
    asked = texts(*["a b", "a b c", "a b c d"][:num_inputs], outputs=OUTPUTS, fail_each_alone=True)

    def fails_at_the_first(works: Sequence[Work]) -> None:
        for work in works:
            if work.num_tokens == 4:
                raise fault(work) if fault is TooLargeError else fault("poison")

    expected = stub.Encode(asked, timeout=WAIT_S).results
    with gated(server) as gate:
        gate.fault = fails_at_the_first
        gate.open()
        failed, *others = stub.Encode(asked, timeout=WAIT_S).results
        assert read_status(failed.status).reason == reason
        assert failed == pb.EncodeResult(status=failed.status)
        assert [one.token_count for one in others] == [one.token_count for one in expected[1:]]
        assert not any(one.HasField("status") for one in others)
        asked.fail_each_alone = False
        assert refusal_of(stub.Encode, asked, timeout=WAIT_S).reason == reason


@needs_one_process
def test_what_the_tokenizer_fails_at_fails_alone(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served(server)
    encode = model.tokenization.encode

    async def fails(inputs: Sequence[Input], *args: object, **kwargs: object) -> list[Encoded]:
        if any(getattr(one, "text", "") == "poison" for one in inputs):
            raise ValueError("a fault of the tokenizer's")
        return await encode(inputs, *args, **kwargs)

    monkeypatch.setattr(model.tokenization, "encode", fails)
    asked = texts("fine", "poison", fail_each_alone=True)
    fine, failed = stub.Encode(asked, timeout=WAIT_S).results
    check_failed(failed, "INTERNAL")
    assert fine.token_count


@needs_one_process
def test_a_token_that_has_no_embedding_is_refused_by_name(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served(server)
    [one] = stub.Tokenize(pb.TokenizeRequest(inputs=[pb.Input(text="a")]), timeout=WAIT_S).results
    facts = replace(model.facts, vocab_size=max(one.ids), text_ids_fit=False)
    monkeypatch.setattr(model, "facts", facts)
    monkeypatch.setattr(server.server.service.answering, "_resolvers", {})
    asked = texts("a", outputs=OUTPUTS)
    asked.inputs.insert(0, pb.Input(token_ids=pb.TokenIds(ids=[CLS, SEP])))
    for call, same in ((stub.Encode, asked), (stub.Tokenize, pb.TokenizeRequest(inputs=asked.inputs))):
        refusal = refusal_of(call, same, timeout=WAIT_S)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "OUT_OF_RANGE")
        assert refusal.fields == ["inputs[1].text"]
        assert f"'a', id {max(one.ids)}" in refusal.message
    asked.fail_each_alone = True
    assert [one.HasField("status") for one in stub.Encode(asked, timeout=WAIT_S).results] == [False, True]


@needs_one_process
def test_a_pair_whose_types_have_no_embedding_is_refused(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served(server)
    monkeypatch.setattr(model, "facts", replace(model.facts, type_vocab_size=1, text_ids_fit=False))
    monkeypatch.setattr(server.server.service.answering, "_resolvers", {})
    asked = pb.EncodeRequest(inputs=[pb.Input(pair=pb.TextPair(first="a", second="b"))], outputs=OUTPUTS)
    refusal = refusal_of(stub.Encode, asked, timeout=WAIT_S)
    assert (refusal.reason, refusal.fields) == ("OUT_OF_RANGE", ["inputs[0].pair"])
    asked.inputs[0].CopyFrom(FINE)
    assert stub.Encode(asked, timeout=WAIT_S).results


@needs_fast_server
def test_of_a_long_text_that_is_cut_only_its_tokens_wait(
    server: Running, stub: EncoderServiceStub, channel: grpc.Channel
) -> None:
    """The queue is bounded by tokens, and 64 of them could be of megabytes."""
    size = 3 * 2**19
    data = texts("a " * (size // 2), truncation=pb.TRUNCATION_END).SerializeToString()
    streamed = pb.EncodeStreamRequest(
        request_id=1, request=pb.EncodeRequest.FromString(data)
    ).SerializeToString()
    encode = channel.unary_unary("/layertap.v1.EncoderService/Encode")
    stream = channel.stream_stream("/layertap.v1.EncoderService/EncodeStream")
    left = threading.Event()
    with gated(server) as gate:
        # Kept in a variable: a call without references is cancelled.
        first = encode.future(texts("a").SerializeToString(), timeout=WAIT_S)
        gate.wait_for_batch()
        tracemalloc.start()
        try:
            calls = [encode.future(data, timeout=WAIT_S) for _ in range(3)]

            def requests():  # type: ignore[no-untyped-def]
                yield streamed
                left.wait(WAIT_S)

            call = stream(requests(), timeout=WAIT_S)
            eventually(server, lambda: served(server).scheduler.queued_tokens == 4 * 64)
            eventually(server, lambda: tracemalloc.get_traced_memory()[0] < size)
        finally:
            tracemalloc.stop()
            gate.open()
            left.set()
        assert all(one.result() for one in (first, *calls))
        assert list(call)

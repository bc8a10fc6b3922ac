"""Every row of the table of bad requests, asked over the wire, alone and on a stream."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import grpc
import pytest

from harness import Running
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server import errors
from server.support import (
    CLS,
    SEP,
    WAIT_S,
    Refusal,
    needs_one_process,
    read_status,
    refusal_of,
    served,
    streaming,
    texts,
)

pytestmark = pytest.mark.usefixtures("unharmed")

LONG = "a " * 98  # 98 tokens and 2 special ones, where the model takes 64
VOCABULARY = 505


def outputs(**fields: Any) -> pb.OutputSelection:
    return pb.OutputSelection(**fields)


def embedding(**fields: Any) -> pb.OutputSelection:
    return pb.OutputSelection(embeddings=[pb.EmbeddingSpec(), pb.EmbeddingSpec(**fields)])


def span(start: int, end: int, unit: int = 0) -> pb.OutputSelection:
    spans = [pb.Span(start=0, end=1), pb.Span(start=start, end=end, unit=unit)]
    return pb.OutputSelection(embeddings=[pb.EmbeddingSpec(spans=spans)])


def words(start: int, end: int) -> pb.OutputSelection:
    span = pb.Span(start=start, end=end, unit=pb.Span.UNIT_WORD)
    return pb.OutputSelection(embeddings=[pb.EmbeddingSpec(spans=[span])])


def maps_of_pairs(*pairs: tuple[int, int], **fields: Any) -> pb.OutputSelection:
    refs = [pb.HeadRef(layer=layer, head=head) for layer, head in pairs]
    return pb.OutputSelection(attentions=pb.AttentionSelection(pairs=refs, **fields))


def one(**content: Any) -> list[pb.Input]:
    return [pb.Input(text="fine"), pb.Input(**content)]


def ids(*values: int, type_ids: tuple[int, ...] = ()) -> list[pb.Input]:
    return one(token_ids=pb.TokenIds(ids=values, type_ids=type_ids))


def request(inputs: list[pb.Input] | None = None, **fields: Any) -> pb.EncodeRequest:
    fields.setdefault("outputs", outputs(last_hidden_state=True))
    return pb.EncodeRequest(inputs=[pb.Input(text="fine")] if inputs is None else inputs, **fields)


# name: (request, reason, field); all are INVALID_ARGUMENT
BAD_REQUESTS: dict[str, tuple[pb.EncodeRequest, str, str]] = {
    "no outputs": (pb.EncodeRequest(inputs=[pb.Input(text="a")]), "NOTHING_SELECTED", "outputs"),
    "nothing selected": (request(outputs=outputs()), "NOTHING_SELECTED", "outputs"),
    "no inputs": (request([]), "NO_INPUTS", "inputs"),
    "too many inputs": (request([pb.Input(text="a")] * 301), "TOO_MANY_INPUTS", "inputs"),
    "an input without content": (request(one()), "EMPTY_INPUT", "inputs[1]"),
    "token ids without ids": (request(ids()), "EMPTY_INPUT", "inputs[1].token_ids.ids"),
    "hidden state above the last": (
        request(outputs=outputs(hidden_states=pb.HiddenStateSelection(layers=[0, 4, 5]))),
        "OUT_OF_RANGE",
        "outputs.hidden_states.layers[2]",
    ),
    "hidden state before the first": (
        request(outputs=outputs(hidden_states=pb.HiddenStateSelection(layers=[-5, -6]))),
        "OUT_OF_RANGE",
        "outputs.hidden_states.layers[1]",
    ),
    "attention layer above the last": (
        request(outputs=outputs(attentions=pb.AttentionSelection(layers=[3, 4]))),
        "OUT_OF_RANGE",
        "outputs.attentions.layers[1]",
    ),
    "attention layer before the first": (
        request(outputs=outputs(attentions=pb.AttentionSelection(layers=[-5]))),
        "OUT_OF_RANGE",
        "outputs.attentions.layers[0]",
    ),
    "head above the last": (
        request(outputs=outputs(attentions=pb.AttentionSelection(heads=[4]))),
        "OUT_OF_RANGE",
        "outputs.attentions.heads[0]",
    ),
    "query position outside one of the inputs": (
        request(
            [pb.Input(text="a b c"), pb.Input(text="a b")],
            outputs=outputs(attentions=pb.AttentionSelection(query_positions=[0, 4])),
        ),
        "OUT_OF_RANGE",
        "outputs.attentions.query_positions[1]",
    ),
    "query position before the first token": (
        request(outputs=outputs(attentions=pb.AttentionSelection(query_positions=[-65]))),
        "OUT_OF_RANGE",
        "outputs.attentions.query_positions[0]",
    ),
    "embedding layer above the last": (
        request(outputs=embedding(layers=[4, 5])),
        "OUT_OF_RANGE",
        "outputs.embeddings[1].layers[1]",
    ),
    "unknown wire_dtype": (request(wire_dtype=99), "UNKNOWN_ENUM", "wire_dtype"),
    "wire_dtype that floats cannot have": (
        request(wire_dtype=pb.DATA_TYPE_INT8),
        "UNKNOWN_ENUM",
        "wire_dtype",
    ),
    "negative wire_dtype": (request(wire_dtype=-1), "UNKNOWN_ENUM", "wire_dtype"),
    "unknown truncation": (request(truncation=4), "UNKNOWN_ENUM", "truncation"),
    "unknown priority": (request(priority=4), "UNKNOWN_ENUM", "priority"),
    "unknown pooling": (
        request(outputs=embedding(pooling=10)),
        "UNKNOWN_ENUM",
        "outputs.embeddings[1].pooling",
    ),
    "unknown layer_merge": (
        request(outputs=embedding(layer_merge=4)),
        "UNKNOWN_ENUM",
        "outputs.embeddings[1].layer_merge",
    ),
    "unknown encoding": (
        request(outputs=embedding(encoding=6)),
        "UNKNOWN_ENUM",
        "outputs.embeddings[1].encoding",
    ),
    "unknown span unit": (
        request(outputs=span(0, 1, unit=4)),
        "UNKNOWN_ENUM",
        "outputs.embeddings[0].spans[1].unit",
    ),
    "token id outside the vocabulary": (
        request(ids(CLS, VOCABULARY, SEP)),
        "OUT_OF_RANGE",
        "inputs[1].token_ids.ids[1]",
    ),
    "the largest token id there is": (request(ids(2**32 - 1)), "OUT_OF_RANGE", "inputs[1].token_ids.ids[0]"),
    "type_ids of another length": (
        request(ids(CLS, SEP, type_ids=(0,))),
        "LENGTH_MISMATCH",
        "inputs[1].token_ids.type_ids",
    ),
    "type id that the model does not know": (
        request(ids(CLS, SEP, type_ids=(1, 2))),
        "OUT_OF_RANGE",
        "inputs[1].token_ids.type_ids[1]",
    ),
    "text over the limit": (
        request([pb.Input(text="fine")] * 3 + [pb.Input(text=LONG)]),
        "TOO_MANY_TOKENS",
        "inputs[3].text",
    ),
    "pair over the limit": (
        request(one(pair=pb.TextPair(first="a", second=LONG)), truncation=pb.TRUNCATION_NONE),
        "TOO_MANY_TOKENS",
        "inputs[1].pair",
    ),
    "words over the limit": (
        request(one(words=pb.Words(words=["a"] * 63))),
        "TOO_MANY_TOKENS",
        "inputs[1].words",
    ),
    "token ids over the limit": (request(ids(*[9] * 65)), "TOO_MANY_TOKENS", "inputs[1].token_ids"),
    "span past the text": (request(outputs=span(2, 5)), "SPAN_OUTSIDE", "outputs.embeddings[0].spans[1]"),
    "span past the tokens": (
        request(outputs=span(2, 65, pb.Span.UNIT_TOKEN)),
        "SPAN_OUTSIDE",
        "outputs.embeddings[0].spans[1]",
    ),
    "empty span": (request(outputs=span(2, 2)), "EMPTY_SPAN", "outputs.embeddings[0].spans[1]"),
    "backward span": (
        request(outputs=span(2, 1, pb.Span.UNIT_TOKEN)),
        "EMPTY_SPAN",
        "outputs.embeddings[0].spans[1]",
    ),
    "span over white space": (
        request([pb.Input(text="a  b")], outputs=span(1, 3)),
        "EMPTY_SPAN",
        "outputs.embeddings[0].spans[1]",
    ),
    "span over what was truncated away": (
        request([pb.Input(text=LONG)], outputs=span(190, 191), truncation=pb.TRUNCATION_END),
        "EMPTY_SPAN",
        "outputs.embeddings[0].spans[1]",
    ),
    "span in characters of a pair": (
        request([pb.Input(pair=pb.TextPair(first="a", second="b"))], outputs=span(0, 1)),
        "SPAN_NEEDS_TEXT",
        "outputs.embeddings[0].spans[0]",
    ),
    "span in characters of token ids": (
        request([pb.Input(token_ids=pb.TokenIds(ids=[CLS, SEP]))], outputs=span(0, 1)),
        "SPAN_NEEDS_TEXT",
        "outputs.embeddings[0].spans[0]",
    ),
    "more dimensions than there are": (
        request(outputs=embedding(dimensions=33)),
        "OUT_OF_RANGE",
        "outputs.embeddings[1].dimensions",
    ),
    "more dimensions than mean and max have": (
        request(outputs=embedding(dimensions=129, pooling=pb.POOLING_MEAN_MAX, layers=[1, 2])),
        "OUT_OF_RANGE",
        "outputs.embeddings[1].dimensions",
    ),
    "the pooler over other layers": (
        request(outputs=embedding(pooling=pb.POOLING_POOLER, layers=[3])),
        "POOLER_LAYERS",
        "outputs.embeddings[1].layers",
    ),
    "the pooler over a span": (
        request(outputs=embedding(pooling=pb.POOLING_POOLER, spans=[pb.Span(start=0, end=1)])),
        "POOLER_SPANS",
        "outputs.embeddings[1].spans",
    ),
    "unknown prompt": (request(prompt_name="query"), "UNKNOWN_PROMPT", "prompt_name"),
    "positions of rows that are not selected": (
        request(outputs=outputs(pooler_output=True, last_hidden_state_positions=[0])),
        "NOT_SELECTED",
        "outputs.last_hidden_state_positions",
    ),
    "row outside one of the inputs": (
        request(
            [pb.Input(text="a b c"), pb.Input(text="a b")],
            outputs=outputs(last_hidden_state=True, last_hidden_state_positions=[-1, 4]),
        ),
        "OUT_OF_RANGE",
        "outputs.last_hidden_state_positions[1]",
    ),
    "row of hidden states before the first token": (
        request(outputs=outputs(hidden_states=pb.HiddenStateSelection(positions=[0, 1, -65]))),
        "OUT_OF_RANGE",
        "outputs.hidden_states.positions[2]",
    ),
    "column outside the input": (
        request(outputs=outputs(attentions=pb.AttentionSelection(key_positions=[0, 64]))),
        "OUT_OF_RANGE",
        "outputs.attentions.key_positions[1]",
    ),
    "pair of a layer above the last": (
        request(outputs=maps_of_pairs((3, 0), (4, 0))),
        "OUT_OF_RANGE",
        "outputs.attentions.pairs[1].layer",
    ),
    "pair of a head before the first": (
        request(outputs=maps_of_pairs((0, 3), (-4, -5))),
        "OUT_OF_RANGE",
        "outputs.attentions.pairs[1].head",
    ),
    "pairs and layers": (
        request(outputs=maps_of_pairs((0, 0), layers=[0])),
        "CONFLICTING_FIELDS",
        "outputs.attentions.layers",
    ),
    "pairs and heads": (
        request(outputs=maps_of_pairs((0, 0), heads=[0])),
        "CONFLICTING_FIELDS",
        "outputs.attentions.heads",
    ),
    "pairs and a mean over heads": (
        request(outputs=maps_of_pairs((0, 0), mean_over_heads=True)),
        "CONFLICTING_FIELDS",
        "outputs.attentions.mean_over_heads",
    ),
    "a pooling and several": (
        request(outputs=embedding(pooling=pb.POOLING_CLS, poolings=[pb.POOLING_MEAN])),
        "CONFLICTING_FIELDS",
        "outputs.embeddings[1].pooling",
    ),
    "no pooling beside a pooling": (
        request(outputs=embedding(poolings=[pb.POOLING_MEAN, pb.POOLING_NONE])),
        "CONFLICTING_FIELDS",
        "outputs.embeddings[1].poolings[1]",
    ),
    "the pooler beside a pooling": (
        request(outputs=embedding(poolings=[pb.POOLING_POOLER, pb.POOLING_MEAN])),
        "CONFLICTING_FIELDS",
        "outputs.embeddings[1].poolings[0]",
    ),
    "unknown pooling among several": (
        request(outputs=embedding(poolings=[pb.POOLING_MEAN, 99])),
        "UNKNOWN_ENUM",
        "outputs.embeddings[1].poolings[1]",
    ),
    "unspecified pooling among several": (
        request(outputs=embedding(poolings=[pb.POOLING_UNSPECIFIED])),
        "UNKNOWN_ENUM",
        "outputs.embeddings[1].poolings[0]",
    ),
    "more poolings than are concatenated": (
        request(outputs=embedding(poolings=[pb.POOLING_MEAN] * 17)),
        "TOO_MANY",
        "outputs.embeddings[1].poolings",
    ),
    "more dimensions than three poolings have": (
        request(outputs=embedding(poolings=[1, 9, 2], dimensions=97)),
        "OUT_OF_RANGE",
        "outputs.embeddings[1].dimensions",
    ),
    "spans without pooling": (
        request(outputs=embedding(pooling=pb.POOLING_NONE, spans=[pb.Span(start=0, end=1)])),
        "CONFLICTING_FIELDS",
        "outputs.embeddings[1].spans",
    ),
    "spans without pooling, in the list": (
        request(outputs=embedding(poolings=[pb.POOLING_NONE], spans=[pb.Span(start=0, end=1)])),
        "CONFLICTING_FIELDS",
        "outputs.embeddings[1].spans",
    ),
    "the pooler without special tokens": (
        request(outputs=embedding(pooling=pb.POOLING_POOLER, exclude_special_tokens=True)),
        "CONFLICTING_FIELDS",
        "outputs.embeddings[1].exclude_special_tokens",
    ),
    "nothing but special tokens": (
        request(one(text=""), outputs=embedding(pooling=pb.POOLING_NONE, exclude_special_tokens=True)),
        "EMPTY_INPUT",
        "inputs[1].text",
    ),
    "special token ids alone": (
        request(ids(CLS, SEP, SEP), outputs=embedding(exclude_special_tokens=True)),
        "EMPTY_INPUT",
        "inputs[1].token_ids",
    ),
    "span of a special token": (
        request(
            outputs=outputs(
                embeddings=[
                    pb.EmbeddingSpec(
                        exclude_special_tokens=True,
                        spans=[pb.Span(start=0, end=2, unit=2), pb.Span(start=0, end=1, unit=2)],
                    )
                ]
            )
        ),
        "EMPTY_SPAN",
        "outputs.embeddings[0].spans[1]",
    ),
    "unknown unit": (
        request(outputs=span(0, 1, unit=9)),
        "UNKNOWN_ENUM",
        "outputs.embeddings[0].spans[1].unit",
    ),
    "span past the words": (
        request([pb.Input(text="a b")], outputs=span(1, 3, pb.Span.UNIT_WORD)),
        "SPAN_OUTSIDE",
        "outputs.embeddings[0].spans[1]",
    ),
    "span past the given words": (
        request([pb.Input(words=pb.Words(words=["a", "b"]))], outputs=words(1, 3)),
        "SPAN_OUTSIDE",
        "outputs.embeddings[0].spans[0]",
    ),
    "span in words of an empty text": (
        request([pb.Input(text="")], outputs=words(0, 1)),
        "SPAN_OUTSIDE",
        "outputs.embeddings[0].spans[0]",
    ),
    "span in words that were truncated away": (
        request(
            [pb.Input(words=pb.Words(words=["a"] * 98))],
            outputs=words(97, 98),
            truncation=pb.TRUNCATION_END,
        ),
        "EMPTY_SPAN",
        "outputs.embeddings[0].spans[0]",
    ),
    "span in words of a text that was truncated": (
        request([pb.Input(text=LONG)], outputs=words(97, 98), truncation=pb.TRUNCATION_END),
        "SPAN_OUTSIDE",
        "outputs.embeddings[0].spans[0]",
    ),
    "span in words of a pair": (
        request([pb.Input(pair=pb.TextPair(first="a", second="b"))], outputs=words(0, 1)),
        "SPAN_NEEDS_TEXT",
        "outputs.embeddings[0].spans[0]",
    ),
    "span in words of token ids": (
        request([pb.Input(token_ids=pb.TokenIds(ids=[CLS, 9, SEP]))], outputs=words(0, 1)),
        "SPAN_NEEDS_TEXT",
        "outputs.embeddings[0].spans[0]",
    ),
}


def ask_both_ways(stub: EncoderServiceStub, asked: pb.EncodeRequest) -> Refusal:
    """The refusal, which is the same from Encode and as the end of a request on a stream."""
    refusal = refusal_of(stub.Encode, asked, timeout=WAIT_S)
    with streaming(stub) as stream:
        stream.send(7, asked)
        reply = stream.reply()
        assert not reply.results
        assert read_status(reply.status) == refusal
        # The stream itself goes on.
        stream.send(8, texts("fine"))
        assert stream.reply().status.code == 0
    assert refusal.domain == "layertap"
    return refusal


@pytest.mark.parametrize(("asked", "reason", "field"), BAD_REQUESTS.values(), ids=list(BAD_REQUESTS))
def test_bad_input(stub: EncoderServiceStub, asked: pb.EncodeRequest, reason: str, field: str) -> None:
    refusal = ask_both_ways(stub, asked)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert refusal.fields == [field]
    assert refusal.message.startswith(f"{field}: ")
    assert refusal.retry_s is None


@pytest.mark.parametrize("truncation", [pb.TRUNCATION_END, pb.TRUNCATION_START])
@pytest.mark.parametrize(
    "content",
    [
        {"text": LONG},
        {"pair": pb.TextPair(first="a " * 49, second="a " * 48)},
        {"words": pb.Words(words=["a"] * 98)},
        {"token_ids": pb.TokenIds(ids=[9] * 100)},
    ],
    ids=["text", "pair", "words", "token_ids"],
)
def test_too_long_is_cut_where_that_is_allowed(
    stub: EncoderServiceStub, content: dict[str, Any], truncation: int
) -> None:
    asked = request([pb.Input(**content), pb.Input(text="fine")], truncation=truncation)
    cut, whole = stub.Encode(asked, timeout=WAIT_S).results
    assert (cut.token_count, cut.truncated_tokens) == (64, 36)
    assert list(cut.last_hidden_state.shape) == [64, 32]
    assert (whole.token_count, whole.truncated_tokens) == (5, 0)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (request(inputs=[]), "inputs"),
        (request([pb.Input(text=LONG)], truncation=pb.TRUNCATION_NONE), "inputs[0].text"),
        (request(truncation=9), "truncation"),
        (request(prompt_name="query"), "prompt_name"),
    ],
)
def test_tokenize_refuses_the_same(stub: EncoderServiceStub, asked: pb.EncodeRequest, field: str) -> None:
    same = pb.TokenizeRequest(inputs=asked.inputs, truncation=asked.truncation, prompt_name=asked.prompt_name)
    refusal, expected = (
        refusal_of(call, message, timeout=WAIT_S)
        for call, message in ((stub.Tokenize, same), (stub.Encode, asked))
    )
    assert refusal == expected
    assert refusal.fields == [field]


def test_unknown_model(stub: EncoderServiceStub) -> None:
    refusal = ask_both_ways(stub, texts("a", model="gpt"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert refusal.metadata == {"model": "gpt", "served": "bert,distilbert,esm"}
    for call, asked in (
        (stub.GetModel, pb.GetModelRequest(model="gpt")),
        (stub.Tokenize, pb.TokenizeRequest(model="gpt")),
    ):
        assert refusal_of(call, asked, timeout=WAIT_S) == refusal


LONG_NAMES = ["m" * 3000, "模" * 3000, "🜁" * 3000, "\n%" * 3000, "é" * 200_000]


@needs_one_process
@pytest.mark.parametrize("name", LONG_NAMES[:-1], ids=["ASCII", "three bytes", "four bytes", "escaped"])
def test_what_a_caller_names_is_told_back_in_part(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """All of it would not go into a header, and the call end as one of gRPC's own errors."""
    model = served(server)
    for asked in (texts("a", model=name), texts("a", prompt_name=name)):
        refusal = ask_both_ways(stub, asked)
        assert refusal.reason in ("MODEL_NOT_FOUND", "UNKNOWN_PROMPT")
        assert name[:20] in refusal.message
        assert ("bert" if asked.model else "it has none") in refusal.message
    prompts = {f"{number} {name}": "p" for number in range(100)}
    monkeypatch.setattr(model, "facts", replace(model.facts, prompts=prompts))
    refusal = ask_both_ways(stub, texts("a", prompt_name="query"))
    assert (refusal.reason, refusal.fields) == ("UNKNOWN_PROMPT", ["prompt_name"])
    assert "'query'" in refusal.message
    assert refusal.message.endswith(" more")


@pytest.mark.parametrize(
    "text", LONG_NAMES, ids=["ASCII", "three bytes", "four bytes", "escaped", "very long"]
)
def test_every_error_goes_into_a_header(text: str) -> None:
    error = errors.RequestError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "REASON",
        text,
        violations=[(text, text)],
        retry_after_s=1.0,
        metadata={"one": text, "two": text},
    )
    message = quote(error.message.encode())
    details = base64.b64encode(error.to_status().SerializeToString())
    assert len(message) + len(details) < 7000
    assert error.message.startswith(text[:50])
    assert error.message.endswith(text[-50:])


def test_a_method_of_a_long_name_is_refused_as_any_other(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/layertap.v1.EncoderService/" + "%" * 7000)(b"", timeout=WAIT_S)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_client_of_a_long_name_goes_by_a_short_one(server: Running) -> None:
    service = server.server.service
    long = ["a" * 5000 + end for end in "xy"]
    names = [service.client_of(Named(name)).name for name in ("short", b"r\xff", *long, *long)]
    assert names[:2] == ["short", "r\xff"]
    assert names[2:4] == names[4:]
    assert len(set(names)) == 4
    assert max(map(len, names)) <= 128


class Named:
    """A call of a client that gives itself a name."""

    def __init__(self, name: str | bytes) -> None:
        self.name = name

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return (("layertap-client", self.name),)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (outputs(pooler_output=True), "outputs.pooler_output"),
        (embedding(pooling=pb.POOLING_POOLER), "outputs.embeddings[1].pooling"),
    ],
)
def test_no_pooler(stub: EncoderServiceStub, asked: pb.OutputSelection, field: str) -> None:
    refusal = ask_both_ways(stub, request(model="distilbert", outputs=asked))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_POOLER")
    assert refusal.fields == [field]


@needs_one_process
def test_no_attentions(server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = served(server)
    monkeypatch.setattr(model, "facts", replace(model.facts, has_attentions=False))
    refusal = ask_both_ways(stub, request(outputs=outputs(attentions=pb.AttentionSelection())))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_ATTENTIONS")
    assert refusal.fields == ["outputs.attentions"]


@pytest.mark.parametrize("asked", [span(0, 1), words(0, 1)], ids=["characters", "words"])
def test_no_offsets(stub: EncoderServiceStub, asked: pb.OutputSelection) -> None:
    refusal = ask_both_ways(stub, request([pb.Input(text="MKTAY")], model="esm", outputs=asked))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_OFFSETS")
    assert refusal.fields == ["outputs.embeddings[0].spans[0]"]


def test_no_contacts(stub: EncoderServiceStub) -> None:
    refusal = ask_both_ways(stub, request(outputs=outputs(contacts=True, last_hidden_state=True)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_CONTACTS")
    assert refusal.fields == ["outputs.contacts"]


def test_words_of_a_tokenizer_without_offsets(stub: EncoderServiceStub) -> None:
    given = [pb.Input(words=pb.Words(words=["MKT", "AY"]))]
    by_word = stub.Encode(request(given, model="esm", outputs=words(1, 2)), timeout=WAIT_S)
    span = pb.Span(start=4, end=6, unit=pb.Span.UNIT_TOKEN)
    by_token = stub.Encode(
        request(given, model="esm", outputs=outputs(embeddings=[pb.EmbeddingSpec(spans=[span])])),
        timeout=WAIT_S,
    )
    assert by_word.results == by_token.results

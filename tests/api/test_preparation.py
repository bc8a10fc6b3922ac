"""What is done with an input before it is computed: prompts, and tokens without limits or special tokens."""

from __future__ import annotations

from dataclasses import replace

import grpc
import numpy as np
import pytest

from harness import Running
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.api.input_validation import MAX_PROMPT_CHARS
from server.support import CLS, SEP, WAIT_S, array, needs_one_process, refusal_of, served, texts

pytestmark = pytest.mark.usefixtures("unharmed")

ALL = pb.OutputSelection(last_hidden_state=True, tokens=True)


def test_a_prompt_is_put_before_each_text(stub: EncoderServiceStub) -> None:
    asked = texts("random words", "bert", prompt="the query: ", outputs=ALL)
    asked.inputs.add(pair=pb.TextPair(first="a", second="b"))
    whole = texts("the query: random words", "the query: bert", outputs=ALL)
    whole.inputs.add(pair=pb.TextPair(first="the query: a", second="b"))
    results = stub.Encode(asked, timeout=WAIT_S).results
    for got, expected in zip(results, stub.Encode(whole, timeout=WAIT_S).results, strict=True):
        assert got.tokens.ids == expected.tokens.ids
        np.testing.assert_array_equal(array(got.last_hidden_state), array(expected.last_hidden_state))
    words = [word for word, special in zip(results[0].tokens.tokens, results[0].tokens.special, strict=True)]
    own = [i for i, end in enumerate(results[0].tokens.ends) if end > 0]
    assert results[0].tokens.starts[own[0]] == 0, "offsets are those of the caller's text"
    assert len(own) < len(words) - 2


def test_a_prompt_before_words_or_ids_is_refused(stub: EncoderServiceStub) -> None:
    for content in ({"words": pb.Words(words=["a"])}, {"token_ids": pb.TokenIds(ids=[CLS, SEP])}):
        asked = pb.EncodeRequest(inputs=[pb.Input(text="a"), pb.Input(**content)], prompt="p ", outputs=ALL)
        refusal = refusal_of(stub.Encode, asked, timeout=WAIT_S)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_NEEDS_TEXT")
        assert refusal.fields == [f"inputs[1].{next(iter(content))}"]
        assert "leave prompt empty" in refusal.message


def test_a_prompt_and_its_name_exclude_each_other(stub: EncoderServiceStub) -> None:
    refusal = refusal_of(stub.Encode, texts("a", prompt="p", prompt_name="query"), timeout=WAIT_S)
    assert (refusal.reason, refusal.fields) == ("CONFLICTING_FIELDS", ["prompt"])


def test_a_prompt_is_limited(stub: EncoderServiceStub) -> None:
    """It is put before each of perhaps hundreds of texts: a small request must not become a large one."""
    refusal = refusal_of(stub.Encode, texts("a", prompt="p" * (MAX_PROMPT_CHARS + 1)), timeout=WAIT_S)
    assert (refusal.reason, refusal.fields) == ("TOO_MANY", ["prompt"])


@needs_one_process
def test_a_prompt_takes_the_place_of_the_default_one(
    server: Running, stub: EncoderServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served(server)
    facts = replace(model.facts, prompts={"query": "find: "}, default_prompt_name="query")
    monkeypatch.setattr(model, "facts", facts)
    outputs = pb.OutputSelection(embeddings=[pb.EmbeddingSpec()], tokens=True)
    [own] = stub.Encode(texts("bert", prompt="the ", outputs=outputs), timeout=WAIT_S).results
    [expected] = stub.Encode(
        texts("the bert", outputs=pb.OutputSelection(tokens=True)), timeout=WAIT_S
    ).results
    assert own.tokens.ids == expected.tokens.ids


def test_tokenize_has_no_limit_unless_asked_for_one(stub: EncoderServiceStub) -> None:
    long = pb.Input(text="the " * 100)
    [whole] = stub.Tokenize(pb.TokenizeRequest(inputs=[long]), timeout=WAIT_S).results
    assert len(whole.ids) == 102, "the model takes 64"
    limited = pb.TokenizeRequest(inputs=[long], truncation=pb.TRUNCATION_NONE)
    refusal = refusal_of(stub.Tokenize, limited, timeout=WAIT_S)
    assert (refusal.reason, refusal.fields) == ("TOO_MANY_TOKENS", ["inputs[0].text"])
    limited.truncation = pb.TRUNCATION_END
    [cut] = stub.Tokenize(limited, timeout=WAIT_S).results
    assert len(cut.ids) == 64


def test_tokenize_without_special_tokens(stub: EncoderServiceStub) -> None:
    inputs = [
        pb.Input(text="让我们 bert"),
        pb.Input(text=""),
        pb.Input(pair=pb.TextPair(first="a", second="b")),
        pb.Input(token_ids=pb.TokenIds(ids=[CLS, 9, SEP])),
    ]
    every, without = (
        stub.Tokenize(pb.TokenizeRequest(inputs=inputs, without_special_tokens=flag), timeout=WAIT_S).results
        for flag in (False, True)
    )
    for whole, some in zip(every, without, strict=True):
        kept = [i for i, special in enumerate(whole.special) if not special]
        assert len(kept) < len(whole.ids)
        for field in pb.Tokens.DESCRIPTOR.fields:
            values = getattr(whole, field.name)
            assert list(getattr(some, field.name)) == [values[i] for i in kept]

"""What the calls answer: models, tokens, and requests that share a forward pass."""

from __future__ import annotations

import numpy as np
import pytest

from harness import Running
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.api.planning import Resolver
from layertap_server.api.validation import parse_selection
from layertap_server.errors import RequestError
from layertap_server.tokenization.inputs import Encoded, Text
from server.support import CLS, SEP, WAIT_S, array, eventually, gated, served, texts, tokens

pytestmark = pytest.mark.usefixtures("unharmed")


def test_get_model(stub: EncoderServiceStub) -> None:
    model = stub.GetModel(pb.GetModelRequest(model="distilbert"), timeout=WAIT_S).model
    expected = pb.Model(
        name="distilbert",
        architecture="distilbert",
        hidden_size=32,
        num_layers=4,
        num_attention_heads=4,
        vocab_size=505,
        max_tokens=64,
        has_pooler=False,
        has_attentions=True,
        default_pooling=pb.POOLING_MEAN,
        compute_dtype=pb.DATA_TYPE_FLOAT32,
        device="cpu",
        limits=pb.ModelLimits(
            max_inputs_per_request=300, max_message_bytes=4 * 2**20, max_result_bytes=64 * 2**20
        ),
        embedding_size=32,
        connections=1,
    )
    assert model == expected


def test_list_models_in_order_and_the_first_is_the_default(stub: EncoderServiceStub) -> None:
    models = stub.ListModels(pb.ListModelsRequest(), timeout=WAIT_S).models
    assert [model.name for model in models] == ["bert", "distilbert", "esm"]
    default = stub.GetModel(pb.GetModelRequest(), timeout=WAIT_S).model
    assert default == models[0]
    named, unnamed = (stub.Encode(texts("a", model=name), timeout=WAIT_S).results for name in ("bert", ""))
    assert named == unnamed


def test_tokenize_gives_the_tokens_of_encode(server: Running, stub: EncoderServiceStub) -> None:
    inputs = [
        pb.Input(text="让我们 bert"),
        pb.Input(pair=pb.TextPair(first="a", second="b")),
        pb.Input(words=pb.Words(words=["random", "words"])),
        pb.Input(token_ids=pb.TokenIds(ids=[CLS, 9, SEP], type_ids=[0, 1, 1])),
        pb.Input(text="the " * 100),
    ]
    asked = pb.TokenizeRequest(inputs=inputs, truncation=pb.TRUNCATION_START)
    tokenized = stub.Tokenize(asked, timeout=WAIT_S).results
    with gated(server) as gate:
        outputs = pb.OutputSelection(tokens=True)
        request = pb.EncodeRequest(inputs=inputs, truncation=pb.TRUNCATION_START, outputs=outputs)
        encoded = stub.Encode(request, timeout=WAIT_S)
        assert gate.batches == [], "tokens alone need no forward pass"
    assert [result.tokens for result in encoded.results] == list(tokenized)
    assert [result.token_count for result in encoded.results] == [len(one.ids) for one in tokenized]
    assert (encoded.timing.batch_inputs, encoded.timing.compute_ns) == (0, 0)
    assert encoded.timing.total_ns >= encoded.timing.tokenize_ns > 0
    lengths = {len(getattr(tokenized[1], field.name)) for field in pb.Tokens.DESCRIPTOR.fields}
    assert lengths == {5}
    assert list(tokenized[1].sequence_ids) == [-1, 0, -1, 1, -1]


def test_concurrent_calls_share_one_forward_pass(server: Running, stub: EncoderServiceStub) -> None:
    asked = [tokens([CLS, *range(10, 10 + size), SEP]) for size in range(1, 21)]
    alone = [array(stub.Encode(one, timeout=WAIT_S).results[0].embeddings[0]) for one in asked]
    num_tokens = sum(len(one.inputs[0].token_ids.ids) for one in asked)
    with gated(server) as gate:
        first = stub.Encode.future(texts("holds the engine"), timeout=WAIT_S)
        gate.wait_for_batch()
        calls = [stub.Encode.future(one, timeout=WAIT_S) for one in asked]
        eventually(server, lambda: served(server).scheduler.queued_tokens == num_tokens)
        gate.open()
        assert first.result().timing.batch_inputs == 1
        answers = [call.result() for call in calls]
        assert [len(works) for works in gate.batches] == [1, 20]
    for answer, expected in zip(answers, alone, strict=True):
        assert (answer.timing.batch_inputs, answer.timing.batch_tokens) == (20, num_tokens)
        assert answer.timing.queue_ns > 0
        assert answer.timing.compute_ns > 0
        np.testing.assert_allclose(array(answer.results[0].embeddings[0]), expected, atol=2e-5, rtol=1e-4)


def test_priorities_over_the_wire(server: Running, stub: EncoderServiceStub) -> None:
    scheduler = served(server).scheduler
    wide = [CLS, *[9] * 62]
    with gated(server) as gate:
        calls = [stub.Encode.future(texts("holds the engine"), timeout=WAIT_S)]
        gate.wait_for_batch()
        for number, priority in enumerate((pb.PRIORITY_LOW, 0, pb.PRIORITY_NORMAL, pb.PRIORITY_HIGH)):
            # Each fills a batch of its own.
            asked = tokens(*[[*wide, 11 + number]] * 32, priority=priority)
            calls.append(stub.Encode.future(asked, timeout=WAIT_S))
            eventually(server, lambda count=number + 1: scheduler.queued_tokens == count * 32 * 64)
        gate.open()
        for call in calls:
            call.result()
        assert [int(works[0].input_ids[-1]) for works in gate.batches[1:]] == [14, 12, 13, 11]


def test_shares_go_by_the_name_that_a_caller_gives_itself(server: Running, stub: EncoderServiceStub) -> None:
    """One with two batches of inputs, and one with a single input that came last."""
    scheduler = served(server).scheduler
    wide = [CLS, *[9] * 62, SEP]
    with gated(server) as gate:
        calls = [stub.Encode.future(texts("holds the engine"), timeout=WAIT_S)]
        gate.wait_for_batch()
        giant = tokens(*[wide] * 60)
        calls.append(stub.Encode.future(giant, timeout=WAIT_S))
        eventually(server, lambda: scheduler.queued_tokens == 60 * 64)
        single, metadata = tokens([CLS, 11, SEP]), [("layertap-client", "small")]
        calls.append(stub.Encode.future(single, timeout=WAIT_S, metadata=metadata))
        eventually(server, lambda: scheduler.queued_tokens == 60 * 64 + 3)
        gate.open()
        for call in calls:
            call.result()
        assert 3 in [work.num_tokens for work in gate.batches[1]], "it rides in the next batch"


def test_models_do_not_wait_for_each_other(server: Running, stub: EncoderServiceStub) -> None:
    with gated(server) as gate:
        held = stub.Encode.future(texts("a"), timeout=WAIT_S)
        gate.wait_for_batch()
        assert stub.Encode(texts("a", model="distilbert"), timeout=WAIT_S).results
        assert not held.done()
        gate.open()
        assert held.result().results


def test_a_text_without_any_token_is_refused(server: Running) -> None:
    """Of a tokenizer that adds no special tokens; the models here all have one that does."""
    nothing = np.array([], np.int64)
    encoded = Encoded(nothing, nothing, 0, True, 0, lambda: None)  # type: ignore[arg-type,return-value]
    facts = served(server).facts
    selection = parse_selection(pb.EncodeRequest(outputs={"last_hidden_state": True}), facts)
    with pytest.raises(RequestError) as refused:
        Resolver(selection, facts).resolve(Text(""), encoded, 0)
    assert (refused.value.reason, refused.value.violations[0][0]) == ("EMPTY_INPUT", "inputs[0].text")

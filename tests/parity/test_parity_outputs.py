"""Every output of every family, asked alone: the same as transformers gives in process."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from reference import Input, Reference, assert_close, assert_result

import layertap
from families import MAX_TOKENS, NUM_LAYERS, sentences

LONG_TEXT = " ".join(sentences()[:5])
RESIDUES = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"


def sample(reference: Reference) -> str:
    """A text of some thirty tokens."""
    return RESIDUES if reference.family.model_type == "esm" else " ".join(sentences()[7].split()[:18])


def check(client: layertap.Client, reference: Reference, item: Input, **options: Any) -> None:
    """Ask for `options` of one input, and compare all that comes."""
    result = client.encode([item], model=reference.name, **options)[0]
    assert_result(result, reference.encode(item), options)


def test_model_describes_itself(client: layertap.Client, reference: Reference) -> None:
    model = client.model(reference.name)
    config = reference.model.config
    assert model.architecture == config.model_type
    assert model.num_layers == NUM_LAYERS
    assert model.num_attention_heads == config.num_attention_heads
    assert model.hidden_size == config.hidden_size
    assert model.vocab_size == config.vocab_size
    assert model.max_tokens == MAX_TOKENS
    assert model.has_pooler == reference.family.has_pooler
    assert model.has_attentions


def test_everything_at_once(client: layertap.Client, reference: Reference) -> None:
    pooler = {"pooler_output": True} if reference.family.has_pooler else {}
    outputs = {"last_hidden_state": True, "hidden_states": True, "attentions": True, "embeddings": True}
    check(client, reference, sample(reference), **outputs, **pooler, tokens=True)


def test_pooler_output(client: layertap.Client, reference: Reference) -> None:
    if reference.family.has_pooler:
        check(client, reference, sample(reference), pooler_output=True)
        return
    with pytest.raises(layertap.FailedPrecondition):
        client.encode("a", model=reference.name, pooler_output=True)
    with pytest.raises(layertap.FailedPrecondition):
        client.encode("a", model=reference.name, embeddings=layertap.Embedding(pooling="pooler"))


@pytest.mark.parametrize("layers", [[0], [1], [-1], [2, 0, 2], [-2, 4, -5], [3, -1, 3] * 40])
def test_hidden_states_of_chosen_layers(
    client: layertap.Client, reference: Reference, layers: list[int]
) -> None:
    check(client, reference, sample(reference), hidden_states=layers)


@pytest.mark.parametrize(
    "asked",
    [
        [1],
        [-1, 0],
        layertap.Attentions(layers=[2], heads=[3, 0]),
        layertap.Attentions(heads=[-1]),
        layertap.Attentions(mean_over_heads=True),
        layertap.Attentions(layers=[0, -1], heads=[1, 2], mean_over_heads=True),
        layertap.Attentions(query_positions=[0]),
        layertap.Attentions(layers=[3], query_positions=[-1, 2, 2]),
        layertap.Attentions(layers=[1, 2], heads=[0, 2], mean_over_heads=True, query_positions=[1, -2]),
        layertap.Attentions(layers=[1, 0, 1], heads=[2, 2, 0, 2], query_positions=[3, 0, -1, 3]),
        layertap.Attentions(layers=[2, 2], heads=[0, 1, 1] * 50, mean_over_heads=True),
    ],
)
def test_attentions(client: layertap.Client, reference: Reference, asked: Any) -> None:
    check(client, reference, sample(reference), attentions=asked)


def test_embeddings_of_every_kind(client: layertap.Client, reference: Reference) -> None:
    """Every pooling, merge, normalizing and cut, each with each, from one pass."""
    poolings: list[Any] = ["mean", "cls", "max", "last_token", "mean_max"]
    layers: list[dict[str, Any]] = [{}, {"layers": [2]}, {"layers": [2, -1]}]
    layers += [{"layers": [-1, 1, 0], "layer_merge": merge} for merge in ("concat", "mean", "sum")]
    finishes: list[dict[str, Any]] = [{}, {"normalize": False}, {"normalize": True}]
    finishes += [{"dimensions": 10}, {"dimensions": 10, "normalize": True}]
    specs = [layertap.Embedding()]
    specs += [
        layertap.Embedding(pooling=pooling, **of_layers, **finish)
        for pooling, of_layers, finish in product(poolings, layers, finishes)
    ]
    specs += [
        layertap.Embedding(pooling=pooling, layers=[1, -1, 1, 0] * 5, layer_merge=merge, normalize=normalize)
        for pooling, merge, normalize in product(poolings, ("concat", "mean", "sum"), (False, True))
    ]
    if reference.family.has_pooler:
        specs += [layertap.Embedding(pooling="pooler", **finish) for finish in finishes]
    check(client, reference, sample(reference), embeddings=specs)


def test_embedding_encodings(client: layertap.Client, reference: Reference) -> None:
    encodings: list[Any] = [None, "float32", "float16", "bfloat16", "int8", "binary"]
    specs = [layertap.Embedding(encoding=encoding) for encoding in encodings]
    specs += [layertap.Embedding(encoding=encoding, normalize=True, dimensions=21) for encoding in encodings]
    check(client, reference, sample(reference), embeddings=specs, dtype="float16")


def test_spans(client: layertap.Client, reference: Reference) -> None:
    text = sample(reference)
    spans = [layertap.Span(0, 3, unit="token"), layertap.Span(2, 3, unit="token")]
    if reference.tokenizer.is_fast:
        first, second, *_ = text.split()
        spans.append(layertap.Span(0, len(first)))
        spans.append(layertap.Span(len(first) + 1, len(first) + 1 + len(second)))
        spans.append(layertap.Span(len(text) - len(text.split()[-1]), len(text)))
    specs = [
        layertap.Embedding(spans=spans),
        layertap.Embedding(spans=spans[:1], pooling="mean_max", layers=[1, 2], normalize=True),
        layertap.Embedding(spans=spans, pooling="max", encoding="int8"),
    ]
    check(client, reference, text, embeddings=specs)


@pytest.mark.parametrize("ordered", [True, False])
def test_streamed(client: layertap.Client, reference: Reference, ordered: bool) -> None:
    items = [layertap.TokenIds(range(5, 5 + length)) for length in (3, 20, 1, 11)]
    options: Any = {
        "hidden_states": True,
        "attentions": True,
        "embeddings": layertap.Embedding(encoding="int8"),
    }
    streamed = dict(client.stream(items, model=reference.name, ordered=ordered, **options))
    assert sorted(streamed) == [0, 1, 2, 3]
    for index, result in streamed.items():
        assert_result(result, reference.encode(items[index]), options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_wire_dtypes(client: layertap.Client, reference: Reference, dtype: str) -> None:
    outputs = {"last_hidden_state": True, "hidden_states": [1, -1], "attentions": [0], "embeddings": True}
    check(client, reference, sample(reference), **outputs, dtype=dtype)


def test_inputs_of_every_kind(client: layertap.Client, reference: Reference) -> None:
    text = sample(reference)
    half = len(text) // 2
    items: list[Input] = [
        "",
        " ",
        layertap.Pair(text[:half], text[half:]),
        layertap.Pair("", text[:half]),
        layertap.TokenIds([5]),
        layertap.TokenIds(list(range(5, 5 + MAX_TOKENS // 3))),
        f"{text[:half]} {reference.family.mask} {text[half:]} {reference.family.mask}",
        text,
    ]
    if reference.tokenizer.is_fast:
        items.append(layertap.Words(text.split()))
    if reference.tokenizer.pad_token_id is not None:  # padding inside a text is a token like any other
        items.append(layertap.TokenIds([7, reference.tokenizer.pad_token_id, 9, 11]))
    if reference.family.uses_type_ids:
        items.append(layertap.TokenIds([7, 8, 9, 11], type_ids=[0, 1, 1, 0]))
    outputs: Any = {"last_hidden_state": True, "attentions": True, "embeddings": True, "tokens": True}
    results = client.encode(items, model=reference.name, **outputs)
    for item, result in zip(items, results, strict=True):
        assert_result(result, reference.encode(item), outputs)


def test_longest_allowed(client: layertap.Client, reference: Reference) -> None:
    longest = [5 + position % 20 for position in range(MAX_TOKENS)]
    check(client, reference, layertap.TokenIds(longest), last_hidden_state=True, attentions=True)
    with pytest.raises(layertap.InvalidArgument):
        client.encode([layertap.TokenIds([*longest, 5])], model=reference.name, last_hidden_state=True)


@pytest.mark.parametrize(("truncation", "side"), [("end", "right"), ("start", "left")])
def test_truncation(client: layertap.Client, reference: Reference, truncation: Any, side: str) -> None:
    text = RESIDUES * 4 if reference.family.model_type == "esm" else LONG_TEXT
    options: Any = {"last_hidden_state": True, "tokens": True, "truncation": truncation}
    result = client.encode(text, model=reference.name, **options)
    assert_result(result, reference.encode(text, side), options)
    assert result.token_count == MAX_TOKENS
    assert result.truncated_tokens == len(reference.tokenizer(text)["input_ids"]) - MAX_TOKENS


def test_tokens(client: layertap.Client, reference: Reference) -> None:
    text = sample(reference)
    pair = layertap.Pair(text[: len(text) // 2], text[len(text) // 2 :])
    items: list[Input] = [text, pair] if reference.tokenizer.is_fast else [text]
    for item in items:
        result = client.encode(item, model=reference.name, tokens=True)
        expected = reference.encode(item)
        tokens = result.tokens
        assert tokens is not None
        np.testing.assert_array_equal(tokens.ids, expected.ids)
        assert list(tokens.tokens) == reference.tokenizer.convert_ids_to_tokens(expected.ids.tolist())
        assert result.token_count == len(tokens) == expected.num_tokens
        if not reference.tokenizer.is_fast:
            continue
        assert expected.encoding is not None
        encoding = expected.encoding.encodings[0]
        special = np.asarray(encoding.special_tokens_mask, bool)
        np.testing.assert_array_equal(tokens.special, special)
        for name, values in {"sequence_ids": encoding.sequence_ids, "word_ids": encoding.word_ids}.items():
            wanted = [-1 if value is None else value for value in values]
            np.testing.assert_array_equal(getattr(tokens, name), wanted)
        starts, ends = zip(*encoding.offsets, strict=True)
        np.testing.assert_array_equal(tokens.starts, np.where(special, 0, starts))
        np.testing.assert_array_equal(tokens.ends, np.where(special, 0, ends))


def test_remote_model_is_like_the_model(client: layertap.Client, reference: Reference) -> None:
    texts = [sample(reference), "MKV" if reference.family.model_type == "esm" else "two words"]
    tokenizer = reference.tokenizer
    tokenizer.padding_side = "right"
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = reference.model(**encoded, output_hidden_states=True, output_attentions=True)
    remote = layertap.RemoteModel(client, model=reference.name)
    ours = remote(**encoded, output_hidden_states=True, output_attentions=True)

    # transformers lists cross-attentions, empty, where the architecture could have some.
    assert list(ours.keys()) == [key for key in theirs if key != "cross_attentions"]
    lengths = encoded["attention_mask"].sum(-1).tolist()
    for key in ours.keys():  # noqa: SIM118  # as iterating over a ModelOutput does
        ours_of_key, theirs_of_key = ours[key], theirs[key]
        if isinstance(theirs_of_key, torch.Tensor):
            ours_of_key, theirs_of_key = (ours_of_key,), (theirs_of_key,)
        assert len(ours_of_key) == len(theirs_of_key)
        for mine, wanted in zip(ours_of_key, theirs_of_key, strict=True):
            assert mine.shape == wanted.shape
            for row, length in enumerate(lengths):
                cut: tuple[slice, ...] = (slice(length),) if key != "pooler_output" else ()
                cut = (slice(None), slice(length), slice(length)) if key == "attentions" else cut
                atol = 2e-6 if key == "attentions" else 2e-5
                assert_close(mine[row].numpy()[cut], wanted[row].numpy()[cut], key, atol=atol)

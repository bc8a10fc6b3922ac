"""What a caller sees without reading the source: signatures, help, reprs, and what a result holds."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import layertap
from layertap import AsyncClient, Attentions, Client, EmbedOptions, EncodeOptions, HiddenStates, Logits

from .fake_server import FakeEncoder


@pytest.mark.parametrize("client_class", [Client, AsyncClient])
def test_signatures_show_the_options(client_class: type) -> None:
    for name, options in (("encode", EncodeOptions), ("stream", EncodeOptions), ("embed", EmbedOptions)):
        method = getattr(client_class, name)
        shown = inspect.signature(method).parameters
        assert set(options.__annotations__) <= set(shown), name
        assert not [one for one in shown.values() if one.kind is one.VAR_KEYWORD]
        assert shown["model"].default == ""
        for option in options.__annotations__:
            assert f"`{option}`" in method.__doc__, option
            assert shown[option].kind is inspect.Parameter.KEYWORD_ONLY
            assert shown[option].default is not inspect.Parameter.empty


def test_version() -> None:
    assert layertap.__version__[0].isdigit()


def test_reprs_are_short(client: Client) -> None:
    result = client.encode("ab" * 100, last_hidden_state=True, attentions=True, embeddings=True, tokens=True)
    assert "last_hidden_state=float32(202, 4)" in repr(result)
    for value in (result, result.tokens, client, client.model()):
        assert len(repr(value)) < 900
        assert "array(" not in repr(value)
    assert repr(client.tokenize("ab")) == "Tokens(4: [CLS] t107 t108 [SEP])"
    assert repr(result.tokens).endswith(" …)")
    vector = client.encode("a", embeddings=layertap.Embedding(encoding="int8")).embedding
    assert repr(vector) == "Quantized(values=int8(4,), scale=float32())"
    assert repr(client).startswith("Client('127.0.0.1:")


def held(client: Client, **options: Any) -> layertap.Selection:
    return client.encode("abc", **options).selection


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("sends_whole", [False, True])
def test_a_result_says_what_it_holds(
    client: Client, fake: FakeEncoder, streamed: bool, sends_whole: bool
) -> None:
    fake.sends_whole = sends_whole
    if streamed:
        options = {
            "hidden_states": HiddenStates([0, -1], [1]),
            "attentions": Attentions(layers=[2], key_positions=[0, 1]),
        }
        ((_, result),) = client.stream(["abc"], **options)  # type: ignore[arg-type]
    else:
        result = client.encode(
            "abc",
            hidden_states=HiddenStates([0, -1], [1]),
            attentions=Attentions(layers=[2], key_positions=[0, 1]),
        )
    assert result.selection.hidden_states == HiddenStates((0, -1), (1,))
    maps = result.selection.attentions
    assert maps == Attentions((2,), (0, 1), False, (0, 1, 2, 3, 4), (0, 1))
    assert result.attentions.shape == tuple(
        map(len, (maps.layers, maps.heads, maps.query_positions, maps.key_positions))
    )
    assert pickle.loads(pickle.dumps(result)).selection == result.selection
    assert copy.deepcopy(result).selection == result.selection


def test_all_are_listed_where_none_was_named(client: Client) -> None:
    selection = held(client, last_hidden_state=True, hidden_states=True, attentions=True)
    assert selection.last_hidden_state_positions == (0, 1, 2, 3, 4)
    assert selection.hidden_states == HiddenStates((0, 1, 2, 3), (0, 1, 2, 3, 4))
    assert selection.attentions.layers == (0, 1, 2)
    assert selection.attentions.heads == (0, 1)
    assert held(
        client, last_hidden_state=True, last_hidden_state_positions=[-1, 0]
    ).last_hidden_state_positions == (-1, 0)


def test_single_heads_and_means(client: Client) -> None:
    pairs = held(client, attentions=Attentions(pairs=[(2, 1), (0, -1)])).attentions
    assert (pairs.pairs, pairs.layers, pairs.heads) == (((2, 1), (0, -1)), (), ())
    mean = held(client, attentions=Attentions(mean_over_heads=True, heads=[1])).attentions
    assert (mean.mean_over_heads, mean.heads) == (True, (1,))
    assert held(client, attentions=Attentions(mean_over_heads=True)).attentions.heads == ()


def test_logits(client: Client) -> None:
    assert held(client, model="classifier", logits=True).logits == Logits()
    tags = held(client, model="tagger", logits=Logits([1, 2], top_k=2)).logits
    assert tags == Logits((1, 2), 2)
    assert held(client, model="tagger", logits=True).logits.positions == (0, 1, 2, 3, 4)
    nothing = held(client, embeddings=True)
    assert (nothing.hidden_states, nothing.attentions, nothing.logits) == (None, None, None)


def test_arrays_are_not_part_of_a_selection(client: Client) -> None:
    result = client.encode("abc", hidden_states=True)
    assert "_asked" not in result.arrays()
    assert isinstance(result.hidden_states, np.ndarray)

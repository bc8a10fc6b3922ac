"""What callers give by mistake: each is refused before anything is sent, by the name of the argument."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import layertap
from layertap import (
    AsyncClient,
    Attentions,
    Client,
    Embedding,
    HiddenStates,
    Logits,
    Pair,
    RemoteModel,
    Span,
    Sparse,
    TokenIds,
    Words,
)

from .fake_server import HIDDEN_SIZE, FakeEncoder


class Frame:
    """A table of pandas: iterating over it gives the names of its columns."""

    ndim = 2

    def __iter__(self) -> Any:
        return iter(["text", "label"])

    def __len__(self) -> int:
        return 2

    def __contains__(self, name: object) -> bool:
        return name in ("text", "label")


class Series:
    """A column of pandas."""

    ndim = 1

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def __iter__(self) -> Any:
        return iter(self._values)

    def tolist(self) -> list[Any]:
        return self._values


NO_INPUTS: list[tuple[Any, str]] = [
    (None, "inputs=None: give a str, Pair, TokenIds or Words, or a list of them"),
    (b"x", r"inputs=b'x': .*bytes.decode\(\)"),
    (bytearray(b"x"), "inputs is a bytearray"),
    (5, "inputs=5"),
    (Path("a.txt"), "inputs is a PosixPath"),
    ({"a": 1}, r"inputs is a dict: its keys would be read: give list\(inputs.values\(\)\)"),
    ({"a", "b"}, "inputs is a set: it has no order"),
    (frozenset({"a"}), "inputs is a frozenset"),
    (Frame(), "inputs is a Frame: it has 2 dimensions"),
    (np.array([["a"], ["b"]]), "inputs is a ndarray: it has 2 dimensions"),
    (np.array("a"), "inputs is a ndarray: it has 0 dimensions"),
]


@pytest.mark.parametrize(("inputs", "message"), NO_INPUTS, ids=lambda value: type(value).__name__)
async def test_what_is_no_list_of_inputs(
    client: Client, async_client: AsyncClient, fake: FakeEncoder, inputs: Any, message: str
) -> None:
    for call in (client.encode, client.stream):
        with pytest.raises(TypeError, match=message):
            call(inputs, tokens=True)
    with pytest.raises(TypeError, match=message):
        client.tokenize(inputs)
    with pytest.raises(TypeError, match=message):
        await async_client.encode(inputs, tokens=True)
    with pytest.raises(TypeError, match=message):
        async_client.stream(inputs, tokens=True)
    with pytest.raises(TypeError, match=message):
        await async_client.tokenize(inputs)
    assert fake.calls == []


@pytest.mark.parametrize("inputs", ["hello", Pair("a", "b"), TokenIds([1]), Words(["a"])], ids=repr)
def test_a_stream_of_one_input(
    client: Client, async_client: AsyncClient, fake: FakeEncoder, inputs: Any
) -> None:
    for stream in (client.stream, async_client.stream):
        with pytest.raises(TypeError, match=r"inputs.*: it is one input: give a list, such as \[text\]"):
            stream(inputs, tokens=True)
    assert fake.calls == []


def test_an_async_iterable_needs_the_other_client(client: Client) -> None:
    async def source() -> Any:
        yield "a"

    with pytest.raises(TypeError, match="only AsyncClient reads an async iterable"):
        client.stream(source(), tokens=True)


def without_address(value: object) -> str:
    """An id that is the same in every process that collects the tests."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


WRONG_INPUTS: list[tuple[Any, str]] = [
    (None, " is a NoneType, not a str, Pair, TokenIds or Words; drop missing values first"),
    (math.nan, " is a float, not .*; drop missing values first"),
    (b"x", r" is a bytes, not .*; bytes.decode\(\) makes a str"),
    (101, r" is a int, not .*; token ids go in as TokenIds\(\[…\]\)"),
    (np.int64(101), " is a int64, not .*TokenIds"),
    (["a", "b"], r" is a list, not .*; two texts go in as Pair\(first, second\)"),
    (("a", "b"), " is a tuple, not .*Pair"),
    (np.array([1, 2]), " is a ndarray, not .*TokenIds"),
    (torch.tensor([1, 2]), " is a Tensor, not .*TokenIds"),
    ({"text": "a"}, " is a dict, not .*take the text out of it"),
    (Path("a"), " is a PosixPath, not"),
    ("a\ud800", r" has a lone surrogate, U\+D800, at character 1"),
    (Pair("a", None), ".second=None: give a str"),  # type: ignore[arg-type]
    (Pair(b"a", "b"), ".first=b'a': give a str"),  # type: ignore[arg-type]
    (Pair("a", "\udfff"), ".second has a lone surrogate"),
    (TokenIds([-100]), r".ids\[0\]=-100: give a whole number from 0 to 4294967295"),
    (TokenIds([1, 2**32]), r".ids\[1\]=4294967296: give a whole number"),
    (TokenIds([1, True]), r".ids\[1\]=True: give a whole number"),
    (TokenIds([1.0]), r".ids\[0\]=1.0: give a whole number"),  # type: ignore[list-item]
    (TokenIds(["1"]), r".ids\[0\]='1': give a whole number"),  # type: ignore[list-item]
    (TokenIds([None]), r".ids\[0\]=None: give a whole number"),  # type: ignore[list-item]
    (TokenIds([[1, 2]]), r".ids\[0\] is a list: give a whole number"),  # type: ignore[list-item]
    (TokenIds(np.array([1.0])), r".ids\[0\]=1.0: give a whole number"),
    (TokenIds(np.array([True])), r".ids\[0\]=True: give a whole number"),
    (TokenIds(np.array([[1]])), r".ids\[0\] is a list"),
    (TokenIds(5), ".ids=5: give a list of token ids"),  # type: ignore[arg-type]
    (TokenIds("12"), ".ids='12': give a list of token ids"),  # type: ignore[arg-type]
    (TokenIds({1: 2}), ".ids is a dict: give a list of token ids"),  # type: ignore[arg-type]
    (TokenIds({1}), ".ids is a set: give a list of token ids"),  # type: ignore[arg-type]
    (TokenIds(iter([1])), ".ids is a list_iterator: give a list of token ids"),  # type: ignore[arg-type]
    (TokenIds([1], type_ids=[-1]), r".type_ids\[0\]=-1: give a whole number"),
    (Words("hello world"), r".words='hello world': give a list of words, such as text.split\(\)"),
    (Words(["a", None]), r".words\[1\]=None: give a str"),  # type: ignore[list-item]
    (Words(["a", b"b"]), r".words\[1\]=b'b': give a str"),  # type: ignore[list-item]
    (Words(["\ud800"]), r".words\[0\] has a lone surrogate"),
    (Words({"a": 1}), ".words is a dict"),  # type: ignore[arg-type]
    (Words(word for word in "ab"), ".words is a generator"),  # type: ignore[arg-type]
    (Words(None), ".words=None"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_INPUTS, ids=without_address)
def test_an_input_that_is_none_is_named_by_its_number(
    client: Client, fake: FakeEncoder, wrong: Any, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=r"inputs\[2\]" + message):
        client.encode(["a", "b", wrong], tokens=True)
    with pytest.raises((TypeError, ValueError), match=r"inputs\[2\]" + message):
        client.tokenize(["a", "b", wrong])
    assert fake.calls == []


def test_what_is_as_good_as_a_list_is_taken(client: Client) -> None:
    texts = ["a", "bc"]
    for inputs in (
        tuple(texts),
        iter(texts),
        np.array(texts),
        Series(texts),
        dict(enumerate(texts)).values(),
        dict.fromkeys(texts).keys(),
    ):
        assert [result.token_count for result in client.encode(inputs, tokens=True)] == [3, 4]
    for ids in ([1, 5, 2], (1, 5, 2), range(1, 4), np.array([1, 5, 2], np.int32), torch.tensor([1, 5, 2])):
        assert client.encode(TokenIds(ids), tokens=True).token_count == 3
    assert client.encode(TokenIds([np.int64(1), 2]), tokens=True).token_count == 2
    assert client.encode(Words(np.array(["New", "York"])), tokens=True).token_count == 9
    assert client.encode(Words(Series(["New", "York"])), tokens=True).token_count == 9


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"last_hidden_state": 1}, "last_hidden_state=1: give True or False"),
    ({"last_hidden_state": [0]}, "last_hidden_state is a list"),
    ({"pooler_output": "yes"}, "pooler_output='yes': give True or False"),
    ({"tokens": 0.0}, "tokens=0.0"),
    ({"hidden_states": [1.0]}, r"hidden_states\[0\]=1.0: give a whole number"),
    ({"hidden_states": [0, True]}, r"hidden_states\[1\]=True: give a whole number"),
    ({"hidden_states": [0, "1"]}, r"hidden_states\[1\]='1'"),
    ({"hidden_states": [None]}, r"hidden_states\[0\]=None"),
    ({"hidden_states": [[0, 1]]}, r"hidden_states\[0\] is a list"),
    ({"hidden_states": [2**31]}, r"hidden_states\[0\]=2147483648: give a whole number from"),
    ({"hidden_states": "all"}, "hidden_states='all': give True for all"),
    ({"hidden_states": b"1"}, "hidden_states=b'1'"),
    ({"hidden_states": {0, 1}}, "hidden_states is a set"),
    ({"hidden_states": {0: 1}}, "hidden_states is a dict"),
    ({"hidden_states": 1.5}, "hidden_states=1.5"),
    ({"hidden_states": np.array([0.5])}, r"hidden_states\[0\]=0.5"),
    ({"hidden_states": (layer for layer in (0, 1))}, "hidden_states is a generator"),
    ({"attentions": "all"}, "attentions='all': give True for all"),
    ({"attentions": 2}, r"attentions=2: give True for all, or a list of layers such as \[2\]"),
    ({"attentions": Attentions}, "attentions is a type"),
    ({"attentions": Attentions(heads=3)}, r"attentions.heads=3: give a list .* such as \[3\]"),
    ({"attentions": Attentions(layers="0")}, "attentions.layers='0'"),
    ({"attentions": Attentions(layers=[0.0])}, r"attentions.layers\[0\]=0.0"),
    ({"attentions": Attentions(query_positions=[None])}, r"attentions.query_positions\[0\]=None"),
    ({"attentions": Attentions(mean_over_heads=2)}, "attentions.mean_over_heads=2"),
    ({"embeddings": "mean"}, r"embeddings='mean': give True, an Embedding such as"),
    ({"embeddings": {"pooling": "mean"}}, "embeddings is a dict"),
    ({"embeddings": Embedding}, "embeddings is a type"),
    ({"embeddings": [Embedding(), None]}, "embeddings="),
    ({"embeddings": (one for one in [Embedding()])}, "embeddings is a generator"),
    ({"embeddings": Embedding(layers=3)}, r"layers=3: give a list .* such as \[3\]"),
    ({"embeddings": Embedding(dimensions=-1)}, "dimensions=-1: give a whole number from 0"),
    ({"embeddings": Embedding(dimensions=True)}, "dimensions=True"),
    ({"embeddings": Embedding(dimensions=2.0)}, "dimensions=2.0"),
    ({"embeddings": Embedding(normalize="l2")}, "normalize='l2'"),
    ({"embeddings": Embedding(pooling=5)}, "pooling=5: give the name of a pooling, or a list of names"),
    ({"embeddings": Embedding(pooling=[])}, "pooling names no pooling: give None for the configured one"),
    ({"embeddings": Embedding(pooling=["mean", "median"])}, r"pooling\[1\]='median' is not known"),
    ({"embeddings": Embedding(pooling=["mean", None])}, r"pooling\[1\]=None: give the name of a pooling"),
    ({"embeddings": Embedding(pooling={"mean"})}, "pooling is a set"),
    ({"embeddings": Embedding(exclude_special_tokens=1)}, "exclude_special_tokens=1: give True or False"),
    ({"embeddings": Embedding(without_projection="no")}, "without_projection='no'"),
    ({"embeddings": Embedding(spans=Span(0, 5))}, r"spans is a Span: give a list of Span, or of \(start"),
    ({"embeddings": Embedding(spans=(0, 5))}, r"spans\[0\]=0: give a Span, or \(start, end\)"),
    ({"embeddings": Embedding(spans=[(0,)])}, r"spans\[0\] is a tuple: give a Span, or \(start, end\)"),
    ({"embeddings": Embedding(spans=["ab"])}, r"spans\[0\]='ab'"),
    ({"embeddings": Embedding(spans=[(-1, 5)])}, r"spans\[0\].start=-1: give a whole number from 0"),
    ({"embeddings": Embedding(spans=[(0, 5.0)])}, r"spans\[0\].end=5.0"),
    ({"embeddings": Embedding(spans=[Span(0, 5), Span(0, None)])}, r"spans\[1\].end=None"),
    ({"embeddings": Embedding(spans=[(0, 5, "line")])}, "unit='line' is not known"),
    ({"last_hidden_state_positions": [0]}, "last_hidden_state_positions needs last_hidden_state=True"),
    (
        {"last_hidden_state": True, "last_hidden_state_positions": []},
        "names no position: leave it out for all",
    ),
    ({"last_hidden_state": True, "last_hidden_state_positions": 0}, r"give a list .* such as \[0\]"),
    ({"last_hidden_state": True, "last_hidden_state_positions": True}, "last_hidden_state_positions=True"),
    ({"last_hidden_state": True, "last_hidden_state_positions": [0.5]}, r"_positions\[0\]=0.5"),
    ({"hidden_states": HiddenStates}, "hidden_states is a type"),
    ({"hidden_states": HiddenStates(layers=3)}, r"hidden_states.layers=3: give a list .* such as \[3\]"),
    ({"hidden_states": HiddenStates(positions="0")}, "hidden_states.positions='0'"),
    ({"hidden_states": HiddenStates(positions=[None])}, r"hidden_states.positions\[0\]=None"),
    ({"attentions": Attentions(key_positions=[1.0])}, r"attentions.key_positions\[0\]=1.0"),
    ({"attentions": Attentions(pairs=(0, 3))}, r"attentions.pairs\[0\]=0: give \(layer, head\)"),
    (
        {"attentions": Attentions(pairs=[(0, 3), (1,)])},
        r"attentions.pairs\[1\] is a tuple: give \(layer, head",
    ),
    ({"attentions": Attentions(pairs=[(0, "3")])}, r"attentions.pairs\[0\]\[1\]='3': give a whole number"),
    ({"attentions": Attentions(pairs={0: 3})}, r"attentions.pairs is a dict: give a list of \(layer, head\)"),
    ({"attentions": Attentions(pairs=[(0, 1)], heads=[1])}, "in place of layers, heads and mean_over_heads"),
    ({"attentions": Attentions(pairs=[(0, 1)], layers=[1])}, "in place of layers, heads and mean_over_heads"),
    ({"attentions": Attentions(pairs=[(0, 1)], mean_over_heads=True)}, "in place of layers, heads and mean"),
    ({"logits": 5}, r"logits=5: give True, or a Logits such as Logits\(top_k=5\)"),
    ({"logits": [0]}, "logits is a list: give True, or a Logits"),
    ({"logits": Logits}, "logits is a type"),
    ({"logits": Logits(top_k=-1)}, "logits.top_k=-1: give a whole number from 0"),
    ({"logits": Logits(top_k=True)}, "logits.top_k=True"),
    ({"logits": Logits(positions=3)}, r"logits.positions=3: give a list .* such as \[3\]"),
    (
        {"logits": Logits(activation="relu")},
        "logits.activation='relu' is not known; one of 'none', 'softmax'",
    ),
    ({"sparse": 64}, r"sparse=64: give True, or a Sparse such as Sparse\(top_k=64\)"),
    ({"sparse": Sparse(top_k=1.5)}, "sparse.top_k=1.5"),
    ({"contacts": "yes"}, "contacts='yes': give True or False"),
    ({"prompt": 5}, "prompt=5: give a str"),
    ({"prompt": "\ud800"}, "prompt has a lone surrogate"),
    (
        {"prompt": "a: ", "prompt_name": "query"},
        "prompt and prompt_name are both given: leave one of them out",
    ),
    ({"dtype": np.float16}, "dtype=.*float16.* is not known; one of 'float32'"),
    ({"dtype": ["float32"]}, r"dtype=\['float32'\] is not known"),
    ({"model": 5}, "model=5: give a str"),
    ({"model": b"bert"}, "model=b'bert': give a str"),
    ({"prompt_name": 5}, "prompt_name=5: give a str"),
    ({"model": "\ud800"}, "model has a lone surrogate"),
    ({"timeout": "5"}, "timeout='5': give seconds as a number, or None for no limit"),
    ({"timeout": 0}, "timeout=0: give seconds above 0, or None for no limit"),
    ({"timeout": -1.5}, "timeout=-1.5"),
    ({"timeout": math.nan}, "timeout=nan"),
    ({"timeout": np.float32("nan")}, "timeout=.*nan"),
    ({"timeout": True}, "timeout=True"),
    ({"timeout": [5]}, "timeout is a list"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=without_address)
async def test_an_option_is_named(
    client: Client, async_client: AsyncClient, fake: FakeEncoder, options: dict[str, Any], message: str
) -> None:
    for call in (client.encode, client.stream, async_client.stream):
        # A generator in an option is rejected without reading it.
        with pytest.raises((TypeError, ValueError), match=message):
            call(["a"], **options)
    with pytest.raises((TypeError, ValueError), match=message):
        await async_client.encode("a", **options)
    assert fake.calls == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client: client.tokenize("a", timeout="5"), "timeout='5'"),
        (lambda client: client.tokenize("a", model=3), "model=3"),
        (lambda client: client.tokenize("a", truncation=True), "truncation=True is not known"),
        (lambda client: client.tokenize("a", prompt_name=["q"]), "prompt_name is a list"),
        (
            lambda client: client.tokenize("a", without_special_tokens=1),
            "without_special_tokens=1: give True",
        ),
        (lambda client: client.rerank(None, ["a"]), "query=None: give a str"),
        (lambda client: client.rerank(Pair("q", "a"), ["a"]), "query is a Pair: give a str"),
        (lambda client: client.rerank("q", "a"), "texts='a': give a list of texts"),
        (lambda client: client.rerank("q", None), "texts=None: give a list of texts"),
        (lambda client: client.rerank("q", {"a": 1}), "texts is a dict: give a list of texts"),
        (lambda client: client.rerank("q", {"a"}), "texts is a set: give a list of texts"),
        (lambda client: client.rerank("q", ["a", None]), r"texts\[1\]=None: give a str"),
        (lambda client: client.rerank("q", ["a", b"b"]), r"texts\[1\]=b'b': give a str; bytes.decode\(\)"),
        (lambda client: client.rerank("q", ["\ud800"]), r"texts\[0\] has a lone surrogate"),
        (lambda client: client.rerank("q", ["a"], top_k=0), "top_k=0: give a whole number from 1"),
        (lambda client: client.rerank("q", ["a"], top_k="3"), "top_k='3'"),
        (lambda client: client.rerank("q", ["a"], activation="softmax"), "of a single label it is always 1"),
        (lambda client: client.rerank("q", ["a"], activation="relu"), "activation='relu': give 'sigmoid'"),
        (lambda client: client.rerank("q", ["a"], truncation=True), "truncation=True is not known"),
        (lambda client: client.rerank("q", ["a"], timeout=0), "timeout=0"),
        (lambda client: client.models(timeout=0), "timeout=0"),
        (lambda client: client.model(3), "name=3: give a str"),
        (lambda client: client.stream(["a"], ordered="no"), "ordered='no': give True or False"),
    ],
)
def test_the_other_methods(client: Client, fake: FakeEncoder, call: Callable[..., Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(client)
    assert fake.calls == []


@pytest.mark.parametrize("kind", [Client, AsyncClient, RemoteModel])
@pytest.mark.parametrize(
    ("address", "message"),
    [
        (50051, 'address=50051: give "host:port", such as "127.0.0.1:50051", or "unix:/path"'),
        (None, "address=None"),
        (b"a:1", "address=b'a:1'"),
        ("", "it has no port"),
        ("50051", "address='50051': it has no port"),
        ("localhost", "it has no port"),
        ("http://localhost:50051", "address='http://localhost:50051': give"),
    ],
)
def test_an_address_is_named(kind: Any, address: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kind(address)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": 5}, "token=5: give a str"),
        ({"token": b"secret"}, "token"),
        ({"token": ""}, "token is empty"),
        ({"token": "secret\n"}, "token is empty, or has .* line breaks"),
        ({"token": "schlüssel"}, "non-ASCII"),
        ({"timeout": "60"}, "timeout='60'"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": math.nan}, "timeout=nan"),
        ({"max_message_bytes": 0}, "max_message_bytes=0"),
        ({"max_message_bytes": -1}, "max_message_bytes=-1"),
        ({"max_message_bytes": "4M"}, "max_message_bytes='4M'"),
        ({"max_message_bytes": True}, "max_message_bytes=True"),
        ({"max_message_bytes": 1e6}, "max_message_bytes=1000000.0"),
        ({"tls": "yes"}, "tls='yes': give True, a TLS or gRPC channel credentials"),
        ({"tls": 1}, "tls=1"),
        ({"tls": Path("ca.pem")}, "tls is a PosixPath"),
    ],
)
def test_an_argument_of_a_client_is_named(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        kind(**arguments)
    assert "schlüssel" not in str(caught.value)


def test_numbers_of_numpy_are_numbers(client: Client) -> None:
    assert client.encode("ab", hidden_states=np.int64(2)).hidden_states.shape == (1, 4, HIDDEN_SIZE)
    assert client.encode("ab", hidden_states=[np.int64(2), 0]).hidden_states.shape[0] == 2
    assert client.encode("ab", hidden_states=np.array([0, -1])).hidden_states.shape[0] == 2
    assert client.encode("ab", hidden_states=np.True_).hidden_states.shape[0] == 4
    assert client.encode("ab", hidden_states=np.False_, tokens=np.True_).hidden_states is None
    assert client.encode("ab", attentions=np.int64(1)).attentions.shape[0] == 1
    chosen = Attentions(heads=np.int32(1), query_positions=range(2), mean_over_heads=np.False_)
    assert client.encode("ab", attentions=chosen).attentions.shape == (3, 1, 2, 4)
    cut = Embedding(dimensions=np.int64(3), normalize=np.True_, layers=np.array([-1]))
    assert client.encode("ab", embeddings=cut, timeout=np.float32(30)).embedding.shape == (3,)
    assert client.encode("ab", embeddings=np.True_, timeout=math.inf).embedding.shape == (HIDDEN_SIZE,)
    assert client.encode("ab", tokens=True, timeout=1e12).token_count == 4


def test_spans_may_be_tuples(client: Client) -> None:
    spans = Embedding(spans=[Span(0, 2), Span(1, 4, "token")])
    expected = client.encode("abcdef", embeddings=spans).embedding
    for given in ([(0, 2), (1, 4, "token")], [[0, 2], Span(1, 4, "token")], np.array([[0, 2], [1, 4]])):
        got = client.encode("abcdef", embeddings=Embedding(spans=given)).embedding
        np.testing.assert_array_equal(got, expected)


def test_several_messages_count_the_inputs_through(client: Client) -> None:
    inputs = [*map(str, range(100)), "poison"]
    with pytest.raises(layertap.InvalidArgument) as caught:
        client.tokenize(inputs)
    assert caught.value.violations == (("inputs[100].text", "is poison"),)
    assert caught.value.input_index == 100


LONG = "word " * 1000


async def test_a_text_that_no_message_can_hold_says_so(
    address: str, client: Client, async_client: AsyncClient, fake: FakeEncoder, monkeypatch: Any
) -> None:
    monkeypatch.setattr("layertap._unary.MAX_UNARY_BYTES", 1 << 11)
    monkeypatch.setattr("layertap._client.MAX_UNARY_BYTES", 1 << 11)
    monkeypatch.setattr("layertap._aio.MAX_UNARY_BYTES", 1 << 11)
    fake.max_message_bytes = 4096
    inputs = ["a", "b", LONG]
    message = (
        r"inputs\[2\] has 50\d\d bytes, .* 4096 \(max_message_bytes\): cut it before sending.*512 tokens"
    )
    for options in ({}, {"truncation": "end"}):
        with pytest.raises(ValueError, match=message):
            client.encode(inputs, tokens=True, **options)
        with pytest.raises(ValueError, match=message):
            list(client.stream(inputs, tokens=True, **options))
        with pytest.raises(ValueError, match=message):
            await async_client.encode(inputs, tokens=True, **options)
        with pytest.raises(ValueError, match=message):
            client.tokenize(inputs, **options)
        with pytest.raises(ValueError, match=message):
            await async_client.tokenize(inputs, **options)
    outcomes = client.encode(inputs, tokens=True, on_error="return")
    assert [isinstance(one, layertap.InvalidArgument) for one in outcomes] == [False, False, True]
    assert len(client.tokenize(["x" * 1500] * 7)) == 7
    assert max(count for rpc, count in fake.calls if rpc == "Tokenize") == 1


def test_a_closed_client_says_so(address: str) -> None:
    client = Client(address)
    client.close()
    for call in (client.models, lambda: client.encode("a"), lambda: list(client.stream(["a"], tokens=True))):
        with pytest.raises(RuntimeError, match="this Client is closed"):
            call()

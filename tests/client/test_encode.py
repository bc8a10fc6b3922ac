"""Every kind of output in every dtype, one message each way."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import layertap
from layertap import Attentions, Client, Embedding, InvalidArgument, Pair, Quantized, Span, TokenIds, Words

from . import fake_server
from .fake_server import HIDDEN_SIZE, FakeEncoder

TEXT = "让我们来看一下bert"
IDS = fake_server.token_ids(TEXT)
HIDDEN = fake_server.hidden_states(IDS)
MAPS = fake_server.attentions(IDS)


def pooled(layer: int = -1) -> np.ndarray:
    vector = HIDDEN[layer].mean(0)
    return vector / np.linalg.norm(vector)


def test_one_text_has_one_result_with_what_was_asked(client: Client) -> None:
    result = client.encode(TEXT, last_hidden_state=True)
    assert (result.token_count, result.truncated_tokens) == (len(IDS), 0)
    np.testing.assert_array_equal(result.last_hidden_state, HIDDEN[-1])
    assert result.last_hidden_state.dtype == np.float32
    assert result.pooler_output is result.hidden_states is result.attentions is result.tokens is None
    assert result.embeddings == ()
    assert result.timing == layertap.Timing(1, 2, 3, 7, 1, 9)


def test_all_outputs_at_once(client: Client) -> None:
    (result,) = client.encode(
        [TEXT],
        last_hidden_state=True,
        pooler_output=True,
        hidden_states=True,
        attentions=True,
        embeddings=[Embedding(), Embedding(layers=[0], normalize=False)],
        tokens=True,
    )
    np.testing.assert_array_equal(result.last_hidden_state, HIDDEN[-1])
    np.testing.assert_array_equal(result.pooler_output, fake_server.pooler_output(IDS))
    np.testing.assert_array_equal(result.hidden_states, HIDDEN)
    np.testing.assert_array_equal(result.attentions, MAPS)
    first, second = result.embeddings
    np.testing.assert_allclose(first, pooled(), rtol=1e-6)
    np.testing.assert_allclose(second, HIDDEN[0].mean(0), rtol=1e-6)
    assert list(result.arrays())[:6] == [
        "last_hidden_state",
        "pooler_output",
        "hidden_states",
        "attentions",
        "embeddings.0",
        "embeddings.1",
    ]
    assert f"attentions=float32(3, 2, {len(IDS)}, {len(IDS)})" in repr(result)


@pytest.mark.parametrize("layers", [[-1], [0, 2], [3, 3, -4]])
def test_chosen_hidden_states(client: Client, layers: list[int]) -> None:
    result = client.encode(TEXT, hidden_states=layers)
    np.testing.assert_array_equal(result.hidden_states, HIDDEN[layers])


def test_chosen_attentions(client: Client) -> None:
    np.testing.assert_array_equal(client.encode(TEXT, attentions=[1]).attentions, MAPS[[1]])
    chosen = Attentions(layers=[0, -1], heads=[1], query_positions=[0, -2])
    expected = MAPS[[0, -1]][:, [1]][:, :, [0, -2]]
    np.testing.assert_array_equal(client.encode(TEXT, attentions=chosen).attentions, expected)
    mean = client.encode(TEXT, attentions=Attentions(mean_over_heads=True)).attentions
    np.testing.assert_allclose(mean, MAPS.mean(1, keepdims=True), rtol=1e-6)


def test_float16_stays_and_bfloat16_widens_exactly(client: Client) -> None:
    half = client.encode(TEXT, last_hidden_state=True, dtype="float16").last_hidden_state
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, HIDDEN[-1].astype(np.float16))
    brain = client.encode(TEXT, last_hidden_state=True, dtype="bfloat16").last_hidden_state
    assert brain.dtype == np.float32
    np.testing.assert_array_equal(brain, HIDDEN[-1].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_embedding_options(client: Client) -> None:
    assert client.encode(TEXT, embeddings=True).embedding.shape == (HIDDEN_SIZE,)
    wide = client.encode(TEXT, embeddings=Embedding(layers=[1, -1], normalize=False, dimensions=5)).embedding
    expected = np.concatenate([HIDDEN[1], HIDDEN[-1]], -1).mean(0)[:5]
    np.testing.assert_allclose(wide, expected, rtol=1e-5, atol=1e-6)
    summed = Embedding(layers=[1, -1], layer_merge="sum", normalize=False)
    expected = (HIDDEN[1] + HIDDEN[-1]).mean(0)
    np.testing.assert_allclose(
        client.encode(TEXT, embeddings=summed).embedding, expected, rtol=1e-5, atol=1e-6
    )
    spans = Embedding(spans=[Span(0, 2), Span(1, 4, "token")], normalize=False, encoding="float16")
    vectors = client.encode(TEXT, embeddings=spans).embedding
    assert vectors.dtype == np.float16
    expected = np.stack([HIDDEN[-1][0:2].mean(0), HIDDEN[-1][1:4].mean(0)])
    np.testing.assert_allclose(vectors, expected, rtol=1e-3, atol=1e-3)


def test_int8_comes_with_its_scales(client: Client) -> None:
    vector = client.encode(TEXT, embeddings=Embedding(encoding="int8")).embedding
    assert isinstance(vector, Quantized)
    assert (vector.values.dtype, vector.values.shape, vector.scale.shape) == (np.int8, (HIDDEN_SIZE,), ())
    np.testing.assert_allclose(vector.dequantize(), pooled(), atol=0.01)
    assert vector.dequantize().dtype == np.float32
    spans = Embedding(encoding="int8", spans=[Span(0, 2), Span(1, 4)])
    vectors = client.encode(TEXT, embeddings=spans).embedding
    assert isinstance(vectors, Quantized)
    assert (vectors.values.shape, vectors.scale.shape) == ((2, HIDDEN_SIZE), (2,))
    assert vectors.dequantize().shape == (2, HIDDEN_SIZE)


def test_binary_unpacks_to_signs(client: Client) -> None:
    vector = client.encode(TEXT, embeddings=Embedding(encoding="binary")).embedding
    assert (vector.dtype, vector.shape) == (np.uint8, (1,))
    np.testing.assert_array_equal(np.unpackbits(vector, count=HIDDEN_SIZE), pooled() > 0)


def test_embedding_is_the_only_one(client: Client) -> None:
    with pytest.raises(ValueError, match="0 embeddings"):
        _ = client.encode("a", last_hidden_state=True).embedding
    with pytest.raises(ValueError, match="2 embeddings"):
        _ = client.encode("a", embeddings=[Embedding(), Embedding()]).embedding


def test_every_kind_of_input(client: Client) -> None:
    inputs = ["ab", Pair("a", "b"), TokenIds([101, 102]), TokenIds(np.array([7])), Words(["New", "York"])]
    results = client.encode(inputs, last_hidden_state=True)
    expected = [
        fake_server.token_ids("ab"),
        [*fake_server.token_ids("a"), *fake_server.token_ids("b")[1:]],
        [101, 102],
        [7],
        fake_server.token_ids("NewYork"),
    ]
    for result, ids in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result.last_hidden_state, fake_server.hidden_states(ids)[-1])
    assert client.encode(TokenIds([101], type_ids=[1]), last_hidden_state=True).token_count == 1
    assert [result.token_count for result in client.encode(iter(["a", "bc"]), tokens=True)] == [3, 4]


def test_no_inputs_need_no_server() -> None:
    with Client("127.0.0.1:1") as client:
        assert client.encode([], last_hidden_state=True) == []
        assert client.tokenize([]) == []


def test_options_reach_the_server(client: Client) -> None:
    result = client.encode(
        "a", tokens=True, truncation="start", prompt_name="query", priority="low", model="plain"
    )
    assert result.truncated_tokens == 3  # the fake answers with the number of TRUNCATION_START
    with pytest.raises(InvalidArgument, match="max_tokens 7"):  # and refuses any limit, by its number
        client.encode("a", tokens=True, max_tokens=7)
    with pytest.raises(InvalidArgument, match="max_tokens 7"):
        next(iter(client.stream(["a"], tokens=True, max_tokens=7)))


def test_tokens(client: Client, fake: FakeEncoder, address: str) -> None:
    tokens = client.tokenize("ab")
    np.testing.assert_array_equal(tokens.ids, fake_server.token_ids("ab"))
    assert tokens.tokens == ("[CLS]", "t107", "t108", "[SEP]")
    assert len(tokens) == 4
    np.testing.assert_array_equal(tokens.starts, [0, 0, 1, 0])
    np.testing.assert_array_equal(tokens.ends, [0, 1, 2, 0])
    np.testing.assert_array_equal(tokens.special, [True, False, False, True])
    np.testing.assert_array_equal(tokens.word_ids, [-1, 0, 1, -1])
    np.testing.assert_array_equal(tokens.sequence_ids, [-1, 0, 0, -1])
    np.testing.assert_array_equal(tokens.type_ids, [0, 0, 0, 0])
    result = client.encode("ab", tokens=True)
    assert result.tokens is not None
    assert result.tokens.tokens == tokens.tokens
    fake.max_inputs = 3
    with Client(address) as other:
        many = other.tokenize([str(number) for number in range(8)])
    assert [one.tokens[1] for one in many] == [f"t{58 + number}" for number in range(8)]
    assert [call for call in fake.calls if call[0] == "Tokenize"][1:] == [("Tokenize", n) for n in (3, 3, 2)]


def test_models(client: Client) -> None:
    fake, plain = client.models()
    assert fake == client.model() == client.model("fake")
    assert (fake.name, fake.num_layers, fake.default_pooling, fake.compute_dtype) == (
        "fake",
        3,
        "mean",
        "float32",
    )
    assert fake.prompts == {"query": "query: "}
    assert fake.limits == layertap.ModelLimits(1024, 4 << 20, 1 << 30)
    assert (plain.has_pooler, plain.has_attentions) == (False, False)
    assert (fake.embedding_unsupported, plain.embedding_unsupported) == ("", "its Whitening is not known")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"embeddings": Embedding(pooling="median")},
            "pooling='median' is not known; one of 'mean', 'cls', 'max'",
        ),
        ({"embeddings": Embedding(encoding="int4")}, "encoding='int4'"),
        ({"embeddings": Embedding(layer_merge="max")}, "layer_merge='max'"),
        ({"embeddings": Embedding(spans=[Span(0, 1, "line")])}, "unit='line'"),
        ({"embeddings": ["mean"]}, "embeddings="),
        ({"dtype": "int8"}, "dtype='int8' is not known; one of 'float32', 'float16', 'bfloat16'"),
        ({"truncation": True}, "truncation=True"),
        ({"priority": "urgent"}, "priority='urgent'"),
        ({"hidden_states": 3}, r"hidden_states=3: give True for all, or a list of layers such as \[3\]"),
        ({"hidden_states": []}, "hidden_states names no layer"),
        ({"attentions": []}, "attentions names no layer"),
    ],
)
def test_misuse_names_the_argument(client: Client, fake: FakeEncoder, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client.encode("a", **options)
    with pytest.raises(ValueError, match=message):
        client.stream(["a"], **options)
    assert fake.calls == []


def test_misuse_of_inputs(client: Client) -> None:
    with pytest.raises(TypeError, match=r"inputs\[1\] is a int, not a str, Pair, TokenIds or Words"):
        client.encode(["a", 3], tokens=True)
    with pytest.raises(TypeError, match="pooling_output"):
        client.encode("a", pooling_output=True)
    with pytest.raises(ValueError, match=r"-1|range"):
        client.encode(TokenIds([-1]), tokens=True)

"""`embed`: one array of the embeddings of all inputs."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from layertap import AsyncClient, Client, InvalidArgument, Pair, TokenIds

from .fake_server import FakeEncoder

TEXTS = ["ab", "", "ünïcode", *map(str, range(400))]


def stacked(client: Client, texts: list[Any], **options: Any) -> np.ndarray:
    from layertap import Embedding

    return np.stack([one.embedding for one in client.encode(texts, embeddings=Embedding(**options))])


@pytest.mark.parametrize("sends_whole", [True, False])
@pytest.mark.parametrize("count", [1, 3, len(TEXTS)])
def test_rows_are_the_embeddings_in_order(
    client: Client, fake: FakeEncoder, count: int, sends_whole: bool
) -> None:
    fake.sends_whole = sends_whole
    texts = TEXTS[:count]
    array = client.embed(iter(texts))
    assert (array.shape, array.dtype) == ((count, 4), np.float32)
    np.testing.assert_array_equal(array, stacked(client, texts))
    array[0] = 0  # it may be changed


def test_one_input_gives_one_vector(client: Client) -> None:
    assert client.embed("ab").shape == (4,)
    np.testing.assert_array_equal(client.embed("ab"), client.embed(["ab"])[0])
    assert client.embed(Pair("a", "b")).shape == (4,)
    assert client.embed([TokenIds([1, 20, 2]), Pair("a", "b")]).shape == (2, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": False},
        {"normalize": True, "dimensions": 3},
        {"pooling": "max", "layers": [0, -1], "layer_merge": "sum"},
        {"pooling": ["mean", "max"], "exclude_special_tokens": True},
        {"without_projection": True},
        {"encoding": "float16"},
        {"encoding": "binary"},
        {"encoding": "bfloat16"},
    ],
)
def test_options(client: Client, options: dict[str, Any]) -> None:
    texts = [text for text in TEXTS[:5] if text]
    expected = stacked(client, texts, **options)
    array = client.embed(texts, **options)
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)
    prompted = client.embed("a", prompt="to: ", **options)
    assert not np.array_equal(prompted, client.embed("a", **options))


def test_int8_is_dequantized(client: Client) -> None:
    array = client.embed(TEXTS[:5], encoding="int8")
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, client.embed(TEXTS[:5]), atol=0.01)
    assert not np.array_equal(array, client.embed(TEXTS[:5]))


def test_torch(client: Client) -> None:
    tensor = client.embed(["a", "b"], convert_to="torch")
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), client.embed(["a", "b"]))
    assert client.embed("a", convert_to="torch").shape == (4,)
    with pytest.raises(ValueError, match="convert_to='jax': give 'numpy' or 'torch'"):
        client.embed("a", convert_to="jax")  # type: ignore[call-overload]


def test_no_inputs(client: Client) -> None:
    assert client.embed([]).shape == (0, 0)
    assert client.embed([], model="protein").shape == (0, 4)
    assert client.embed([], model="protein", dimensions=3).shape == (0, 3)
    assert client.embed([], model="protein", pooling="max").shape == (0, 0)
    assert client.embed([], convert_to="torch").shape == (0, 0)


def test_errors(client: Client) -> None:
    with pytest.raises(InvalidArgument) as raised:
        client.embed([*TEXTS, "poison"])
    assert raised.value.input_index == len(TEXTS)
    with pytest.raises(ValueError, match="pooling='none': it gives a vector for each token"):
        client.embed("a", pooling="none")
    with pytest.raises(ValueError, match="pooling='none'"):
        client.embed("a", pooling=["mean", "none"])
    with pytest.raises(TypeError, match=r"inputs\[1\] is a int"):
        client.embed(["a", 1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="show_progress_bar"):
        client.embed(["a"], show_progress_bar="yes")  # type: ignore[call-overload]


def test_a_progress_bar(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.embed(TEXTS)
    assert capsys.readouterr() == ("", "")
    client.embed(TEXTS, show_progress_bar=True)
    shown = capsys.readouterr()
    assert f"{len(TEXTS)}/{len(TEXTS)}" in shown.err
    assert shown.out == ""


def test_without_tqdm_or_torch(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="show_progress_bar=True needs tqdm: pip install tqdm"):
        client.embed(["a"], show_progress_bar=True)
    with pytest.raises(ModuleNotFoundError, match='convert_to="torch" needs torch: pip install torch'):
        client.embed("a", convert_to="torch")
    assert client.embed("a").shape == (4,)


async def test_async(async_client: AsyncClient, client: Client) -> None:
    np.testing.assert_array_equal(await async_client.embed(TEXTS), client.embed(TEXTS))
    assert (await async_client.embed("a", dimensions=2)).shape == (2,)
    assert (await async_client.embed([], model="protein")).shape == (0, 4)
    assert isinstance(await async_client.embed("a", convert_to="torch"), torch.Tensor)

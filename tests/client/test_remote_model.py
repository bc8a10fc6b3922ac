"""RemoteModel: the keys, shapes and places of `transformers` outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import layertap
from layertap import Client, ModelOutput, Pair, RemoteModel

from . import fake_server
from .fake_server import HIDDEN_SIZE, NUM_HEADS, NUM_LAYERS, FakeEncoder, token_ids

ROWS = [token_ids("ab"), token_ids("a"), token_ids("abcd")]
LENGTH = max(map(len, ROWS))
ALL = {"output_hidden_states": True, "output_attentions": True}


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    """(B, T) ids and mask of ROWS."""
    ids, mask = np.zeros((len(ROWS), LENGTH), np.int64), np.zeros((len(ROWS), LENGTH), np.int64)
    for index, row in enumerate(ROWS):
        cut = slice(0, len(row)) if side == "right" else slice(LENGTH - len(row), LENGTH)
        ids[index, cut], mask[index, cut] = row, 1
    return ids, mask


@pytest.fixture
def model(client: Client) -> RemoteModel:
    return RemoteModel(client)


def assert_right(output: Any, side: str) -> None:
    assert list(output.keys()) == ["last_hidden_state", "pooler_output", "hidden_states", "attentions"]
    assert tuple(output.last_hidden_state.shape) == (3, LENGTH, HIDDEN_SIZE)
    assert tuple(output.pooler_output.shape) == (3, HIDDEN_SIZE)
    assert [tuple(one.shape) for one in output.hidden_states] == [(3, LENGTH, HIDDEN_SIZE)] * (NUM_LAYERS + 1)
    assert [tuple(one.shape) for one in output.attentions] == [(3, NUM_HEADS, LENGTH, LENGTH)] * NUM_LAYERS
    for index, ids in enumerate(ROWS):
        start = 0 if side == "right" else LENGTH - len(ids)
        cut = slice(start, start + len(ids))
        states = np.zeros((NUM_LAYERS + 1, LENGTH, HIDDEN_SIZE), np.float32)
        states[:, cut] = fake_server.hidden_states(ids)
        maps = np.zeros((NUM_LAYERS, NUM_HEADS, LENGTH, LENGTH), np.float32)
        maps[:, :, cut, cut] = fake_server.attentions(ids)
        np.testing.assert_array_equal(output.last_hidden_state[index], states[-1])
        np.testing.assert_array_equal(output.pooler_output[index], fake_server.pooler_output(ids))
        np.testing.assert_array_equal([one[index] for one in output.hidden_states], states)
        np.testing.assert_array_equal([one[index] for one in output.attentions], maps)


@pytest.mark.parametrize("side", ["right", "left"])
def test_numpy(model: RemoteModel, side: str) -> None:
    ids, mask = padded(side)
    output = model(input_ids=ids, attention_mask=mask, token_type_ids=np.zeros_like(ids), **ALL)
    assert isinstance(output.last_hidden_state, np.ndarray)
    assert_right(output, side)


@pytest.mark.parametrize("side", ["right", "left"])
def test_torch(model: RemoteModel, side: str) -> None:
    ids, mask = map(torch.from_numpy, padded(side))
    output = model(input_ids=ids, attention_mask=mask, **ALL)
    assert all(isinstance(one, torch.Tensor) for one in (output[0], output[1], *output[2], *output[3]))
    assert output.last_hidden_state.device == ids.device
    assert_right(output, side)
    assert isinstance(model(ids, mask.bool(), return_tensors="np")[0], np.ndarray)


def test_texts(model: RemoteModel) -> None:
    assert_right(model(["ab", "a", "abcd"], **ALL), "right")
    assert isinstance(model("ab", return_tensors="pt").last_hidden_state, torch.Tensor)
    assert model("ab").last_hidden_state.shape == (1, 4, HIDDEN_SIZE)
    assert model([Pair("a", "b")]).last_hidden_state.shape == (1, 5, HIDDEN_SIZE)


def test_without_a_mask_every_position_is_a_token(model: RemoteModel) -> None:
    ids, _ = padded("right")
    states = model(ids).last_hidden_state
    np.testing.assert_array_equal(states[1], fake_server.hidden_states(ids[1].tolist())[-1])


def test_output_works_as_that_of_transformers(model: RemoteModel) -> None:
    ours = model("ab", return_tensors="pt", **ALL)
    theirs = BaseModelOutputWithPooling(**ours)
    assert list(ours) == list(ours.keys()) == list(theirs.keys())
    assert len(ours) == len(theirs)
    assert all(one is other for one, other in zip(ours.to_tuple(), theirs.to_tuple(), strict=True))
    assert all(one is other for one, other in zip(ours[:2], theirs[:2], strict=True))
    assert ours["last_hidden_state"] is ours[0] is ours.last_hidden_state
    assert ours[-1] is ours.attentions
    assert "attentions" in ours
    plain = model("ab")
    assert list(plain) == ["last_hidden_state", "pooler_output"]
    assert plain.attentions is None
    with pytest.raises(AttributeError, match="logits"):
        _ = plain.logits
    with pytest.raises(KeyError):
        _ = plain["attentions"]
    states, pooled = model("ab", return_dict=False)
    assert (states.shape, pooled.shape) == ((1, 4, HIDDEN_SIZE), (1, HIDDEN_SIZE))


def test_a_model_without_a_pooler_or_attentions(client: Client) -> None:
    model = RemoteModel(client, "plain")
    output = model("ab", output_hidden_states=True)
    assert list(output) == ["last_hidden_state", "hidden_states"]
    assert output.pooler_output is None
    with pytest.raises(layertap.FailedPrecondition):
        model("ab", output_attentions=True)


def test_dtype(client: Client) -> None:
    assert RemoteModel(client, dtype="float16")("ab").last_hidden_state.dtype == np.float16
    assert RemoteModel(client, dtype="bfloat16", return_tensors="pt")("ab")[0].dtype == torch.float32


def test_config_and_the_manners_of_a_torch_model(address: str, fake: FakeEncoder) -> None:
    with RemoteModel(address) as model:
        config = model.config
        assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("bert", 4, 3)
        assert (config.num_attention_heads, config.vocab_size) == (2, 1010)
        assert model.eval().to("cpu").to(torch.device("cpu")) is model
        with pytest.raises(TypeError, match="dtype"):
            model.to(torch.float16)
        model("a")
        model("a")
    assert [rpc for rpc, _ in fake.calls].count("GetModel") == 1


def test_a_given_client_stays_open(client: Client) -> None:
    with RemoteModel(client) as model:
        assert isinstance(model("a"), ModelOutput)
    assert client.encode("a", tokens=True).token_count == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 5, 2]], [[1, 0, 1]]), "row 0 of attention_mask has a hole"),
        (([[1, 2], [1, 2]], [[1, 1], [0, 0]]), "row 1 of attention_mask has no token"),
        (([[1, 2]], [[1, 1, 1]]), r"attention_mask has the shape \(1, 3\), and input_ids \(1, 2\)"),
        (([[1, 2]], None, [[0]]), "token_type_ids has the shape"),
        (([1, 2],), "input_ids is an array of numbers of shape"),
        (([],), "input_ids is an array"),
        ((np.zeros((0, 3)),), "input_ids is an array"),
        (("text", [[1]]), "go with input_ids, not with texts"),
    ],
)
def test_misuse(model: RemoteModel, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(*arguments)

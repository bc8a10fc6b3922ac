"""RemoteModel: the keys, shapes and places of `transformers` outputs."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

import layertap
from layertap import Client, ModelOutput, Pair, RemoteModel, TokenIds

from . import fake_heads, fake_server
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
    with pytest.raises(AttributeError, match="no 'logits': call the model with output_logits=True"):
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
        (([1, 2],), "input_ids must be an array of integers of shape"),
        (([],), "input_ids must be an array"),
        ((np.zeros((0, 3)),), "input_ids must be an array"),
        (("text", [[1]]), "go with input_ids, not with texts"),
    ],
)
def test_misuse(model: RemoteModel, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(*arguments)


TEXT = "让我们来看一下bert的输出都有哪些"


def test_the_script_that_people_learn_from(address: str) -> None:
    # One line differs: where the model comes from.
    model = RemoteModel.from_pretrained(
        "fake", address=address, output_hidden_states=True, output_attentions=True
    )
    input_ids = torch.tensor([token_ids(TEXT)])
    outputs = model(input_ids)
    num_tokens = input_ids.shape[1]
    assert len(outputs) == 4
    assert outputs[0].shape == (1, num_tokens, HIDDEN_SIZE)
    assert outputs[1].shape == (1, HIDDEN_SIZE)
    assert outputs.last_hidden_state is outputs[0]
    all_hidden_states, all_attentions = model(input_ids)[-2:]
    assert len(all_hidden_states) == NUM_LAYERS + 1
    assert len(all_attentions) == NUM_LAYERS
    assert torch.equal(all_hidden_states[-1], outputs.last_hidden_state)
    assert all_attentions[0].shape == (1, NUM_HEADS, num_tokens, num_tokens)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model.forward(input_ids=input_ids)[0], outputs[0])
    assert outputs.past_key_values is None
    model.close()


def test_what_calls_do_that_do_not_say(client: Client) -> None:
    model = RemoteModel(client, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert len(model("ab")) == 4
    assert list(model("ab", return_dict=True, output_attentions=False)) == [
        "last_hidden_state",
        "pooler_output",
        "hidden_states",
    ]
    config = model.config
    assert (config.output_hidden_states, config.output_attentions, config.use_return_dict) == (
        True,
        True,
        False,
    )
    config.output_attentions, config.return_dict = False, True
    assert list(model("ab")) == ["last_hidden_state", "pooler_output", "hidden_states"]
    model.config.output_hidden_states = False
    assert list(model("ab")) == ["last_hidden_state", "pooler_output"]
    assert list(model("ab", output_attentions=True))[-1] == "attentions"


def test_from_pretrained_finds_out_at_once(address: str, client: Client) -> None:
    with pytest.raises(layertap.NotFound, match="no model named 'nobody'"):
        RemoteModel.from_pretrained("nobody", address=address)
    with pytest.raises(layertap.NotFound):
        RemoteModel.from_pretrained("nobody", address=client)
    with RemoteModel.from_pretrained(address=client) as model:
        assert model.config.name_or_path == model.name_or_path == "fake"
    assert client.model().name == "fake"
    with pytest.raises(TypeError, match="device_map"):
        RemoteModel.from_pretrained("fake", address=address, device_map="auto")  # type: ignore[call-arg]


def test_config(client: Client, fake: FakeEncoder) -> None:
    config = RemoteModel(client).config
    assert config.max_position_embeddings == 512
    assert config.name_or_path == "fake"
    fake.pad_token = "[PAD]"
    assert config.pad_token_id == fake_server.PAD
    assert config.pad_token_id == fake_server.PAD
    assert [rpc for rpc, _ in fake.calls].count("Tokenize") == 1
    assert config.to_dict()["hidden_size"] == HIDDEN_SIZE
    assert "hidden_size=4" in repr(config)
    for name in ("intermediate_size", "id2label", "_attn_implementation"):
        with pytest.raises(AttributeError, match=f"config.{name}: the server does not report"):
            getattr(config, name)
    for name in ("hidden_size", "pad_token_id", "anything"):
        with pytest.raises(AttributeError, match=f"config.{name} cannot be set"):
            setattr(config, name, 3)
    with pytest.raises(TypeError, match="output_attentions='yes'"):
        config.output_attentions = "yes"  # type: ignore[assignment]


def test_a_pad_token_that_is_not_known_is_no_number(client: Client) -> None:
    config = RemoteModel(client).config
    assert not hasattr(config, "pad_token_id")
    with pytest.raises(AttributeError, match="use the tokenizer's pad_token_id"):
        _ = config.pad_token_id


def test_device_and_dtype(client: Client) -> None:
    model = RemoteModel(client)
    assert model.device == torch.device("cpu")
    assert model.dtype is torch.float32
    assert model.cpu().to("cpu", torch.float32).to(dtype=torch.float32).to(torch.zeros(1)) is model
    assert RemoteModel(client, dtype="float16").dtype is torch.float16
    assert RemoteModel(client, dtype="bfloat16").dtype is torch.float32
    assert model.to("meta").device == torch.device("meta")
    assert model("ab", return_tensors="pt")[0].device.type == "meta"
    assert model(torch.tensor([[1, 2]]))[0].device.type == "cpu", "where the tensors are"
    assert model.cuda().device == torch.device("cuda")
    assert model.cuda(1).device == model.to(1).device == torch.device("cuda", 1)
    for call in (lambda: model.to(dtype=torch.float16), lambda: model.to("cpu", torch.bfloat16)):
        with pytest.raises(TypeError, match="dtype"):
            call()
    with pytest.raises(TypeError, match="give a device"):
        model.to(1.5)
    with pytest.raises(RuntimeError, match="gpu"):
        model.to("gpu")
    assert model.device == torch.device("cuda", 1)


def test_without_torch_the_device_is_a_name(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    model = RemoteModel(client)
    assert model.to("cuda:0").device == "cuda:0"
    assert model.dtype == np.float32


def test_the_modes_of_a_model(client: Client) -> None:
    model = RemoteModel(client)
    assert model.train(False) is model.eval() is model.requires_grad_(False) is model
    assert model.training is False
    with pytest.raises(NotImplementedError, match=r"train\(True\)"):
        model.train()
    with pytest.raises(NotImplementedError, match=r"requires_grad_\(True\)"):
        model.requires_grad_()
    for name in ("parameters", "state_dict", "encoder", "half"):
        with pytest.raises(
            AttributeError, match=f"no '{name}': the weights and layers .* stay on its server"
        ):
            getattr(model, name)


IDS = [[1, 5, 2], [1, 2, 0]]
MASK = [[1, 1, 1], [1, 1, 0]]


def test_arguments_of_transformers(client: Client) -> None:
    model = RemoteModel(client)
    expected = model(IDS, MASK).last_hidden_state
    others = {"inputs_embeds": None, "head_mask": None, "past_key_values": None, "use_cache": False}
    for positions in (
        None,
        [[0, 1, 2]],
        [[0, 1, 2], [0, 1, 7]],
        torch.arange(3)[None],
        np.array([[0, 1, 2]]),
    ):
        states = model(IDS, MASK, None, positions, **others).last_hidden_state
        np.testing.assert_array_equal(states, expected)
    left = model([[0, 1, 2]], [[0, 1, 1]], position_ids=[[0, 0, 1]]).last_hidden_state
    np.testing.assert_array_equal(left[0, 1:], expected[1, :2])
    for positions in ([[1, 2, 3]], [[0, 1, 1]], [[0, 0, 0], [0, 1, 2]]):
        with pytest.raises(ValueError, match="position_ids: the server counts positions itself"):
            model(IDS, MASK, position_ids=positions)
    with pytest.raises(ValueError, match="position_ids has the shape"):
        model(IDS, MASK, position_ids=[[0, 1]])
    with pytest.raises(ValueError, match="position_ids"):
        model("ab", position_ids=[[0, 1, 2, 3]])
    for name in ("inputs_embeds", "head_mask", "encoder_hidden_states", "past_key_values", "use_cache"):
        with pytest.raises(TypeError, match=f"{name}: not supported by a served model"):
            model(IDS, **{name: [[1]]})
    assert model(IDS, labels=None).loss is None
    with pytest.raises(TypeError, match="labels: not supported by a served model"):
        model(IDS, labels=[0])
    with pytest.raises(TypeError, match="label: a served model has no such argument"):
        model(IDS, label=None)


def test_positions_that_are_counted_from_elsewhere(client: Client, fake: FakeEncoder) -> None:
    fake.architecture = "roberta"
    with pytest.raises(ValueError, match="position_ids: the server counts positions itself"):
        RemoteModel(client)(IDS, MASK, position_ids=[[0, 1, 2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids is None: give an array of shape"),
        (
            {"input_ids": {"input_ids": IDS}},
            r"input_ids is a dict: give its parts, as in model\(\*\*inputs\)",
        ),
        ({"input_ids": [[1.5, 2.0]]}, "input_ids must be an array of integers .*, not float64"),
        ({"input_ids": [[True, False]]}, "input_ids must be an array of integers .*, not bool"),
        ({"input_ids": [[1, -100]]}, r"input_ids\[0, 1\] is -100, which is not an id"),
        ({"input_ids": IDS, "token_type_ids": [[0, 0, 0], [0, -1, 0]]}, r"token_type_ids\[1, 1\] is -1"),
        (
            {"input_ids": IDS, "token_type_ids": [[0.0] * 3] * 2},
            "token_type_ids must be an array of integers",
        ),
        ({"input_ids": IDS, "attention_mask": [[0, -1e4, 1]] * 2}, "values other than 0 and 1"),
        ({"input_ids": IDS, "attention_mask": [[2, 2, 2]] * 2}, "values other than 0 and 1"),
        ({"input_ids": ["a", None]}, r"inputs\[1\] is a NoneType"),
        ({"input_ids": IDS, "return_tensors": "tf"}, "return_tensors='tf': give 'np', 'pt' or None"),
        ({"input_ids": IDS, "output_attentions": "yes"}, "output_attentions='yes': give True or False"),
    ],
)
def test_what_cannot_be_honoured_is_named(client: Client, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RemoteModel(client)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float64"}, "dtype='float64' is not known"),
        ({"return_tensors": "tf"}, "return_tensors='tf'"),
        ({"output_attentions": "yes"}, "output_attentions='yes'"),
        ({"output_logits": 1}, "output_logits=1: give True or False"),
        ({"timeout": 0}, "timeout=0"),
        ({"model": 5}, "model=5"),
    ],
)
def test_arguments_of_the_constructor(client: Client, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RemoteModel(client, **arguments)


def test_padded_places_may_hold_anything(client: Client) -> None:
    model = RemoteModel(client)
    given = model([[1, 5, 2], [1, 2, -100]], MASK).last_hidden_state
    np.testing.assert_array_equal(given, model(IDS, MASK).last_hidden_state)
    assert model(TokenIds([1, 2])).last_hidden_state.shape == (1, 2, HIDDEN_SIZE)
    assert model(np.array(["ab", "a"])).last_hidden_state.shape == (2, 4, HIDDEN_SIZE)


# ------------------------------------------------------------------------------- models with a head


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_classifier_is_its_own_class(client: Client, side: str) -> None:
    ids, mask = map(torch.from_numpy, padded(side))
    model = RemoteModel(client, "classifier")
    output = model(ids, mask, **ALL)
    assert (
        list(output) == list(SequenceClassifierOutput(**output)) == ["logits", "hidden_states", "attentions"]
    )
    assert output[0] is output.logits
    assert output.loss is None
    np.testing.assert_array_equal(output.logits, [fake_heads.scores("classifier", row) for row in ROWS])
    assert output.hidden_states[-1].shape == (3, LENGTH, HIDDEN_SIZE)
    assert model.config.num_labels == 3
    assert model.config.id2label[int(model("ab").logits.argmax(-1)[0])] in ("no", "maybe", "yes")
    assert model.config.label2id == {"no": 0, "maybe": 1, "yes": 2}


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_logits_of_tokens_are_padded(client: Client, side: str) -> None:
    ids, mask = padded(side)
    logits = RemoteModel(client, "tagger")(ids, mask).logits
    expected = np.zeros((3, LENGTH, 4), np.float32)
    for index, row in enumerate(ROWS):
        start = 0 if side == "right" else LENGTH - len(row)
        expected[index, start : start + len(row)] = fake_heads.scores("tagger", row)
    np.testing.assert_array_equal(logits, expected)


def test_logits_over_a_vocabulary_are_sent_on_request(client: Client) -> None:
    model = RemoteModel(client, "splade")
    assert list(model("ab")) == ["last_hidden_state", "pooler_output"]
    output = model("ab", output_logits=True)
    assert list(output) == ["logits"]
    np.testing.assert_array_equal(output.logits[0], fake_heads.scores("splade", token_ids("ab")))
    assert list(RemoteModel(client, "splade", output_logits=True)("ab")) == ["logits"]
    assert not hasattr(model.config, "id2label")


def test_output_logits_chooses_the_class(client: Client, address: str) -> None:
    model = RemoteModel(client, "classifier", output_logits=False)
    assert list(model("ab")) == ["last_hidden_state", "pooler_output"]
    assert list(model("ab", output_logits=True)) == ["logits"]
    model.config.output_logits = True
    output = model("ab")
    assert list(output) == ["logits"]
    assert output.attentions is None
    for name in ("last_hidden_state", "pooler_output"):
        with pytest.raises(AttributeError, match=f"no '{name}': call the model with output_logits=False"):
            getattr(output, name)
    with RemoteModel.from_pretrained("classifier", address=address, output_logits=False) as other:
        assert other.config.output_logits is False
    with pytest.raises(layertap.FailedPrecondition):
        RemoteModel(client)("ab", output_logits=True)
    with pytest.raises(TypeError, match="output_logits='yes'"):
        model("ab", output_logits="yes")  # type: ignore[arg-type]


def test_what_is_not_wanted_is_not_requested(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    encode = client.encode
    monkeypatch.setattr(
        client, "encode", lambda inputs, **options: asked.append(options) or encode(inputs, **options)
    )
    for name in ("classifier", "splade", "fake"):
        RemoteModel(client, name)("ab")
    wanted = [{name for name, value in options.items() if value is True} for options in asked]
    assert wanted == [
        {"logits"},
        {"last_hidden_state", "pooler_output"},
        {"last_hidden_state", "pooler_output"},
    ]

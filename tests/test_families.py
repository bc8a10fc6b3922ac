"""The tiny models are what the parity tests take them for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from families import EXAMPLE, FAMILIES, HIDDEN_SIZE, MAX_TOKENS, NUM_HEADS, NUM_LAYERS, build, sentences

TEXT = " ".join(sentences()[7].split()[:18])


@pytest.fixture(scope="module", params=list(FAMILIES))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder)
    return request.param, folder


def test_loads_whole_and_attends_unevenly(built: tuple[str, Path]) -> None:
    name, folder = built
    family = FAMILIES[name]
    model, loading = family.model_class.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert AutoConfig.from_pretrained(folder).model_type == family.model_type
    model.eval()

    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    assert ("pooler_output" in output) == family.has_pooler
    hidden_states = torch.cat(output.hidden_states)
    maps = torch.cat(output.attentions)
    assert hidden_states.shape == (NUM_LAYERS + 1, 24, HIDDEN_SIZE)
    assert maps.shape == (NUM_LAYERS, NUM_HEADS, 24, 24)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    # Different weights in each layer, so that a wrong map or layer is noticed.
    assert (maps.amax(-1).mean((1, 2)) > 1.4 / 24).all()
    assert min((maps[i] - maps[j]).abs().max() for i in range(4) for j in range(i)) > 0.05
    assert min((hidden_states[i] - hidden_states[j]).abs().max() for i in range(5) for j in range(i)) > 0.05


def test_modernbert_has_local_and_global_layers(tmp_path: Path) -> None:
    build("modernbert", tmp_path)
    model = FAMILIES["modernbert"].model_class.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        maps = model(input_ids=torch.arange(5, 45)[None], output_attentions=True).attentions
    far = np.abs(np.subtract.outer(np.arange(40), np.arange(40))) > 8
    assert [bool((layer[0, :, far] == 0).all()) for layer in maps] == [False, True, True, False]


def test_tokenizer_knows_its_text(built: tuple[str, Path]) -> None:
    name, folder = built
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == MAX_TOKENS
    text = "MKTAYIAKQRQISFVK" if FAMILIES[name].model_type == "esm" else TEXT + EXAMPLE
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 16
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    assert len(set(ids)) > 10
    assert set(tokenizer("")["input_ids"]) <= set(tokenizer.all_special_ids)
    assert FAMILIES[name].mask in tokenizer.all_special_tokens
    assert (
        tokenizer.convert_tokens_to_ids(FAMILIES[name].mask)
        in tokenizer(f"{text} {FAMILIES[name].mask}")["input_ids"]
    )
    assert max(tokenizer(text, text)["input_ids"]) < len(tokenizer) == tokenizer.vocab_size
    types = tokenizer(text, text).get("token_type_ids")
    assert FAMILIES[name].uses_type_ids <= (types is not None and set(types) == {0, 1})


def test_building_is_repeatable(tmp_path: Path) -> None:
    for name in ("bert", "albert"):
        build(name, tmp_path / "one" / name)
        build(name, tmp_path / "two" / name)
        one, two = (load_file(tmp_path / which / name / "model.safetensors") for which in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)

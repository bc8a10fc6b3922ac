"""The example that must always work: a 12-layer BERT, all it has inside, through `RemoteModel`."""

import copy
from pathlib import Path

import pytest
import torch
from reference import assert_close
from transformers import AutoConfig, AutoModel, AutoTokenizer

import layertap

TEXT = "让我们来看一下bert的输出都有哪些"


@pytest.mark.long
@pytest.mark.parametrize("give", ["text", "tokens"])
def test_the_example(example_server: str, example_folder: Path, give: str) -> None:
    encoded = AutoTokenizer.from_pretrained(example_folder)(TEXT, return_tensors="pt")
    wanted = "101 6375 2769 812 3341 4692 671 678 8815 8716 4638 6783 1139 6963 3300 1525 763 102"
    assert encoded["input_ids"][0].tolist() == [int(token) for token in wanted.split()]

    remote = layertap.RemoteModel(example_server)
    if give == "text":
        ours = remote(TEXT, output_hidden_states=True, output_attentions=True, return_tensors="pt")
    else:
        ours = remote(**encoded, output_hidden_states=True, output_attentions=True)
    assert list(ours.keys()) == ["last_hidden_state", "pooler_output", "hidden_states", "attentions"]
    assert ours.last_hidden_state.shape == (1, 18, 768)
    assert ours.pooler_output.shape == (1, 768)
    assert [hidden.shape for hidden in ours.hidden_states] == [(1, 18, 768)] * 13
    assert [maps.shape for maps in ours.attentions] == [(1, 12, 18, 18)] * 12

    config = copy.deepcopy(AutoConfig.from_pretrained(example_folder))
    model = AutoModel.from_pretrained(example_folder, config=config, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(**encoded, output_hidden_states=True, output_attentions=True)
    assert_close(ours.last_hidden_state.numpy(), theirs.last_hidden_state.numpy(), "last_hidden_state")
    assert_close(ours.pooler_output.numpy(), theirs.pooler_output.numpy(), "pooler_output")
    for layer, (mine, wanted_hidden) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert_close(mine.numpy(), wanted_hidden.numpy(), f"hidden_states[{layer}]")
    for layer, (mine, maps) in enumerate(zip(ours.attentions, theirs.attentions, strict=True)):
        assert_close(mine.numpy(), maps.numpy(), f"attentions[{layer}]", atol=2e-6)

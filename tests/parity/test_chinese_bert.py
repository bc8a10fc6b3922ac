"""The example that must always work: a 12-layer BERT, all it has inside, through `RemoteModel`."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reference import assert_close
from transformers import AutoConfig, AutoModel, AutoTokenizer

import layertap
from harness import serve

ROOT = Path(__file__).resolve().parents[2]
TEXT = "让我们来看一下bert的输出都有哪些"


@pytest.fixture(scope="module")
def folder() -> Path:
    """The model that `make chinese-bert` builds, once: of the true shape, its weights random."""
    folder = ROOT / "build" / "bert-base-chinese-random"
    command = [sys.executable, str(ROOT / "tools" / "chinese_bert.py"), str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "pip install" in built.stderr:
        pytest.skip(built.stderr.strip())
    assert built.returncode == 0, built.stderr
    assert "RANDOM" in built.stdout
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serve({"bert-base-chinese": folder}) as server:
        yield server.address


@pytest.mark.parametrize("give", ["text", "tokens"])
def test_the_example(address: str, folder: Path, give: str) -> None:
    encoded = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    wanted = "101 6375 2769 812 3341 4692 671 678 8815 8716 4638 6783 1139 6963 3300 1525 763 102"
    assert encoded["input_ids"][0].tolist() == [int(token) for token in wanted.split()]

    remote = layertap.RemoteModel(address)
    if give == "text":
        ours = remote(TEXT, output_hidden_states=True, output_attentions=True, return_tensors="pt")
    else:
        ours = remote(**encoded, output_hidden_states=True, output_attentions=True)
    assert list(ours.keys()) == ["last_hidden_state", "pooler_output", "hidden_states", "attentions"]
    assert ours.last_hidden_state.shape == (1, 18, 768)
    assert ours.pooler_output.shape == (1, 768)
    assert [hidden.shape for hidden in ours.hidden_states] == [(1, 18, 768)] * 13
    assert [maps.shape for maps in ours.attentions] == [(1, 12, 18, 18)] * 12

    config = copy.deepcopy(AutoConfig.from_pretrained(folder))
    model = AutoModel.from_pretrained(folder, config=config, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(**encoded, output_hidden_states=True, output_attentions=True)
    assert_close(ours.last_hidden_state.numpy(), theirs.last_hidden_state.numpy(), "last_hidden_state")
    assert_close(ours.pooler_output.numpy(), theirs.pooler_output.numpy(), "pooler_output")
    for layer, (mine, wanted_hidden) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert_close(mine.numpy(), wanted_hidden.numpy(), f"hidden_states[{layer}]")
    for layer, (mine, maps) in enumerate(zip(ours.attentions, theirs.attentions, strict=True)):
        assert_close(mine.numpy(), maps.numpy(), f"attentions[{layer}]", atol=2e-6)

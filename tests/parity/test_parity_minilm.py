"""The default model with its real weights and real text, in float32 and in bfloat16."""

import inspect
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import layertap
from harness import serve
from layertap_server.config import Config

TEXTS = [
    paragraph
    for subject in (textwrap, inspect, np.linalg, Path)
    for paragraph in (inspect.getdoc(subject) or "").split("\n\n")
    if paragraph.strip()
][:12]


def results_of(address: str) -> tuple[str, list[layertap.Result]]:
    """What the server computes in, and everything that it gives of the texts."""
    with layertap.Client(address) as client:
        results = client.encode(
            TEXTS,
            last_hidden_state=True,
            pooler_output=True,
            hidden_states=True,
            attentions=True,
            embeddings=True,
            truncation="end",
        )
        return client.model().compute_dtype, results


def test_every_output_of_real_text(default_server: str) -> None:
    """In the type that the server chooses for this machine."""
    assert_right(*results_of(default_server))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_output_in_the_type_that_is_asked_for(dtype: str) -> None:
    with serve(Config().models(), dtype=dtype) as server:
        computed_in, results = results_of(server.address)
    assert computed_in == dtype
    assert_right(dtype, results)


def assert_right(dtype: str, results: list[layertap.Result]) -> None:
    (folder,) = Config().models().values()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    assert len(results) == len(TEXTS) >= 8
    for text, result in zip(TEXTS, results, strict=True):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
        with torch.inference_mode():
            expected = model(**ids, output_hidden_states=True, output_attentions=True)
        mean = expected.last_hidden_state[0].mean(0)
        pairs = {
            "last_hidden_state": (result.last_hidden_state, expected.last_hidden_state[0]),
            "pooler_output": (result.pooler_output, expected.pooler_output[0]),
            "embedding": (result.embedding, mean / mean.norm()),
        }
        for index, hidden in enumerate(expected.hidden_states):
            pairs[f"hidden_states[{index}]"] = (result.hidden_states[index], hidden[0])
        for layer, weights in enumerate(expected.attentions):
            pairs[f"attentions[{layer}]"] = (result.attentions[layer], weights[0])
        for name, (got, wanted) in pairs.items():
            if dtype == "float32":
                atol = 2e-6 if name.startswith("attentions") else 2e-5
                np.testing.assert_allclose(got, wanted.numpy(), atol=atol, rtol=1e-4, err_msg=name)
            else:
                error = np.linalg.norm(got - wanted.numpy()) / np.linalg.norm(wanted.numpy())
                assert error <= 1e-2, f"{name} of {text!r} is off by {error:.4f}"

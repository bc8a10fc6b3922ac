"""A server that computes in bfloat16 stays near the float32 reference, for every family and output."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Array, Reference, make_references

import layertap
from families import FAMILIES, build, sentences
from harness import serve

MAX_RELATIVE_ERROR = 1e-2
NAMES = list(FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two layers of small weights, so that the error is of the rounding and not of an unruly model."""
    root = tmp_path_factory.mktemp("gentle")
    for name in NAMES:
        build(name, root / name, num_layers=2, gain=0.5)
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[layertap.Client]:
    with serve(folders, dtype="bfloat16") as server, layertap.Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, Reference]:
    return make_references(folders)


def relative_errors(result: layertap.Result, expected: Any) -> dict[str, float]:
    """Of each layer's tensors whole, in the Frobenius norm."""
    errors = {}

    def compare(name: str, actual: Any, wanted: Array) -> None:
        errors[name] = float(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted))

    for name in ("hidden_states", "attentions"):
        for layer, (actual, wanted) in enumerate(
            zip(getattr(result, name), getattr(expected, name), strict=True)
        ):
            compare(f"{name}[{layer}]", actual, wanted)
    compare("embedding", result.embedding, expected.last_hidden_state.mean(axis=0))
    if expected.pooler_output is not None:
        compare("pooler_output", result.pooler_output, expected.pooler_output)
    return errors


@pytest.mark.parametrize("name", NAMES)
def test_every_output(client: layertap.Client, references: dict[str, Reference], name: str) -> None:
    protein = FAMILIES[name].model_type == "esm"
    texts = ["MKTAYIAKQRQISFVKS", "MKV", "ACDEFGHIKL" * 4] if protein else list(sentences()[3:9])
    assert client.model(name).compute_dtype == "bfloat16"
    results = client.encode(
        texts,
        model=name,
        hidden_states=True,
        attentions=True,
        embeddings=True,
        pooler_output=FAMILIES[name].has_pooler,
        truncation="end",
    )
    for text, result in zip(texts, results, strict=True):
        errors = relative_errors(result, references[name].encode(text))
        assert max(errors.values()) <= MAX_RELATIVE_ERROR, f"{text}: {errors}"

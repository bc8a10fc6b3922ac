"""A server that computes in bfloat16 stays near the float32 reference, for every family and output."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference, make_references

import layertap
from families import sentences
from harness import serve

MAX_RELATIVE_ERROR = 1e-2


@pytest.fixture(scope="module")
def bfloat16_client(gentle_folders: dict[str, Path]) -> Iterator[layertap.Client]:
    with serve(gentle_folders, dtype="bfloat16") as server, layertap.Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def gentle_references(gentle_folders: dict[str, Path]) -> dict[str, Reference]:
    return make_references(gentle_folders)


def relative_error(actual: Any, expected: np.ndarray[Any, Any]) -> float:
    """Of the whole tensor, in the Frobenius norm."""
    return float(np.linalg.norm(actual.astype(np.float32) - expected) / np.linalg.norm(expected))


def test_every_output(
    bfloat16_client: layertap.Client, gentle_references: dict[str, Reference], reference: Reference
) -> None:
    truth = gentle_references[reference.name]
    texts = (
        ["MKTAYIAKQRQISFVKS", "MKV", "ACDEFGHIKL" * 4]
        if reference.family.model_type == "esm"
        else list(sentences()[3:9])
    )
    results = bfloat16_client.encode(
        texts,
        model=reference.name,
        hidden_states=True,
        attentions=True,
        embeddings=layertap.Embedding(pooling="cls"),
        pooler_output=reference.family.has_pooler,
        truncation="end",
    )
    assert bfloat16_client.model(reference.name).compute_dtype == "bfloat16"
    for text, result in zip(texts, results, strict=True):
        expected = truth.encode(text)
        assert result.hidden_states is not None
        assert result.attentions is not None
        errors = {
            f"hidden_states[{layer}]": relative_error(result.hidden_states[layer], hidden)
            for layer, hidden in enumerate(expected.hidden_states)
        }
        errors |= {
            f"attentions[{layer}]": relative_error(result.attentions[layer], maps)
            for layer, maps in enumerate(expected.attentions)
        }
        errors["embedding"] = relative_error(result.embedding, expected.last_hidden_state[0])
        if expected.pooler_output is not None:
            errors["pooler_output"] = relative_error(result.pooler_output, expected.pooler_output)
        over = {name: error for name, error in errors.items() if error > MAX_RELATIVE_ERROR}
        assert not over, text

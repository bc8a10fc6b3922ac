"""A server that computes in bfloat16 stays near the float32 reference, for every family and output."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Array, Reference

import layertap
from families import FAMILIES, build, sentences
from harness import serve

MAX_RELATIVE_ERROR = 1e-2
# `make test` takes these: layers in native code, windows, and one that runs padded.
VARIED = ("bert", "modernbert", "deberta_v2")


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


@pytest.mark.parametrize(
    "name", [name if name in VARIED else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
)
def test_every_output(name: str, tmp_path: Path) -> None:
    """Of two layers of small weights, so that the error is of the rounding and not of an unruly model."""
    folder = tmp_path / name
    build(name, folder, num_layers=2, gain=0.5)
    reference = Reference(name, FAMILIES[name], folder)
    protein = FAMILIES[name].model_type == "esm"
    texts = ["MKTAYIAKQRQISFVKS", "MKV", "ACDEFGHIKL" * 4] if protein else list(sentences()[3:9])
    with (
        serve({name: folder}, dtype="bfloat16", is_calibrated=False) as server,
        layertap.Client(server.address) as client,
    ):
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
        errors = relative_errors(result, reference.encode(text))
        assert max(errors.values()) <= MAX_RELATIVE_ERROR, f"{text}: {errors}"

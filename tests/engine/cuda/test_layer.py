"""What stands in for BERT's modules on CUDA, on the CPU: its kernels interpreted, its model beside the library's."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import families
from engine.works import works_wanting_everything
from layertap_server.engine import Engine, ModelLoadError, load_model
from layertap_server.engine.loading import load as loading
from layertap_server.engine.loading import ways

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
if torch.cuda.is_available():
    pytest.skip("with a device the kernels are compiled for it: test_cuda_device.py", allow_module_level=True)

from layertap_server.engine.cuda import layer as cuda_layer
from layertap_server.engine.cuda.layer import CudaBertEmbeddings, CudaBertEncoder, cuda_modules
from layertap_server.engine.cuda.steps import embed_norm, sum_norm

BERT_LAYERS = ["bert", "roberta", "electra", "ernie"]


def random_norm(size: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(size, eps=1e-12)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("shape", [(1, 768), (37, 384), (9, 32), (2, 4100)])
@torch.inference_mode()
def test_sum_norm(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    norm = random_norm(shape[1])
    product, residual = torch.randn(shape).half(), 3 * torch.randn(shape)
    normed, narrowed = sum_norm(product, residual, norm)
    expected = norm(product.float() + residual)
    torch.testing.assert_close(normed, expected, atol=5e-6, rtol=1e-5)
    assert narrowed.dtype is torch.float16
    torch.testing.assert_close(narrowed, expected.half(), atol=1e-3, rtol=2e-3)


@torch.inference_mode()
def test_embed_norm() -> None:
    torch.manual_seed(0)
    norm, sizes = random_norm(48), (100, 2, 64)
    words, types, positions = (torch.randn(size, 48) for size in sizes)
    ids = tuple(torch.randint(size, (37,)) for size in sizes)
    expected = norm(words[ids[0]] + types[ids[1]] + positions[ids[2]])
    got = embed_norm(ids, (words, types, positions), norm)
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("table", [0, 1, 2])
@pytest.mark.parametrize("beyond", [-1, -(2**40), 0, 2**40])
@torch.inference_mode()
def test_ids_outside_of_a_table_read_nothing(table: int, beyond: int) -> None:
    """The tables are parts of larger ones, so that what is read beside them would show."""
    norm, sizes = random_norm(48), (100, 2, 64)
    everything = torch.randn(300, 48)
    starts = (50, 200, 210)
    tables = tuple(everything[start : start + size] for start, size in zip(starts, sizes, strict=True))
    ids = tuple(torch.randint(size, (9,)) for size in sizes)
    expected = embed_norm(ids, tables, norm)
    ids[table][4] = beyond if beyond < 0 else sizes[table] + beyond
    got = embed_norm(ids, tables, norm)
    assert got[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(got[others], expected[others])


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "device_modules", lambda loaded, dtype: cuda_modules(loaded.model, dtype))


def engine_of(folder: Path, dtype: str) -> tuple[Engine, Any]:
    loaded = load_model(
        "m", str(folder), device="cpu", dtype=dtype, trust_remote_code=False, max_input_tokens=0
    )
    return Engine(loaded), loaded.model


def largest_difference(got: Engine, expected: Engine) -> float:
    """Of all that a model can be asked for in floats: relative, Frobenius."""
    works = works_wanting_everything(expected.facts)
    differences = []
    for one, other in zip(got.run(works), expected.run(works), strict=True):
        for tensor, wanted in zip(one, other, strict=True):
            assert tensor.data.shape == wanted.data.shape
            if wanted.data.dtype.kind == "f":
                exact = wanted.data.astype(np.float64)
                differences.append(np.linalg.norm(tensor.data - exact) / np.linalg.norm(exact))
    return max(differences)


@pytest.mark.parametrize("name", BERT_LAYERS)
def test_every_output_is_the_models(name: str, tmp_path: Path, as_on_cuda: None) -> None:
    families.build(name, tmp_path, num_layers=2, gain=0.5)
    engine, model = engine_of(tmp_path, "bfloat16")
    assert isinstance(model.encoder, CudaBertEncoder)
    assert isinstance(model.embeddings, CudaBertEmbeddings) == (
        name != "ernie"
    )  # ERNIE has task embeddings too
    exact, exact_model = engine_of(tmp_path, "float32")
    assert not isinstance(exact_model.encoder, CudaBertEncoder)
    assert largest_difference(engine, exact) < 1e-2


def test_another_activation_is_kept(tmp_path: Path, as_on_cuda: None) -> None:
    families.build("bert", tmp_path, num_layers=2, gain=0.5)
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text("utf-8").replace('"hidden_act": "gelu"', '"hidden_act": "relu"'), "utf-8"
    )
    engine, model = engine_of(tmp_path, "bfloat16")
    assert isinstance(model.encoder, CudaBertEncoder)
    exact, _ = engine_of(tmp_path, "float32")
    assert largest_difference(engine, exact) < 1e-2


def fails(*_: object) -> Any:
    raise RuntimeError("no compiler here")


def differs(product: torch.Tensor, residual: torch.Tensor, norm: nn.LayerNorm) -> Any:
    normed = norm(product + residual) * 1.1
    return normed, normed.to(product.dtype)


@pytest.mark.parametrize(
    ("step", "said"),
    [(fails, "it fails: no compiler here"), (differs, "last_hidden_state of a text of 33 tokens differs")],
)
def test_what_fails_or_differs_is_not_used(
    step: Callable[..., Any],
    said: str,
    tmp_path: Path,
    as_on_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    families.build("bert", tmp_path, num_layers=2, gain=0.5)
    monkeypatch.setattr(cuda_layer, "sum_norm", step)
    with caplog.at_level(logging.WARNING):
        engine, model = engine_of(tmp_path, "bfloat16")
    assert f"cannot run packed, with native layers: {said}" in caplog.text
    assert not isinstance(model.encoder, CudaBertEncoder)
    exact, _ = engine_of(tmp_path, "float32")
    assert largest_difference(engine, exact) < 1e-2


def test_without_triton_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.choose_device("cuda") == torch.device("cuda:0")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="--device cuda needs Triton: pip install triton"):
        loading.choose_device("cuda")

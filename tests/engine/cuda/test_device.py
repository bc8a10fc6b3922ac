"""The CUDA paths on a CUDA device, against the same model on the CPU in float32."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import families
from engine.works import works_wanting_everything, works_wanting_vectors
from layertap_server.engine import Engine, engine_for, load_model
from layertap_server.engine.cuda.engine import CudaEngine
from layertap_server.engine.cuda.pooling import pool_on_cuda
from layertap_server.engine.loading.families import FAMILIES
from layertap_server.plan import Outputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

PACKED = [name for name, family in families.FAMILIES.items() if family.model_type in FAMILIES]
# Relative Frobenius error of a tensor in 16 bits; the models are gentle, as for the parity in bfloat16.
TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    folders: dict[str, Path] = {}

    @cache
    def start_engine(name: str, device: str, dtype: str = "float32") -> Engine:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            families.build(name, folders[name], num_layers=2, gain=0.5)
        loaded = load_model(
            name,
            str(folders[name]),
            device=device,
            dtype=dtype,
            trust_remote_code=False,
            max_input_tokens=0,
        )
        return engine_for(loaded)

    return start_engine


@contextmanager
def nothing_is_waited_for() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_close(got: list[Outputs], expected: list[Outputs], tolerance: float) -> None:
    for one, other in zip(got, expected, strict=True):
        for tensor, wanted in zip(one, other, strict=True):
            assert tensor.data.dtype == wanted.data.dtype
            assert tensor.data.shape == wanted.data.shape
            if tensor.data.dtype.kind != "f":
                continue  # int8 and binary vectors: the floats from which they are computed are compared
            difference = np.linalg.norm(tensor.data.astype(np.float64) - wanted.data)
            assert difference <= tolerance * np.linalg.norm(wanted.data.astype(np.float64))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("dtype", "tolerance"), [("auto", TOLERANCE), ("float32", 1e-4)])
def test_every_output(dtype: str, tolerance: float, name: str, start: Callable[..., Engine]) -> None:
    on_device, on_cpu = start(name, "cuda", dtype), start(name, "cpu")
    works = works_wanting_everything(on_cpu.facts)
    assert_close(on_device.run(works), on_cpu.run(works), tolerance)
    for lengths in ([5], [3, 60, 1], [9] * 32, [64] * 40):
        works = works_wanting_vectors(on_cpu.facts, lengths)
        assert_close(on_device.run(works), on_cpu.run(works), tolerance)


@pytest.mark.parametrize("name", PACKED)
def test_the_faster_passes_are_taken(name: str, start: Callable[..., Engine]) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs Ampere or newer")
    assert start(name, "cuda", "auto").facts.attention.endswith("CUDA graphs for small batches")


def test_vectors_are_pooled_in_one_kernel(start: Callable[..., Engine]) -> None:
    assert start("bert", "cuda", "auto")._pool is pool_on_cuda


@pytest.mark.parametrize("name", PACKED)
def test_a_launch_waits_for_nothing(name: str, start: Callable[..., Engine]) -> None:
    engine = start(name, "cuda", "auto")
    assert isinstance(engine, CudaEngine)
    batches = [works_wanting_everything(engine.facts), works_wanting_vectors(engine.facts, [3, 60, 1])]
    for works in batches:  # a run before the measurement: libraries synchronize at their first call
        engine.run(works)
    with nothing_is_waited_for():
        launched = [engine.launch(works) for works in batches]
    for pending in launched:
        pending.wait()


def test_batches_launched_ahead_do_not_mix(start: Callable[..., Engine]) -> None:
    engine = start("bert", "cuda", "auto")
    assert isinstance(engine, CudaEngine)
    batches = [works_wanting_vectors(engine.facts, [length, 64, 1]) for length in range(2, 62, 3)]
    expected = [engine.run(works) for works in batches]
    got = [pending.wait() for pending in [engine.launch(works) for works in batches]]
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, 1e-6)


def test_results_outlive_later_batches(start: Callable[..., Engine]) -> None:
    """Pinned memory goes back to its pool only when no reply reads it any more."""
    engine = start("bert", "cuda", "auto")
    works = works_wanting_everything(engine.facts)
    answers = engine.run(works)
    copies = [[tensor.data.copy() for tensor in outputs] for outputs in answers]
    for length in range(1, 60):
        engine.run(works_wanting_vectors(engine.facts, [length] * 8))
    for outputs, kept in zip(answers, copies, strict=True):
        for tensor, copied in zip(outputs, kept, strict=True):
            np.testing.assert_array_equal(tensor.data, copied)


def test_memory_that_is_short_is_a_memory_error(start: Callable[..., Engine]) -> None:
    engine = start("bert", "cuda", "auto")
    works = works_wanting_everything(engine.facts) * 200
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        torch.cuda.empty_cache()
        with pytest.raises(MemoryError):
            engine.run(works)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    engine.run(works)

"""Out of memory at every step of a pass: a MemoryError, with nothing of the pass held behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from families import build
from faults import ERRORS, OutOfMemoryAt
from layertap_server.engine import Engine, load_model
from layertap_server.engine.cpu import library as native
from layertap_server.engine.memory import is_out_of_memory
from layertap_server.enums import DType, Encoding, LayerMerge, Pooling
from layertap_server.output_plans import AttentionPlan, EmbeddingPlan
from layertap_server.plan import OutputPlan, Outputs, Work

HIDDEN_SIZE = 32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Passes by the hundred, each too small for a second thread to be worth waking."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def engine_of(folder: Path, name: str, dtype: str = "float32") -> Engine:
    build(name, folder)
    loaded = load_model(
        name, str(folder), device="cpu", dtype=dtype, trust_remote_code=False, max_input_tokens=0
    )
    return Engine(loaded)


def batch() -> list[Work]:
    """Every kind of output, over texts of three lengths."""
    vector = EmbeddingPlan(
        pooling=Pooling.MEAN,
        layers=(2, 4),
        layer_merge=LayerMerge.CONCAT,
        normalize=True,
        dimensions=2 * HIDDEN_SIZE,
        encoding=Encoding.INT8,
        segments=((0, 4),),
        has_spans=False,
    )
    maps = AttentionPlan((0, 3), (0, 2), False, None)
    mean = AttentionPlan((1,), (0, 1, 2, 3), True, (0, 2))
    works = []
    for length, plan in (
        (4, OutputPlan(DType.FLOAT32, embeddings=(vector,))),
        (7, OutputPlan(DType.FLOAT16, last_hidden_state=True, hidden_states=(0, 2), attentions=maps)),
        (7, OutputPlan(DType.BFLOAT16, pooler_output=True, attentions=mean)),
    ):
        ids = np.arange(5, 5 + length, dtype=np.int64)
        works.append(Work(ids, np.zeros(length, np.int64), plan, plan.specs(length, HIDDEN_SIZE)))
    return works


def assert_same(answers: list[Outputs], expected: list[Outputs]) -> None:
    for mine, wanted in zip(answers, expected, strict=True):
        for tensor, right in zip(mine, wanted, strict=True):
            np.testing.assert_array_equal(tensor.data, right.data)


def error_of(engine: Engine) -> MemoryError | None:
    try:
        engine.run(batch())
    except MemoryError as error:
        return error
    return None


@pytest.mark.parametrize(
    "name",
    [pytest.param("bert", id="packed"), pytest.param("mpnet", id="padded", marks=pytest.mark.long)],
)
def test_at_every_operation(tmp_path: Path, name: str) -> None:
    engine = engine_of(tmp_path, name)
    expected = engine.run(batch())
    number = 0
    while True:
        with OutOfMemoryAt(number) as fault:
            error = error_of(engine)
        if error is None:
            assert not fault.failed
            break
        # The error is kept, as the scheduler does for a retry. It must not keep tensors of the pass alive.
        held = [tensor for tensor in fault.tensors if tensor() is not None]
        assert not held, f"{len(held)} tensors outlive operation {number}"
        number += 1
        if number % 10 == 0:
            assert_same(engine.run(batch()), expected)
    assert number > 50
    assert_same(engine.run(batch()), expected)


@pytest.mark.parametrize("method", ["_attend", "_write_maps"])
def test_no_memory_for_the_native_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    kernel = native.attention_kernel()
    if kernel is None:
        pytest.skip("there is no C compiler here, so no kernel")
    engine = engine_of(tmp_path, "albert")  # BERT's layers call it from within their own
    with monkeypatch.context() as patched:
        patched.setattr(kernel, method, lambda *_: 0)
        with pytest.raises(MemoryError, match="attention kernel"):
            engine.run(batch())
    assert engine.run(batch())


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, "bert")
    wrong = Work(np.array([10**6]), np.zeros(1, np.int64), batch()[0].plan, batch()[0].specs)
    with pytest.raises(IndexError):
        engine.run([wrong])


def test_what_counts_as_out_of_memory() -> None:
    assert all(is_out_of_memory(error) for error in ERRORS)
    assert is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    )
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60)
    assert is_out_of_memory(real.value)

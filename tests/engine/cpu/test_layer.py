"""BERT's layer in native code against the library's own, over shapes and types; and to the bit in any company."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from drawings import drawings
from engine.works import mean_of, work_of
from families import build
from layertap_server.engine import Engine, load_model
from layertap_server.engine.cpu import layer as native_layer
from layertap_server.engine.cpu.layer import LayerKernel, NativeBertEncoder
from layertap_server.engine.cpu.library import DTYPES
from layertap_server.engine.fused import FusedBertLayer
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import DepthReachedError, Taps
from layertap_server.enums import DType
from layertap_server.output_plans import AttentionPlan
from layertap_server.plan import OutputPlan, Work

CPU = torch.device("cpu")
# (hidden, heads, intermediate): whole panels and parts of them, heads with and without tiles.
SHAPES = ((64, 2, 256), (96, 3, 160), (40, 4, 72), (312, 12, 1200), (384, 12, 1536))


@pytest.fixture(scope="module")
def kernel(kernels_with_tiles: None) -> LayerKernel:
    kernel = native_layer.layer_kernel()
    assert kernel is not None
    return kernel


def layer_of(shape: tuple[int, int, int], activation: str = "gelu") -> tuple[BertLayer, FusedBertLayer]:
    hidden_size, num_heads, intermediate_size = shape
    config = BertConfig(
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        intermediate_size=intermediate_size,
        hidden_act=activation,
        attn_implementation="eager",
    )
    torch.manual_seed(hidden_size)
    layer = BertLayer(config).eval()
    with torch.no_grad():  # as trained ones are: large enough that an error would show
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return layer, FusedBertLayer(layer).eval()


def packing_of(lengths: list[int], plan: OutputPlan | None = None, hidden_size: int = 8) -> Packing:
    plan = plan or OutputPlan(DType.FLOAT32, hidden_states=(1,))
    return Packing.of(
        [Work(np.zeros(length, np.int64), None, plan, plan.specs(length, hidden_size)) for length in lengths]
    )


@torch.inference_mode()
def run(layer: NativeBertEncoder, rows: torch.Tensor, packing: Packing) -> torch.Tensor:
    taps = Taps(packing, len(layer.layers), CPU)
    return layer(filled(rows, packing), taps=taps).last_hidden_state[0, : len(rows)]


def filled(rows: torch.Tensor, packing: Packing) -> torch.Tensor:
    """With what nobody may read behind them."""
    return torch.cat([rows, torch.full((packing.num_rows - len(rows), rows.shape[1]), torch.nan)])[None]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@settings(max_examples=drawings(40), deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40) | st.sampled_from([96, 97, 200]), min_size=1, max_size=5),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
)
@torch.inference_mode()
def test_gives_what_the_librarys_layer_gives(
    kernel: LayerKernel, lengths: list[int], shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    layer, fused = layer_of(shape)
    if not native_layer.is_native(fused, kernel, dtype):
        assert dtype is torch.bfloat16  # this processor has no tiles, or the shape does not fill them
        return
    packing = packing_of(sorted(lengths))
    rows = torch.randn(packing.total_tokens, shape[0])
    got = run(NativeBertEncoder(kernel, [fused], dtype), rows, packing)
    layer.double()
    for _, start, end in packing.rows():
        expected = layer(rows[None, start:end].double())[0]
        assert error(got[start:end].double(), expected) < (2e-6 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_to_the_bit_in_any_company(kernel: LayerKernel, dtype: torch.dtype) -> None:
    _, fused = layer_of(SHAPES[-1])
    if not native_layer.is_native(fused, kernel, dtype):
        pytest.skip("this processor has no kernel for 16 bits")
    layer = NativeBertEncoder(kernel, [fused], dtype)
    generator = np.random.default_rng(0)
    texts = [torch.randn(int(length), SHAPES[-1][0]) for length in generator.integers(1, 150, 12)]
    alone = [run(layer, text, packing_of([len(text)])) for text in texts]
    for num_texts in (2, 5, 12):
        chosen = sorted(generator.permutation(12)[:num_texts], key=lambda i: len(texts[i]))
        packing = packing_of([len(texts[i]) for i in chosen])
        together = run(layer, torch.cat([texts[i] for i in chosen]), packing)
        for i, (_, start, end) in zip(chosen, packing.rows(), strict=True):
            assert torch.equal(together[start:end], alone[i])


@torch.inference_mode()
def test_maps_alone_end_the_pass(kernel: LayerKernel) -> None:
    layer, fused = layer_of(SHAPES[0])
    plan = OutputPlan(DType.FLOAT32, attentions=AttentionPlan((0,), (0, 1), False, None))
    packing = packing_of([5, 9], plan)
    rows = torch.randn(1, packing.num_rows, SHAPES[0][0])
    taps = Taps(packing, 1, CPU)
    with pytest.raises(DepthReachedError):
        NativeBertEncoder(kernel, [fused], torch.float32)(rows, taps=taps)
    for (maps,), (_, start, end) in zip(taps.buffers, packing.rows(), strict=True):
        expected = layer.attention(rows[:, start:end])[1][0]
        torch.testing.assert_close(maps[0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("wanted", [[], [1], [2, 3], [0, 1, 2, 3, 4]])
@torch.inference_mode()
def test_layers_together_are_the_layers_one_by_one(kernel: LayerKernel, wanted: list[int]) -> None:
    """To the bit, wherever the run is interrupted for a hidden state."""
    layers = [layer_of((64, 2, 256))[1] for _ in range(4)]
    for number, layer in enumerate(layers):
        layer.output_norm.weight *= 1 + number / 4
    for lengths in ([5], [3, 40, 200], [100] * 6):
        packing = packing_of(lengths, OutputPlan(DType.FLOAT32, hidden_states=(*wanted, 4)), 64)
        rows = torch.randn(packing.total_tokens, 64)
        one_by_one = [rows]
        for layer in layers:
            single = packing_of(lengths, hidden_size=64)
            one_by_one.append(run(NativeBertEncoder(kernel, [layer], torch.float32), one_by_one[-1], single))
        encoder = NativeBertEncoder(kernel, layers, torch.float32)
        taps = Taps(packing, 4, CPU)
        last = encoder(filled(rows, packing), taps=taps).last_hidden_state
        taps.write_hidden_state(4, last)
        assert torch.equal(last[0, : len(rows)], one_by_one[-1])
        for (states,), (_, start, end) in zip(taps.buffers, packing.rows(), strict=True):
            for state, index in zip(states, (*wanted, 4), strict=True):
                assert torch.equal(state, one_by_one[index][start:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire_dtype", [DType.FLOAT32, DType.FLOAT16])
@pytest.mark.parametrize("hidden_states", [None, (1,), (2, 4)])
@pytest.mark.parametrize("asked", [(0,), (3,), (1, 2), (0, 1, 2, 3)])
@torch.inference_mode()
def test_maps_of_layers_together(
    kernel: LayerKernel,
    dtype: torch.dtype,
    wire_dtype: DType,
    hidden_states: tuple[int, ...] | None,
    asked: tuple[int, ...],
) -> None:
    """Those of each layer by itself, whether the kernel writes them straight or they are converted."""
    layers = [layer_of((64, 2, 256))[1] for _ in range(4)]
    if not native_layer.is_native(layers[0], kernel, dtype):
        pytest.skip("this processor has no kernel for 16 bits")
    for number, layer in enumerate(layers):
        layer.output_norm.weight *= 1 + number / 4
    lengths = [5, 40, 41]
    maps = AttentionPlan(asked, (1, 0), False, None)
    plan = OutputPlan(wire_dtype, hidden_states=hidden_states, attentions=maps)
    packing = packing_of(lengths, plan, 64)
    rows = torch.randn(packing.num_rows, 64)
    taps = Taps(packing, 4, CPU)
    with suppress(DepthReachedError):
        output = NativeBertEncoder(kernel, layers, dtype)(rows[None], taps=taps)
        taps.write_hidden_state(4, output.last_hidden_state)
    state = rows[: packing.total_tokens]
    for number, layer in enumerate(layers):
        encoder = NativeBertEncoder(kernel, [layer], dtype)
        if number in asked:
            one = OutputPlan(DType.FLOAT32, attentions=AttentionPlan((0,), (1, 0), False, None))
            alone = Taps(packing_of(lengths, one, 64), 1, CPU)
            with pytest.raises(DepthReachedError):
                encoder(filled(state, packing), taps=alone)
            for buffers, (expected,) in zip(taps.buffers, alone.buffers, strict=True):
                got = buffers[-1][asked.index(number)]
                assert torch.equal(got, expected[0].to(got.dtype))
        state = run(encoder, state, packing_of(lengths, hidden_size=64))
        if number + 1 in (hidden_states or ()):
            for buffers, (_, start, end) in zip(taps.buffers, packing.rows(), strict=True):
                got = buffers[0][hidden_states.index(number + 1)]
                assert torch.equal(got, state[start:end].to(got.dtype))


def test_other_activations_stay_with_torch(kernel: LayerKernel) -> None:
    for activation in ("relu", "gelu_new", "silu"):
        _, fused = layer_of(SHAPES[0], activation)
        assert not native_layer.is_native(fused, kernel, torch.float32)
        assert native_layer.native_encoder(SimpleNamespace(layer=[fused]), torch.float32) == {}


def test_no_memory(kernel: LayerKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = layer_of(SHAPES[0])
    layer = NativeBertEncoder(kernel, [fused], torch.float32)
    packing = packing_of([3])
    rows = torch.randn(3, SHAPES[0][0])
    expected = run(layer, rows, packing)
    with monkeypatch.context() as patched:
        patched.setattr(kernel, "run", lambda *_: 0)
        with pytest.raises(MemoryError, match="layer kernel"):
            run(layer, rows, packing)
    assert torch.equal(run(layer, rows, packing), expected)


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_what_gives_what_the_model_gives_is_served(
    kernel: LayerKernel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: str,
    is_right: bool,
) -> None:
    """As a compiler's fault would show, or a library that another processor compiled."""
    build("bert", tmp_path)
    monkeypatch.setattr(native_layer, "seconds_of", lambda *_: [1.0, 1.0])
    if not is_right:
        right = NativeBertEncoder.forward

        def forward(*args: Any, **taps: Any) -> Any:
            output = right(*args, **taps)
            output.last_hidden_state *= 1.1
            return output

        monkeypatch.setattr(NativeBertEncoder, "forward", forward)
    loaded = load_model(
        "bert", str(tmp_path), device="cpu", dtype=dtype, trust_remote_code=False, max_input_tokens=0
    )
    has_kernel = kernel.products.fits(torch.empty(32, 32), getattr(torch, dtype))
    assert isinstance(loaded.model.encoder, NativeBertEncoder) == (is_right and has_kernel)
    assert all(isinstance(layer, FusedBertLayer) for layer in loaded.layers)
    assert ("cannot run packed, with native layers:" in caplog.text) == (has_kernel and not is_right)


# Operations that only make another tensor of the same memory, or none.
FREE_STEPS = ("aten.lift_fresh", "aten.to.", "aten.detach", "aten.resolve_")


class Steps(TorchDispatchMode):
    """Counts torch's operations, views aside: nearly each lets the interpreter go."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_batch_of_vectors_takes_few_of_torchs_steps(
    kernel: LayerKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each the engine's thread may wait a millisecond for the interpreter."""
    build("bert", tmp_path)
    monkeypatch.setattr(native_layer, "seconds_of", lambda *_: [1.0, 1.0])
    engine = Engine(
        load_model(
            "bert", str(tmp_path), device="cpu", dtype="float32", trust_remote_code=False, max_input_tokens=0
        )
    )
    facts = engine.facts
    works = [
        work_of(facts, length, OutputPlan(DType.FLOAT32, embeddings=(mean_of(facts, length),)))
        for length in (5, 3, 12)
    ]
    engine.run(works)
    with Steps() as steps:
        engine.run(works)
    computing = [name for name in steps.names if not name.startswith(FREE_STEPS)]
    assert computing == ["aten.fill_.Scalar"]  # the rows behind the texts

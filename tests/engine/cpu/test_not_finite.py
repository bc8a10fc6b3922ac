"""What is not finite: NaN and infinities come out where torch and transformers have them, and nowhere else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from transformers import AutoModel, BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

import families
from engine.cpu.variants import HERE, VARIANTS, compiled, kernels_of
from engine.works import mean_of
from layertap_server.engine import Engine, load_model
from layertap_server.engine.attention import attend_runs, write_maps
from layertap_server.engine.attention_maps import MapTap
from layertap_server.engine.cpu import embeddings as native_embeddings
from layertap_server.engine.cpu import layer as native_layer
from layertap_server.engine.cpu import library as native
from layertap_server.engine.cpu import product as native_product
from layertap_server.engine.cpu.layer import NativeBertEncoder
from layertap_server.engine.cpu.product import NativeProduct
from layertap_server.engine.fused import FusedBertLayer
from layertap_server.engine.loading.families import FAMILIES
from layertap_server.engine.packing import Packing
from layertap_server.engine.pooling import encode_vectors, pool_segments
from layertap_server.engine.taps import Taps
from layertap_server.enums import DType, Encoding, LayerMerge, Pooling
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import AttentionPlan, EmbeddingPlan
from layertap_server.plan import OutputPlan, Work

CPU = torch.device("cpu")
INF, NAN = float("inf"), float("nan")
# Every number that bfloat16 has: all sizes, both infinities, denormals, and NaN of many kinds.
NUMBERS = (torch.arange(2**16, dtype=torch.int32) << 16).view(torch.float32)
Step = Callable[..., torch.Tensor]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kernels(variant: str) -> Iterator[None]:
    with kernels_of(variant):
        yield


@pytest.fixture
def steps(variant: str) -> ctypes.CDLL:
    return compiled(HERE / "steps.c", variant)


@pytest.fixture
def step(steps: ctypes.CDLL) -> Step:
    """Runs one of the steps of steps.c on float32."""

    def run(name: str, numbers: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        output = torch.empty(len(numbers), dtype=dtype)
        numbers = numbers.contiguous()
        pointers = (ctypes.c_void_p(one.data_ptr()) for one in (numbers, output))
        getattr(steps, name)(next(pointers), ctypes.c_int64(len(numbers)), next(pointers))
        return output

    return run


def assert_same_kind(got: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN where there is NaN, and the same infinities."""
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(expected))


# ---------------------------------------------------------------------------------------- single steps


@pytest.mark.parametrize(("name", "tolerance"), [("gelus", 1.1e-6), ("rough_gelus", 1.5e-4)])
def test_gelu_of_every_size(step: Step, name: str, tolerance: float) -> None:
    dense = torch.linspace(-20, 20, 2**20)
    for numbers in (NUMBERS, dense):
        got, exact = step(name, numbers).double(), F.gelu(numbers.double())
        assert_same_kind(got, exact)
        finite = exact.isfinite()
        error = (got - exact)[finite].abs()
        # The additional error of large results, by rounding to float32.
        assert (error <= tolerance + 2**-23 * exact[finite].abs()).all()


def test_gelu_far_below_zero_is_zero(step: Step) -> None:
    numbers = -torch.logspace(1, 38, 4096)
    for name in ("gelus", "rough_gelus"):
        assert (step(name, numbers) == 0).all()


def test_exponential(step: Step) -> None:
    numbers = torch.cat([NUMBERS[~(NUMBERS > 88)], torch.full((15,), -INF)])
    numbers = numbers[: len(numbers) // 16 * 16]
    got, exact = step("exponentials", numbers), numbers.double().exp()
    assert_same_kind(got, exact)
    is_number = ~numbers.isnan()
    torch.testing.assert_close(got[is_number].double(), exact[is_number], rtol=3e-7, atol=2e-38)


@pytest.mark.parametrize("name", ["to_16_bits", "to_16_bits_one_by_one"])
@pytest.mark.parametrize("low_bits", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_to_16_bits(step: Step, name: str, low_bits: int) -> None:
    numbers = (NUMBERS.view(torch.int32) | low_bits).view(torch.float32)
    got, expected = step(name, numbers, torch.bfloat16), numbers.to(torch.bfloat16)
    assert_same_kind(got, expected)
    normal = (
        numbers.abs() >= torch.finfo(torch.float32).tiny
    )  # the processor's rounding instruction makes denormals 0
    assert torch.equal(got[normal & ~numbers.isnan()], expected[normal & ~numbers.isnan()])


# --------------------------------------------------------------------------------- rows by themselves


def rows_with(number: float, columns: tuple[int, ...], size: int) -> torch.Tensor:
    """(40, size), with `number` in these columns of two rows; in the second row it is negated in the last."""
    torch.manual_seed(0)
    rows = torch.randn(40, size)
    rows[3, list(columns)] = number
    rows[33, list(columns)] = number
    rows[33, columns[-1]] = -number
    return rows


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["rows", "weight", "bias"])
@pytest.mark.usefixtures("kernels")
def test_the_product(place: str, number: float, dtype: torch.dtype, gelu: bool) -> None:
    kernel = native_product.product_kernel()
    assert kernel is not None
    torch.manual_seed(1)
    operands = {"rows": torch.randn(40, 96), "weight": torch.randn(70, 96), "bias": torch.randn(70)}
    operands["weight"][69, 5] = 0  # times infinity, it is NaN
    if place == "rows":
        operands["rows"] = rows_with(number, (5, 90), 96)
    else:
        operands[place][[2, 68]] = number
    if not kernel.fits(operands["weight"], dtype):
        pytest.skip("this processor has no kernel for 16 bits")
    expected = F.linear(
        operands["rows"].to(dtype).float(), operands["weight"].to(dtype).float(), operands["bias"]
    )
    if gelu:
        expected = F.gelu(expected)
    assert not expected.isfinite().all()
    for wide_output in (True, False):
        product = NativeProduct(
            kernel, operands["weight"], operands["bias"], dtype, gelu=gelu, wide_output=wide_output
        )
        got = product(operands["rows"])
        assert_same_kind(got, expected.to(got.dtype))
        beside = expected.isfinite().all(1) if place == "rows" else torch.arange(40)
        columns = torch.arange(70) if place == "rows" else expected.isfinite().all(0)
        tolerance = 1e-4 if got.dtype is torch.float32 else 1e-2
        torch.testing.assert_close(
            got[beside][:, columns].float(), expected[beside][:, columns], atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["rows", "gamma", "beta"])
@pytest.mark.parametrize("size", [1, 15, 64, 85])
def test_the_norm(steps: ctypes.CDLL, size: int, place: str, number: float) -> None:
    rows = rows_with(number if place == "rows" else 0.5, (0, size - 1), size)
    layer = torch.nn.LayerNorm(size, eps=1e-12)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(size))
        layer.bias.copy_(torch.randn(size))
        if place != "rows":
            getattr(layer, {"gamma": "weight", "beta": "bias"}[place])[size // 2] = number
    argument, held = native.norm_argument(layer)
    got, narrow = torch.empty(40, size), torch.empty(40, size, dtype=torch.bfloat16)
    steps.norms(
        ctypes.byref(argument),
        *(ctypes.c_void_p(rows.data_ptr()), ctypes.c_int64(len(rows)), size),
        *(ctypes.c_void_p(one.data_ptr()) for one in (got, narrow)),
    )
    expected = layer(rows).detach()
    del held
    assert_same_kind(got, expected)
    assert_same_kind(narrow, expected.to(torch.bfloat16))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("table", ["word_embeddings", "token_type_embeddings", "position_embeddings"])
@pytest.mark.parametrize("size", [40, 64])
@pytest.mark.usefixtures("kernels")
@torch.inference_mode()
def test_the_embeddings(size: int, table: str, number: float) -> None:
    """Of the rows with such an embedding; the others have what they have without, to the bit."""
    torch.manual_seed(0)
    embeddings = BertEmbeddings(BertConfig(vocab_size=9, hidden_size=size, max_position_embeddings=9)).eval()
    ids = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 2]]),
        "token_type_ids": torch.tensor([[0, 1, 0, 0, 1]]),
        "position_ids": torch.tensor([[0, 2, 3, 4, 2]]),
    }
    [module] = native_embeddings.native_embeddings(embeddings).values()
    before = module(**ids)
    getattr(embeddings, table).weight[1 if table == "token_type_embeddings" else 2, size - 1] = number
    [module] = native_embeddings.native_embeddings(embeddings).values()
    got, expected = module(**ids), embeddings(**ids)
    assert_same_kind(got, expected)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5, equal_nan=True)
    assert torch.equal(got[0, [0, 2, 3]], before[0, [0, 2, 3]])


# ------------------------------------------------------------------------------------------- attention


def packing_of(lengths: list[int]) -> Packing:
    plan = OutputPlan(DType.FLOAT32, hidden_states=(1,))
    return Packing.of(
        [Work(np.zeros(length, np.int64), None, plan, plan.specs(length, 96)) for length in lengths]
    )


def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of one text as transformers has it; (T, heads, head_dim) each, and the result too."""
    query, key, value = (one.transpose(0, 1) for one in (query, key, value))
    return ((query @ key.transpose(1, 2) * scaling).softmax(-1) @ value).transpose(0, 1)


def maps_of(
    write: Callable[..., None], query: torch.Tensor, key: torch.Tensor, packing: Packing
) -> list[MapTap]:
    taps = [
        MapTap(text, start, end, (0, 1), None, False, torch.full((2, end - start, end - start), 7.0))
        for text, (_, start, end) in enumerate(packing.rows())
    ]
    write(query, key, taps, 0.2, None)
    return taps


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("place", ["query", "key", "value"])
@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.usefixtures("kernels")
def test_attention_and_maps(number: float, place: str, dtype: torch.dtype) -> None:
    """Of the text that has such a number; those beside it have what they have without, to the bit."""
    kernel = native.attention_kernel()
    assert kernel is not None
    packing = packing_of([5, 21, 130])
    torch.manual_seed(0)
    clean = {name: torch.randn(packing.num_rows, 2, 32).to(dtype) for name in ("query", "key", "value")}
    spoilt = {name: tensor.clone() for name, tensor in clean.items()}
    text = slice(*packing.cu_seqlens[1:3])
    spoilt[place][text.start + 3, 1, 5] = number

    got, before = (
        kernel(**tensors, packing=packing, scaling=0.2, window=None) for tensors in (spoilt, clean)
    )
    expected = eager(*(tensor[text].float() for tensor in spoilt.values()), 0.2)
    assert not expected.isfinite().all()
    assert_same_kind(got[text], expected)
    beside = torch.ones(len(got), dtype=torch.bool)
    beside[text] = False
    assert torch.equal(got[beside], before[beside])

    by_torch = maps_of(write_maps, spoilt["query"], spoilt["key"], packing)
    for one, other in zip(
        maps_of(kernel.write_maps, spoilt["query"], spoilt["key"], packing), by_torch, strict=True
    ):
        torch.testing.assert_close(one.target, other.target, atol=1e-6, rtol=1e-5, equal_nan=True)
    assert bool(by_torch[1].target.isnan().any()) == (place != "value")


@pytest.mark.parametrize("place", ["query", "key", "value"])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 21])
def test_attention_by_torch(length: int, place: str) -> None:
    """Where there is no compiler. torch's fused kernel by itself gives numbers for some of these."""
    packing = packing_of([length, 30])
    torch.manual_seed(0)
    tensors = {name: torch.randn(packing.num_rows, 2, 16) for name in ("query", "key", "value")}
    tensors[place][length // 2, 1, 5] = NAN
    got = attend_runs(**tensors, packing=packing, scaling=0.2, window=None)
    assert_same_kind(got[:length], eager(*(tensor[:length] for tensor in tensors.values()), 0.2))
    assert got[length:].isfinite().all()


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.usefixtures("kernels")
def test_scores_far_below_zero(window: int | None, dtype: torch.dtype) -> None:
    """Lower than that of any key that is not there."""
    kernel = native.attention_kernel()
    assert kernel is not None
    packing = packing_of([5, 20])
    torch.manual_seed(0)
    query = torch.full((packing.num_rows, 1, 32), 1e16).to(dtype)
    key = (-1e16 * (1 + torch.rand(packing.num_rows, 1, 32))).to(dtype)
    value = torch.randn(packing.num_rows, 1, 32).to(dtype)
    got = kernel(query, key, value, packing, 1.0, window)
    expected = attend_runs(query.double(), key.double(), value.double(), packing, 1.0, window)
    torch.testing.assert_close(got.double(), expected, atol=1e-2, rtol=1e-2)


# ---------------------------------------------------------------------------------- layers and models


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.usefixtures("kernels")
@torch.inference_mode()
def test_a_layer(number: float, dtype: torch.dtype) -> None:
    kernel = native_layer.layer_kernel()
    assert kernel is not None
    config = BertConfig(
        hidden_size=96, num_attention_heads=3, intermediate_size=160, attn_implementation="eager"
    )
    torch.manual_seed(0)
    layer = BertLayer(config).eval()
    fused = FusedBertLayer(layer)
    if not native_layer.is_native(fused, kernel, dtype):
        pytest.skip("this processor has no kernel for 16 bits")
    encoder = NativeBertEncoder(kernel, [fused], dtype)
    packing = packing_of([5, 21, 130])
    rows = torch.randn(1, packing.num_rows, 96)
    before = encoder(rows, taps=Taps(packing, 1, CPU)).last_hidden_state[0]
    text = slice(*packing.cu_seqlens[1:3])
    rows[0, text.start + 3, 7] = number
    got = encoder(rows, taps=Taps(packing, 1, CPU)).last_hidden_state[0]
    assert_same_kind(got[text], layer(rows[:, text])[0])
    assert got[text].isnan().all()
    beside = torch.ones(len(got), dtype=torch.bool)
    beside[text] = False
    assert torch.equal(got[beside], before[beside])


def everything_of(facts: ModelFacts, ids: list[int]) -> Work:
    """All hidden states, all maps and the mean."""
    maps = AttentionPlan(tuple(range(facts.num_layers)), tuple(range(facts.num_attention_heads)), False, None)
    plan = OutputPlan(
        DType.FLOAT32,
        hidden_states=tuple(range(facts.num_layers + 1)),
        attentions=maps,
        embeddings=(mean_of(facts, len(ids)),),
    )
    types = np.zeros(len(ids), np.int64) if facts.type_vocab_size else None
    return Work(np.array(ids), types, plan, plan.specs(len(ids), facts.hidden_size))


def assert_nan_as_in_transformers(name: str, dtype: str, folder: Path) -> Engine:
    """With a token whose embedding has a NaN: in its own text where transformers has it, and not beside it."""
    families.build(name, folder, num_layers=2, gain=0.5)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    loaded = load_model(
        name, str(folder), device="cpu", dtype=dtype, trust_remote_code=False, max_input_tokens=0
    )
    token = 12
    for one in (model, loaded.model):
        one.get_input_embeddings().weight.detach()[token, 3] = NAN
    engine = Engine(loaded)
    fine, spoilt = [5, 6, 7, 8, 9], [5, 6, token, 8, 9, 10, 11]
    [alone] = engine.run([everything_of(engine.facts, fine)])
    beside, got = engine.run([everything_of(engine.facts, ids) for ids in (fine, spoilt)])
    for tensor, expected in zip(beside, alone, strict=True):
        np.testing.assert_allclose(tensor.data, expected.data, atol=1e-2, rtol=1e-2)
    with torch.inference_mode():
        output = model(torch.tensor([spoilt]), output_hidden_states=True, output_attentions=True)
    states, maps, mean = (torch.from_numpy(tensor.data) for tensor in got)
    for ours, theirs in ((states, torch.cat(output.hidden_states)), (maps, torch.cat(output.attentions))):
        assert theirs.isnan().any()
        assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(mean.isnan(), output.last_hidden_state[0].mean(0).isnan())
    return engine


@pytest.mark.parametrize("name", [name for name, one in families.FAMILIES.items() if one.model_type != "t5"])
def test_a_token_whose_embedding_is_not_finite(name: str, tmp_path: Path) -> None:
    engine = assert_nan_as_in_transformers(name, "float32", tmp_path)
    assert engine.facts.packed == (families.FAMILIES[name].model_type in FAMILIES)


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta_v2"])
def test_such_a_token_in_16_bits(name: str, tmp_path: Path) -> None:
    assert_nan_as_in_transformers(name, "bfloat16", tmp_path)


def test_such_a_token_with_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_layer, "seconds_of", lambda *_: [1.0, 1.0])
    with kernels_of("emulated tiles"):
        engine = assert_nan_as_in_transformers("bert", "bfloat16", tmp_path)
        assert isinstance(engine._loaded.model.encoder, NativeBertEncoder)


# --------------------------------------------------------------------------------------------- vectors


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", [Pooling.MEAN, Pooling.MAX, Pooling.CLS, Pooling.MEAN_MAX])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.usefixtures("kernels")
def test_pooling(kind: Pooling, normalize: bool, number: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 37)
    hidden[4, 3] = hidden[6, 20] = number
    size = 74 if kind is Pooling.MEAN_MAX else 37
    plan = EmbeddingPlan(kind, (1,), LayerMerge.CONCAT, normalize, size, Encoding.FLOAT32, (), False)
    segments = [(0, 3), (4, 5), (2, 9), (6, 8)]
    got = pool_segments(hidden, segments, plan)
    expected = pool_segments(hidden, segments, plan, lambda *_, **__: None)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_int8_reads_as_not_finite(number: float) -> None:
    vectors = torch.randn(2, 40)
    vectors[1, 7] = number
    encoded, scales = encode_vectors(vectors, Encoding.INT8)
    assert scales is not None
    assert (encoded[1] == 0).all()
    read = encoded * scales[:, None]
    torch.testing.assert_close(read[0], vectors[0], atol=0.02, rtol=0)
    assert read[1].isnan().all()


def test_no_binary_vector_of_nan(tmp_path: Path) -> None:
    """It has no bits for that: the text fails, alone."""
    families.build("bert", tmp_path, num_layers=2)
    loaded = load_model(
        "bert", str(tmp_path), device="cpu", dtype="float32", trust_remote_code=False, max_input_tokens=0
    )
    engine, facts = Engine(loaded), loaded.facts

    def work(ids: list[int]) -> Work:
        plan = OutputPlan(
            DType.FLOAT32, embeddings=(replace(mean_of(facts, len(ids)), encoding=Encoding.BINARY),)
        )
        return Work(
            np.array(ids), np.zeros(len(ids), np.int64), plan, plan.specs(len(ids), facts.hidden_size)
        )

    [answer] = engine.run([work([5, 6, 7])])
    assert answer[0].scales is None
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[6] = NAN
    with pytest.raises(FloatingPointError, match="binary"):
        engine.run([work([5, 6, 7])])
    engine.run([work([5, 7])])

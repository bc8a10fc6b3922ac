"""The CUDA paths, as far as they can be shown without a device: interpreted, and on tensors without data."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import families
from engine.works import works_wanting_everything, works_wanting_vectors

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")

from layertap_server.engine import LoadedModel, load_model, model, transfer
from layertap_server.engine import precision as linear
from layertap_server.engine.attention import attend_runs
from layertap_server.engine.cpu import embeddings as native_embeddings
from layertap_server.engine.cpu import layer as native_layer
from layertap_server.engine.cpu.pooling import pool_natively
from layertap_server.engine.cuda import attention as cuda_attention
from layertap_server.engine.cuda import engine as cuda
from layertap_server.engine.cuda import graphs as cuda_graphs
from layertap_server.engine.cuda import layer as cuda_layer
from layertap_server.engine.cuda.attention import attend_rows, run_rows
from layertap_server.engine.cuda.graphs import GraphedPasses, graph_rows, graph_sizes
from layertap_server.engine.engine import Engine
from layertap_server.engine.fused import replace_modules
from layertap_server.engine.loading.families import FAMILIES
from layertap_server.engine.packed import run_packed
from layertap_server.engine.packing import Packing
from layertap_server.engine.pooled_outputs import fill_pooled
from layertap_server.engine.precision import prepare_linears
from layertap_server.engine.taps import Taps
from layertap_server.engine.transfer import BLOCK_BYTES, DeviceLostError, Transfer, blocks_of
from layertap_server.enums import DType
from layertap_server.plan import OutputPlan, Work

CUDA = torch.device("cuda:0")
if torch.cuda.is_available():
    pytest.skip("with a device the kernels are compiled for it: test_cuda_device.py", allow_module_level=True)

PACKED = [name for name, family in families.FAMILIES.items() if family.model_type in FAMILIES]

# One for each way in which families differ here: fused layers, shared ones, windows and rotary
# embeddings, grouped queries, embeddings of their own.
VARIED = ["bert", "distilbert", "albert", "modernbert", "eurobert", "esm"]
# The graphs of the others take `make test` too long.
GRAPHED = [
    name if name in ("bert", "modernbert") else pytest.param(name, marks=pytest.mark.long) for name in VARIED
]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """Loads a tiny model of a family, in float32, with nothing in it that only the CPU has."""
    models: dict[str, LoadedModel] = {}

    def load_once(name: str) -> LoadedModel:
        if name not in models:
            folder = tmp_path_factory.mktemp(name)
            families.build(name, folder, num_layers=2)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(linear, "fastest_way", lambda weight, bias, dtype: linear.Way.PLAIN)
                patch.setattr(native_layer, "layer_kernel", lambda: None)
                patch.setattr(native_embeddings, "embeddings_kernel", lambda: None)
                models[name] = load_model(
                    name,
                    str(folder),
                    device="cpu",
                    dtype="float32",
                    trust_remote_code=False,
                    max_input_tokens=0,
                )
        return models[name]

    return load_once


# -------------------------------------------------------------------------- attention of any lengths


def packing_of(lengths: list[int]) -> Packing:
    plan = OutputPlan(DType.FLOAT32)
    return Packing.of([Work(np.zeros(length, np.int64), None, plan, ()) for length in lengths])


def bounds_of(packing: Packing, num_rows: int) -> torch.Tensor:
    """(2, rows), the rows behind the texts each a text of its own."""
    total = packing.total_tokens
    bounds = torch.stack([torch.arange(num_rows), torch.arange(1, num_rows + 1)])
    for number, edges in enumerate((packing.cu_seqlens_array[:-1], packing.cu_seqlens_array[1:])):
        bounds[number, :total] = torch.from_numpy(packing.of_each_row(edges))
    return bounds


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # interpreted, numpy warns of what becomes NaN
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_what_is_not_finite_stays_in_its_text(place: str, number: float) -> None:
    """Texts of one program share the steps over their keys."""
    packing = packing_of([5, 7, 70])
    num_rows = packing.total_tokens
    torch.manual_seed(0)
    tensors = {name: torch.randn(num_rows, 2, 16) for name in ("query", "key", "value")}
    bounds = bounds_of(packing, num_rows)
    before = attend_rows(**tensors, scaling=0.25, window=None, bounds=bounds)
    tensors[place][8, 1, 3] = number
    got = attend_rows(**tensors, scaling=0.25, window=None, bounds=bounds)
    query, key, value = (tensor[5:12].transpose(0, 1) for tensor in tensors.values())
    expected = ((query @ key.transpose(1, 2) * 0.25).softmax(-1) @ value).transpose(0, 1)
    beside = torch.ones(num_rows, dtype=torch.bool)
    beside[5:12] = False
    torch.testing.assert_close(got[beside], before[beside], atol=1e-6, rtol=1e-5)
    own, wanted = got[5:12].isfinite().all(-1), expected.isfinite().all(-1)
    assert not wanted.all()
    assert torch.equal(own, wanted)


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("lengths", [[1], [7, 7, 30], [1, 40, 2, 65, 3], [130]])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 24), (torch.float16, 32)])
def test_attention_by_rows_is_attention_of_each_text(
    dtype: torch.dtype, head_dim: int, lengths: list[int], window: int | None
) -> None:
    packing = packing_of(lengths)
    num_rows = packing.total_tokens + 5
    torch.manual_seed(0)
    products = torch.randn(num_rows, 3, 3, head_dim)  # as one product gives query, key and value
    query, key, value = products.unbind(1)
    got = attend_rows(
        query, key.to(dtype), value.to(dtype), 0.25, window, bounds=bounds_of(packing, num_rows)
    )
    expected = attend_runs(query, key, value, packing, 0.25, window)
    total = packing.total_tokens
    atol = 5e-6 if dtype is torch.float32 else 4e-3
    assert got.dtype is dtype
    torch.testing.assert_close(got[:total].float(), expected[:total], atol=atol, rtol=1e-5)
    torch.testing.assert_close(got[total:].float(), value[total:], atol=atol, rtol=1e-5)


@pytest.fixture
def small_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_ROWS", 128)


@pytest.mark.usefixtures("small_graphs")
@pytest.mark.parametrize("name", VARIED)
def test_the_pass_over_rows_is_the_packed_pass(name: str, load: Callable[[str], LoadedModel]) -> None:
    loaded = load(name)
    with torch.inference_mode():
        assert cuda.largest_error(loaded, run_rows, run_packed) < 1e-4


# ------------------------------------------------------------------------------------------- graphs


class Repeats:
    """Records by doing the work again, which gives what a replay gives if the work reads what it should."""

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        result = work()

        def replay() -> None:
            self.num_replays += 1
            result.copy_(work())

        return replay, result


@pytest.mark.usefixtures("small_graphs")
@pytest.mark.parametrize("name", GRAPHED)
def test_a_graph_serves_any_texts_that_fit(name: str, load: Callable[[str], LoadedModel]) -> None:
    loaded = load(name)
    recorder = Repeats()
    with torch.inference_mode():
        graphed = GraphedPasses(loaded, recorder)
        assert cuda.largest_error(loaded, graphed.run, run_packed) < 1e-4
    engine, plain = Engine(loaded, graphed.run), Engine(loaded)
    before = recorder.num_replays
    for lengths in ([5], [3, 60, 1], [64] * 2, [2] * 60, [2, 3]):
        works = works_wanting_vectors(loaded.facts, lengths)
        assert_same(engine.run(works), plain.run(works))
    assert recorder.num_replays - before == 5


@pytest.mark.usefixtures("small_graphs")
def test_what_no_graph_fits_runs_without(load: Callable[[str], LoadedModel]) -> None:
    loaded = load("bert")
    recorder = Repeats()
    with torch.inference_mode():
        graphed = GraphedPasses(loaded, recorder)
    engine, plain = Engine(loaded, graphed.run), Engine(loaded)
    too_many_rows = works_wanting_vectors(loaded.facts, [64] * 3)
    for works in (works_wanting_everything(loaded.facts), too_many_rows):
        assert_same(engine.run(works), plain.run(works))
    assert recorder.num_replays == 0


def test_graph_sizes_are_few_and_hold_what_runs_in_them() -> None:
    sizes = graph_sizes()
    assert len(sizes) == 40
    for num_rows in range(1, cuda_graphs.MAX_ROWS + 1):
        assert num_rows <= graph_rows(num_rows) in sizes


def assert_same(got: list[Any], expected: list[Any]) -> None:
    for one, other in zip(got, expected, strict=True):
        for tensor, wanted in zip(one, other, strict=True):
            assert tensor.data.dtype == wanted.data.dtype
            atol = (
                2e-5 if tensor.data.dtype == np.float32 else 1
            )  # one unit in the last place of a rounded number
            np.testing.assert_allclose(
                tensor.data.astype(np.float64), wanted.data.astype(np.float64), atol=atol, rtol=1e-4
            )


# ------------------------------------------------------------------ what is faster is found out, not assumed


def broken(loaded: LoadedModel) -> Any:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def wrong(loaded: LoadedModel, packing: Packing, taps: Taps) -> None:
    run_packed(loaded, packing, taps)
    for buffers in taps.buffers:
        for buffer in buffers:
            if buffer is not None:
                buffer[0, 0] = math.nan


def right(loaded: LoadedModel, packing: Packing, taps: Taps) -> None:
    run_packed(loaded, packing, taps)


@pytest.mark.usefixtures("small_graphs")
def test_a_faster_pass_that_is_right_is_taken(load: Callable[[str], LoadedModel]) -> None:
    assert cuda.fastest_pass(load("bert"), [("a", lambda _: right)]) == (right, ["a"])


@pytest.mark.usefixtures("small_graphs")
@pytest.mark.parametrize(
    ("second", "said"), [(broken, "only supports Ampere"), (lambda _: wrong, "differ by nan")]
)
def test_one_that_fails_or_differs_is_not_taken_nor_what_builds_on_it(
    second: Callable[[LoadedModel], Any],
    said: str,
    load: Callable[[str], LoadedModel],
    caplog: pytest.LogCaptureFixture,
) -> None:
    faster = [("a", lambda _: right), ("b", second), ("c", lambda _: right)]
    assert cuda.fastest_pass(load("bert"), faster) == (right, ["a"])
    assert "bert: runs without b" in caplog.text
    assert said in caplog.text


# ------------------------------------------------------------------------------------------ transfer


class Stream:
    device = CUDA

    def __init__(self) -> None:
        self.log: list[str] = []

    def wait_stream(self, other: object) -> None:
        self.log.append("behind the pass")

    def record_event(self) -> "Stream":
        self.log.append("copied")
        return self

    def synchronize(self) -> None:
        self.log.append("waited for")


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """A stream that does all at once, where there is no device."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(transfer, "pinned_like", torch.empty_like)
    return Stream()


def test_results_arrive_as_they_were(stream: Stream) -> None:
    torch.manual_seed(0)
    small = [
        torch.randn(3, 5),
        torch.randn(7).to(torch.bfloat16),
        torch.arange(3, dtype=torch.int8),
        torch.randn(4, 6)[:, ::2],
        torch.randn(0, 5),
        torch.randn(2).half(),
    ]
    large = torch.randn(BLOCK_BYTES)
    tensors = [*small[:4], large, *small[4:]]
    sent = Transfer(tensors, stream)
    assert stream.log == ["behind the pass", "copied"]
    arrays = sent.wait()
    assert stream.log[2:] == ["waited for"]
    for array, tensor in zip(arrays, tensors, strict=True):
        expected = transfer.as_numpy(tensor.contiguous())
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_a_reply_holds_back_little_of_the_others_memory() -> None:
    sizes = [10, BLOCK_BYTES // 2, BLOCK_BYTES // 2, 20, 3 * BLOCK_BYTES, 30, 40]
    blocks = list(blocks_of(sizes, int))
    assert list(chain.from_iterable(blocks)) == sizes
    assert all(len(block) == 1 or sum(block) <= BLOCK_BYTES for block in blocks)


# ------------------------------------------------------------------------------------- a lost device


def fails(*_: object) -> Any:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_lost_device_is_told_from_a_failed_batch(
    load: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cuda, "fastest_pool", lambda loaded: pool_natively
    )  # interpreted, the search takes long
    engine = cuda.CudaEngine(load("bert"))
    works = works_wanting_everything(engine.facts)
    monkeypatch.setattr(engine, "_run_pass", fails)
    for device, raised in ((lambda _: None, RuntimeError), (fails, DeviceLostError)):
        monkeypatch.setattr(torch.cuda, "synchronize", device)
        for call in (engine.run, engine.launch):
            with pytest.raises(raised, match="illegal memory access"):
                call(works)


def test_a_device_lost_meanwhile_is_told_to_who_waits(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "synchronize", fails)
    with pytest.raises(DeviceLostError):
        Transfer([torch.zeros(3)], stream).wait()


# ---------------------------------------------------------------------------------- nothing is waited for

COPIES = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_)


class NothingIsWaitedFor(TorchDispatchMode):
    """Fails at what would wait for a CUDA device: copies that are not pinned, indices that are on the CPU.

    What needs the data itself (item, nonzero, boolean masks) fails by itself on tensors without any.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)]
        on_host = [one for one in tensors if one.device.type == "cpu" and one.dim() > 0]
        if on_host and any(one.is_cuda for one in tensors):
            assert func.overloadpacket in COPIES, f"{func} takes {len(on_host)} tensors of the CPU"
            asynchronous = (kwargs or {}).get("non_blocking") or True in args[2:]
            assert asynchronous, "the copy is waited for"
            assert all(hasattr(one, "pinned") for one in on_host), "the copy is waited for"
        return result


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def pinned(tensor: torch.Tensor) -> Any:
        copy: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
        copy.pinned = True
        return copy

    make_tensor = torch.tensor

    def tensor_of_list(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        assert device is None or torch.device(device).type == "cpu", "torch.tensor to a device is waited for"
        return make_tensor(*args, **options)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)

    def staging(shape: Any, device: object) -> Any:
        return pinned(torch.empty(shape, dtype=torch.int64)), np.empty(shape, np.int64)

    monkeypatch.setattr(transfer, "pinned_like", pinned)
    monkeypatch.setattr(model, "staging", staging)
    # What a kernel in Triton gives, without the kernel.
    monkeypatch.setattr(cuda_attention, "attend_rows", lambda query, key, value, *_, **__: value.contiguous())
    monkeypatch.setattr(
        cuda_layer,
        "sum_norm",
        lambda rows, residual, norm: (torch.empty_like(residual), torch.empty_like(rows)),
    )
    monkeypatch.setattr(
        cuda_layer,
        "embed_norm",
        lambda ids, tables, norm: tables[0].new_empty(len(ids[0]), tables[0].shape[1]),
    )
    monkeypatch.setattr(torch, "tensor", tensor_of_list)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        yield


def rows() -> torch.Tensor:
    return torch.empty(8, 4, device="cuda")


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize(
    "waits",
    [
        lambda: rows().sum().item(),
        lambda: rows().nonzero(),
        lambda: rows()[rows()[:, 0] > 0],
        lambda: rows()[[1, 2]],
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: torch.zeros(3).to("cuda"),
        lambda: torch.zeros(3).to("cuda", non_blocking=True),
        lambda: rows().cpu(),
        lambda: torch.repeat_interleave(rows()[:, 0].long()),
    ],
)
def test_waiting_is_noticed(waits: Callable[[], object]) -> None:
    noticed = (AssertionError, DataDependentOutputException, DynamicOutputShapeException)
    with NothingIsWaitedFor(), pytest.raises(noticed):
        waits()


def on_cuda(loaded: LoadedModel) -> LoadedModel:
    """The model as it would be on a device, in bfloat16; its weights have no data."""
    loaded.model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA))
    layers = loaded.layers
    if loaded.family.has_bert_layers:
        replace_modules(loaded.model, cuda_layer.cuda_modules(loaded.model, torch.bfloat16))
        layers = ()
    prepare_linears(loaded.model, torch.bfloat16, narrow_inside=layers)
    facts = replace(loaded.facts, compute_dtype=DType.BFLOAT16)
    # Poolers stand outside of the model, and are the library's own linear layer and tanh.
    pooler = loaded.pooler and (lambda first_rows: first_rows[:, 0].tanh())
    return replace(loaded, device=CUDA, facts=facts, pooler=pooler, layers=layers)


@pytest.mark.parametrize(
    "name", [name if name in VARIED else pytest.param(name, marks=pytest.mark.long) for name in PACKED]
)
@pytest.mark.parametrize("run", [run_rows, run_packed])
def test_no_pass_waits(
    run: cuda.Pass, name: str, load: Callable[[str], LoadedModel], request: pytest.FixtureRequest
) -> None:
    loaded = copy.deepcopy(load(name))
    request.getfixturevalue("without_data")
    loaded = on_cuda(loaded)
    works = works_wanting_everything(loaded.facts)
    with NothingIsWaitedFor():
        taps = Taps(Packing.of(works), loaded.facts.num_layers, CUDA)
        run(loaded, taps.packing, taps)
        scales = fill_pooled(taps, loaded.pooler)
        tensors = [buffer for buffers in taps.buffers for buffer in buffers if buffer is not None]
        Transfer([*tensors, *(part.block for part in scales.values())], Stream())
    assert len(tensors) == sum(len(work.specs) for work in works)
    assert all(tensor.is_cuda for tensor in tensors)

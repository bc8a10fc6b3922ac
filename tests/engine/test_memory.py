"""What a pass takes of memory: known before it runs, bounded by what is returned, refused where it cannot be had."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel

from families import build
from layertap_server.engine import Engine, ModelLoadError, load_model, memory
from layertap_server.engine.cpu import layer as native_layer
from layertap_server.engine.loading.checkpoint import check_room, read_config
from layertap_server.engine.memory import HeldBytes, available_bytes, container_bytes
from layertap_server.engine.model import LoadedModel
from layertap_server.enums import DType
from layertap_server.output_plans import AttentionPlan
from layertap_server.plan import OutputPlan, Work

NUM_LAYERS, NUM_HEADS, HIDDEN_SIZE, NUM_TOKENS = 6, 12, 96, 512
LAYERS, HEADS = tuple(range(NUM_LAYERS)), tuple(range(NUM_HEADS))
SIZES = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "intermediate_size": 4 * HIDDEN_SIZE,
    "vocab_size": 100,
    "max_position_embeddings": NUM_TOKENS + 2,
}
ALL_MAPS = AttentionPlan(LAYERS, HEADS, False, None)


# Prints the free memory that glibc keeps after three results were allocated and freed, and how many of them
# had a mapping of their own.
FREED_IS_KEPT = """
import ctypes
from layertap_server.engine.memory import keep_freed_memory

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes, libc.mallinfo2.restype = [ctypes.c_void_p], Info

keep_freed_memory()
num_mapped = libc.mallinfo2().hblks
results = [libc.malloc(14 << 20) for _ in range(3)]
num_mapped = libc.mallinfo2().hblks - num_mapped
for result in results:
    libc.free(result)
print(libc.mallinfo2().fordblks >> 20, num_mapped)
"""


def loaded_from(folder: Path) -> LoadedModel:
    return load_model(
        "model", str(folder), device="cpu", dtype="float32", trust_remote_code=False, max_input_tokens=0
    )


@pytest.fixture(scope="module", params=["packed", "padded"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    maker = {"packed": (BertModel, BertConfig), "padded": (MPNetModel, MPNetConfig)}[request.param]
    model_class, config_class = maker
    model_class(config_class(**SIZES)).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patched:
        # Torch's own layers. Otherwise a measurement of time decides between them and native ones, which
        # allocate less.
        patched.setattr(native_layer, "seconds_of", lambda *_: [1.0, 2.0])
        return loaded_from(folder)


def work(loaded: LoadedModel, plan: OutputPlan, num_tokens: int = NUM_TOKENS) -> Work:
    types = np.zeros(num_tokens, np.int64) if loaded.facts.type_vocab_size else None
    return Work(np.full(num_tokens, 7, np.int64), types, plan, plan.specs(num_tokens, HIDDEN_SIZE))


def peak_of(loaded: LoadedModel, *works: Work) -> int:
    engine = Engine(loaded)
    with HeldBytes() as counted:
        engine.run(works)
    return counted.peak


@pytest.mark.parametrize(
    ("dtype", "asked"),
    [
        (DType.FLOAT32, ALL_MAPS),
        (DType.FLOAT16, ALL_MAPS),
        (DType.FLOAT32, AttentionPlan(LAYERS, HEADS, True, None)),
        (DType.FLOAT32, AttentionPlan(LAYERS, HEADS[::2], False, tuple(range(1, NUM_TOKENS, 2)))),
    ],
    ids=["float32", "float16", "mean", "subset"],
)
def test_maps_take_at_most_twice_what_is_returned(
    loaded: LoadedModel, dtype: DType, asked: AttentionPlan
) -> None:
    """Beyond the same pass without them; on the padded path eager attention has them all anyway."""
    with_maps = work(loaded, OutputPlan(dtype, attentions=asked))
    without = work(loaded, OutputPlan(dtype, hidden_states=(NUM_LAYERS,)))
    growth = peak_of(loaded, with_maps) - peak_of(loaded, without)
    assert growth <= 2 * with_maps.result_bytes


def test_no_layer_holds_more_than_its_turn(loaded: LoadedModel) -> None:
    """One row of one head, of all layers: the padded pass lets go of each layer's maps as it goes on."""
    asked = AttentionPlan(LAYERS, (0,), False, (0,))
    peak = peak_of(loaded, work(loaded, OutputPlan(DType.FLOAT32, attentions=asked)))
    less = peak_of(
        loaded, work(loaded, OutputPlan(DType.FLOAT32, attentions=AttentionPlan((0,), (0,), False, (0,))))
    )
    one_layer = NUM_HEADS * NUM_TOKENS**2 * 4
    assert peak < less + one_layer


@pytest.mark.parametrize(
    ("lengths", "plan"),
    [
        ([NUM_TOKENS], OutputPlan(DType.FLOAT32, hidden_states=(NUM_LAYERS,))),
        ([NUM_TOKENS] * 3, OutputPlan(DType.FLOAT32, hidden_states=(0, 3, NUM_LAYERS))),
        ([40] * 20, OutputPlan(DType.FLOAT16, last_hidden_state=True)),
        ([NUM_TOKENS] * 2, OutputPlan(DType.FLOAT32, attentions=ALL_MAPS)),
    ],
    ids=["one", "three", "short", "maps"],
)
def test_the_cost_of_a_pass_is_known(loaded: LoadedModel, lengths: list[int], plan: OutputPlan) -> None:
    works = [work(loaded, plan, length) for length in lengths]
    share = loaded.memory.of_pass(works, packed=loaded.facts.packed) / peak_of(loaded, *works)
    assert 0.8 < share < 1.6


def test_a_pass_that_cannot_fit_is_refused_before_it_runs(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SMALL_BYTES", 0)
    small = work(loaded, OutputPlan(DType.FLOAT32, hidden_states=(1,)), 8)
    large = work(loaded, OutputPlan(DType.FLOAT32, attentions=ALL_MAPS))
    needed = loaded.memory.of_pass([large], packed=loaded.facts.packed)
    engine = Engine(loaded, free=lambda: needed / 2)
    with pytest.raises(
        MemoryError, match=r"a batch of 1 inputs needs \d+ MiB of memory, and \d+ MiB are free"
    ):
        engine.run([large])
    assert engine.run([small])
    assert Engine(loaded, free=lambda: 2 * needed).run([large])


def test_a_model_that_does_not_fit_says_by_how_much(tmp_path: Path) -> None:
    build("bert", tmp_path)
    config = read_config(str(tmp_path), False)
    num_bytes = 4 * sum(weight.numel() for weight in loaded_from(tmp_path).model.state_dict().values())
    cpu = torch.device("cpu")
    check_room(str(tmp_path), config, cpu, False, free=lambda _: 2 * num_bytes + 2**20)
    too_few = r"0 MiB to load, and -3 MiB of memory are free on cpu, 3 MiB too few; free some, or serve"
    with pytest.raises(ModelLoadError, match=too_few):
        check_room(str(tmp_path), config, cpu, False, free=lambda _: -3 * 2**20)


@pytest.fixture
def container(tmp_path: Path) -> Path:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    return tmp_path


def test_free_memory_is_within_the_containers_limit(container: Path) -> None:
    assert container_bytes(container) == 350
    (container / "memory.max").write_text("max\n")
    assert container_bytes(container) == float("inf")
    assert container_bytes(container / "none") == float("inf")


def test_free_memory_is_what_linux_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert available_bytes(meminfo) == float("inf")
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:      12 kB\n")
    assert available_bytes(meminfo) == 12 * 1024


@pytest.mark.long
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc 2.33 tells what it keeps")
def test_memory_of_results_is_used_again() -> None:
    """In a process of its own, from the first result on: by and by glibc comes to it by itself."""
    ended = subprocess.run(
        [sys.executable, "-c", FREED_IS_KEPT], capture_output=True, text=True, check=True, timeout=120
    )
    free_mib, num_mapped = map(int, ended.stdout.split())
    assert (free_mib >= 3 * 14, num_mapped) == (True, 0)

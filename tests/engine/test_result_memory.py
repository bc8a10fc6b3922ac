"""Memory of large results is used again, and never while anybody can still see what is in it."""

from __future__ import annotations

import gc
import queue
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from families import build
from layertap_server.api.serialization import as_buffer
from layertap_server.engine import Engine, load_model, memory, result_memory, taps
from layertap_server.engine.memory import MemoryCost, within_memory
from layertap_server.engine.packing import Packing
from layertap_server.engine.result_memory import MIN_BLOCK_BYTES, ResultMemory
from layertap_server.engine.taps import Taps
from layertap_server.engine.transfer import as_numpy
from layertap_server.enums import DType
from layertap_server.output_plans import AttentionPlan
from layertap_server.plan import OutputPlan, TensorData, Work

MIB = MIN_BLOCK_BYTES
HALF = torch.bfloat16


def lend(kept: ResultMemory, num_mib: float = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return kept.empty((int(num_mib * 4), MIB // 4 // dtype.itemsize), dtype)


@pytest.fixture
def kept() -> Iterator[ResultMemory]:
    gc.freeze()  # to look for garbage in all that other tests have left takes most of a second
    yield ResultMemory(8 * MIB)
    gc.unfreeze()


def test_what_is_let_go_of_is_used_again(kept: ResultMemory) -> None:
    first = lend(kept)
    address = first.data_ptr()
    second = lend(kept)
    assert second.data_ptr() != address
    del first
    assert lend(kept, 2, HALF).data_ptr() == address
    assert lend(kept, 1.5).data_ptr() == address
    assert kept.num_bytes == 4 * MIB


def test_what_is_kept_is_bounded_and_the_rest_is_the_systems(kept: ResultMemory) -> None:
    held = [lend(kept, 3) for _ in range(4)]
    assert kept.num_bytes == 6 * MIB
    assert len({tensor.data_ptr() for tensor in held}) == 4
    del held
    assert lend(kept, 7).nbytes == 7 * MIB  # in the memory that was free
    assert kept.num_bytes == 7 * MIB
    assert lend(kept, 9).nbytes == 9 * MIB
    assert lend(kept, 0.5).nbytes == MIB // 2
    assert kept.num_bytes == 7 * MIB


def test_release_leaves_only_what_is_lent(kept: ResultMemory) -> None:
    lent, free = lend(kept), lend(kept)
    lent.fill_(1)
    del free
    kept.release()
    assert kept.num_bytes == 2 * MIB
    assert (lent == 1).all()
    del lent
    kept.release()
    assert kept.num_bytes == 0


def test_no_memory_for_a_block(kept: ResultMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    lent = lend(kept)

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(result_memory.np, "empty", no_memory)
    with pytest.raises(MemoryError):
        lend(kept)
    monkeypatch.undo()
    assert kept.num_bytes == 2 * MIB
    assert lend(kept).data_ptr() != lent.data_ptr()


def test_where_memory_is_short_what_is_kept_goes_first(
    kept: ResultMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "RESULT_MEMORY", kept)
    lend(kept)
    assert kept.num_bytes == 2 * MIB

    def fails() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(MemoryError):
        within_memory(torch.device("cpu"), fails)
    assert kept.num_bytes == 0

    lend(kept)
    monkeypatch.setattr(memory, "SMALL_BYTES", 0)
    plan = OutputPlan(DType.FLOAT32, hidden_states=(0,))
    works = [Work(np.zeros(4, np.int64), None, plan, plan.specs(4, 32))]
    cost = MemoryCost(row_bytes=1000, pair_bytes=0, hidden_bytes=128)
    cost.check(works, packed=True, free=lambda: 0 if kept.num_bytes else 1e9)
    assert kept.num_bytes == 0


# Views of a tensor's memory; after that, there is no other reference to it.
VIEWS: dict[str, Callable[[torch.Tensor], object]] = {
    "itself": lambda tensor: tensor,
    "slice": lambda tensor: tensor[1:3],
    "view of a view": lambda tensor: tensor.view(-1)[7:].view(torch.uint8)[3:9],
    "detached": lambda tensor: tensor.detach().t()[0],
    "part of a split": lambda tensor: tensor.split([3, 5])[1],
    "storage": lambda tensor: tensor.untyped_storage(),
    "iteration": lambda tensor: iter(tensor.unbind()),
    "array": lambda tensor: tensor.numpy(),
    "array of a view": lambda tensor: tensor[2].numpy()[5:].reshape(-1, 1),
    "bits": lambda tensor: as_numpy(tensor.view(HALF)),
    "array of an array": lambda tensor: np.asarray(memoryview(tensor.numpy()))[3:],
    "frombuffer": lambda tensor: np.frombuffer(tensor.numpy(), np.uint8)[9:],
    "buffer on its way out": lambda tensor: as_buffer(TensorData(tensor.numpy()))[5:100],
    "buffer of a buffer": lambda tensor: memoryview(as_buffer(TensorData(tensor.numpy())))[5:][7:],
    "ctypes": lambda tensor: np.ctypeslib.as_ctypes(tensor.numpy()),
    "tensor of an array": lambda tensor: torch.from_numpy(tensor.numpy()[1:])[1:],
    "dlpack": lambda tensor: np.from_dlpack(tensor.numpy())[2:],
    "closure": lambda tensor: lambda: tensor[0],
}


@pytest.mark.parametrize("look", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference"])
def test_no_view_sees_it_change(
    kept: ResultMemory, look: Callable[[torch.Tensor], object], inference: bool
) -> None:
    with torch.inference_mode(inference):
        tensor = lend(kept)
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        view = look(tensor)
        del tensor
        others = [lend(kept) for _ in range(6)]
    assert all(not start <= other.data_ptr() < end for other in others)
    del view, others
    gc.collect()
    assert kept.num_bytes == 8 * MIB
    again = [lend(kept) for _ in range(4)]
    assert start in {other.data_ptr() for other in again}


def test_a_view_held_by_an_exception_counts(kept: ResultMemory) -> None:
    def fails() -> None:
        array = lend(kept).numpy()
        raise ValueError(array.ctypes.data)

    with pytest.raises(ValueError) as raised:  # its traceback holds the array
        fails()
    address = raised.value.args[0]
    assert lend(kept).data_ptr() != address
    del raised
    gc.collect()
    assert address in {tensor.data_ptr() for tensor in [lend(kept) for _ in range(4)]}


Array = npt.NDArray[np.float32]


def unmarked(array: Array, mark: int) -> bool:
    return bool((array != mark).any())


def test_let_go_of_in_other_threads_while_more_is_taken(kept: ResultMemory) -> None:
    """Three threads each mark what they are lent, hold parts of it for a while, and give them to a fourth,
    which lets go of them; everybody finds the marks that belong there."""
    wrong: list[int] = []
    passed_on: queue.SimpleQueue[tuple[Array, int] | None] = queue.SimpleQueue()

    def take(mark: int) -> None:
        chance = random.Random(mark)
        held: list[Array] = []
        for _ in range(200):
            tensor = lend(kept, chance.choice((1, 1.25, 2)))
            tensor.fill_(mark)
            held.append(tensor.numpy()[chance.randrange(4) :, :: 2**6])
            del tensor
            wrong.extend(mark for array in held if unmarked(array, mark))
            while len(held) > chance.randrange(4):
                passed_on.put((held.pop(chance.randrange(len(held))), mark))

    def let_go() -> None:
        while (one := passed_on.get()) is not None:
            if unmarked(*one):
                wrong.append(one[1])

    threads = [threading.Thread(target=take, args=(mark,)) for mark in (1, 2, 3)]
    last = threading.Thread(target=let_go)
    for thread in (*threads, last):
        thread.start()
    for thread in threads:
        thread.join()
    passed_on.put(None)
    last.join()
    assert not wrong
    assert kept.num_bytes <= 8 * MIB


def test_an_engines_answers_are_their_callers_until_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are held over the passes that follow, through a slice alone, and are still what they were."""
    monkeypatch.setattr(result_memory, "MIN_BLOCK_BYTES", 64)
    monkeypatch.setattr(taps, "RESULT_MEMORY", kept := ResultMemory(MIB))
    build("bert", tmp_path)
    engine = Engine(
        load_model(
            "bert", str(tmp_path), device="cpu", dtype="float32", trust_remote_code=False, max_input_tokens=0
        )
    )
    chance = random.Random(0)
    plans = [
        OutputPlan(DType.FLOAT32, hidden_states=(1,)),
        OutputPlan(DType.BFLOAT16, last_hidden_state=True),
        OutputPlan(
            DType.FLOAT32, hidden_states=(0, 2), attentions=AttentionPlan((0, 1), (0, 2), False, None)
        ),
    ]
    held: list[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]] = []
    for _ in range(60):
        works = []
        for _ in range(chance.randrange(1, 6)):
            ids = np.array([chance.randrange(5, 30) for _ in range(chance.randrange(3, 20))], np.int64)
            plan = chance.choice(plans)
            works.append(Work(ids, np.zeros(len(ids), np.int64), plan, plan.specs(len(ids), 32)))
        for work, outputs in zip(works, engine.run(works), strict=True):
            [alone] = engine.run([work])
            for mine, expected in zip(outputs, alone, strict=True):
                if mine.data.dtype == np.float32:
                    np.testing.assert_allclose(mine.data, expected.data, atol=2e-5)
                part = mine.data[..., 1:]
                held.append((part, part.copy()))
        chance.shuffle(held)
        del held[20:]
        for part, copied in held:
            np.testing.assert_array_equal(part, copied)
    assert 0 < kept.num_bytes <= MIB


def test_neighbours_that_want_one_hidden_state_share_at_most_a_block() -> None:
    """So a slow reader holds back no more than that of the memory of others."""
    width = 256
    plan, other = (OutputPlan(DType.FLOAT32, hidden_states=(index,)) for index in (1, 2))
    wants = [(plan, 600), (plan, 300), (plan, 300), (other, 1000), (plan, 1100), (plan, 1200)]
    works = [Work(np.zeros(n, np.int64), None, one, one.specs(n, width)) for one, n in wants]
    packing = Packing.of(works)
    captured = Taps(packing, 2, torch.device("cpu"))
    hidden = torch.randn(1, packing.total_tokens, width)
    for index in (0, 1, 2):
        captured.write_hidden_state(index, hidden * index)
    blocks: dict[int, int] = {}
    for (work, start, end), [buffer] in zip(packing.rows(), captured.buffers, strict=True):
        assert buffer is not None
        assert buffer.shape == work.specs[0].shape
        np.testing.assert_array_equal(buffer[0], hidden[0, start:end] * work.plan.hidden_indices(2).pop())
        storage = buffer.untyped_storage().data_ptr()
        blocks[storage] = blocks.get(storage, 0) + buffer.nbytes
    assert len(blocks) == 5  # of 300 and 300, 600, 1000, 1100, 1200 tokens
    assert sorted(blocks.values())[:2] == [600 * width * 4] * 2

"""Memory: how much is free, how much a pass needs, and what happens when an allocation fails."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layertap_server.engine.attention_maps import MAP_SCRATCH_BYTES
from layertap_server.engine.contacts import contact_bytes
from layertap_server.engine.heads import STEP_BYTES
from layertap_server.engine.packing import fill_up
from layertap_server.engine.repeats import repeated_bytes
from layertap_server.engine.result_memory import RESULT_MEMORY
from layertap_server.plan import Work

T = TypeVar("T")

# Parts of the messages of the RuntimeErrors that torch, oneDNN and
# CUDA's libraries raise when an allocation fails.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
# Thresholds for glibc: it keeps freed blocks up to the first size for reuse, and up to the second size of
# free memory at the end of the heap. glibc raises its thresholds to these values by itself, in steps, as
# larger blocks are freed. Until then, the memory of a pass and its results went back to the system at the end
# of the pass, and the next pass got new memory, page by page.
KEPT_BLOCK_BYTES, KEPT_BYTES = 2**25, 2**26
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
# A pass that needs no more than this runs without a query of the free
# memory. On CUDA, where the query takes as long as a small pass, this also
# applies up to a share of the memory that was free at load, if that is more.
SMALL_BYTES = 64 * 2**20
SMALL_SHARE = 1 / 64
# Temporary rows and vectors of pooling: a few times `SCRATCH_BYTES` of pooling.py.
POOLING_SCRATCH_BYTES = 8 * 2**20
# Copies of the rows of one step of a head: hidden states and scores, before and after the activation. And of
# the sums of sparse vectors: those of all words, and those of the ones that are returned.
STEP_COPIES, SPARSE_COPIES = 4, 3


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in OUT_OF_MEMORY)
    )


def within_memory(device: torch.device, call: Callable[[], T]) -> T:
    """Returns the result of `call`. If an allocation fails, raises `MemoryError` after all memory that the
    call held has been released."""
    try:
        return call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().partition("\n")[0]
    # Memory is released here, outside of the except block: within it, the error's traceback still refers to
    # every tensor of the pass.
    RESULT_MEMORY.release()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise MemoryError(said or "no memory for this batch")


def keep_freed_memory() -> None:
    """Makes glibc keep memory that a pass has freed, so that the next
    pass reuses it. Applies to the whole process."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc
        mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


# ---------------------------------------------------------------------------------- what is free


def free_bytes(device: torch.device) -> float:
    """Bytes that can still be allocated on the device. On the CPU, the container's limit counts as well."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    return min(available_bytes(), container_bytes())


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes that Linux can provide without swapping; infinity on other systems, where this is not known."""
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return float("inf")


def container_bytes(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes left within the limit of this process's control group (version 2). Inactive file pages count as
    free, since the kernel can reclaim them."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))


# ------------------------------------------------------------------------------ what a pass takes


class HeldBytes(TorchDispatchMode):  # type: ignore[misc]  # torch is not followed by the type checker
    """Counts the bytes of the tensors that torch operations create while this mode is active: those alive now
    (`held`), and their maximum (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.held += num_bytes
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._release, key, num_bytes)

    def _release(self, key: int, num_bytes: int) -> None:
        self._storages.discard(key)
        self.held -= num_bytes


@dataclass(frozen=True, slots=True)
class MemoryCost:
    """The peak memory of a pass without its results: measured at
    load, linear in the rows and in the pairs of tokens."""

    # For each row of the batch, padding included, at the point of a layer where most memory is held.
    row_bytes: float
    # For each pair of tokens that attend to each other; about 0 with fused attention.
    pair_bytes: float
    # One row of a hidden state, in float32.
    hidden_bytes: int
    # A pass of at most this size runs without a query of the free memory, if this is more than `SMALL_BYTES`.
    small_bytes: float = 0.0
    # For each row of the batch, if the configured embedding has modules before the pooling.
    projected_row_bytes: float = 0.0
    # For each row that passes through the head at once: its scores or its hidden state, whichever is wider.
    head_row_bytes: float = 0.0

    def of_pass(self, works: Sequence[Work], *, packed: bool) -> float:
        """Bytes of one pass over the texts of one batch, including its results."""
        lengths = [work.num_tokens for work in works]
        longest = max(lengths)
        if packed:
            num_rows, num_pairs = fill_up(sum(lengths)), sum([length**2 for length in lengths])
        else:
            num_rows, num_pairs = len(works) * longest, len(works) * longest**2
        needs = {work.plan.scratch for work in works}
        num_kept = len(frozenset().union(*[one.pooled_layers for one in needs]))
        num_kept += any(one.needs_last for one in needs)
        projected = self.projected_row_bytes if any(one.projects_tokens for one in needs) else 0.0
        num_bytes = num_rows * (self.row_bytes + num_kept * self.hidden_bytes + projected)
        num_bytes += num_pairs * self.pair_bytes + sum([work.result_bytes for work in works])
        if any(one.repeats for one in needs):
            num_bytes += sum(map(repeated_bytes, works))
        if any(one.has_maps for one in needs):
            num_bytes += MAP_SCRATCH_BYTES
        if any(one.has_contacts for one in needs):
            num_bytes += sum(contact_bytes(work.num_tokens) for work in works if work.plan.contacts)
        if largest_vector := max(one.largest_vector for one in needs):
            # Four float32 copies of one vector, in addition to the temporary memory of pooling.
            num_bytes += POOLING_SCRATCH_BYTES + 16 * largest_vector
        if any(one.merges_rows for one in needs):
            num_bytes += longest * self.hidden_bytes  # the merged rows of one text
        if any(one.has_scores for one in needs):
            num_bytes += self._of_head(works)
        return num_bytes

    def _of_head(self, works: Sequence[Work]) -> float:
        """Bytes of scoring: copies of the rows of one step, which has one row at least or, of a head that
        reads whole inputs, one input; and of the sums of sparse vectors."""
        plans = [(work.plan, work.num_tokens) for work in works]
        num_rows = sum(plan.logits.num_rows(length) for plan, length in plans if plan.logits is not None)
        num_rows += sum(length for plan, length in plans if plan.sparse is not None)
        longest = max(length for plan, length in plans if plan.logits is not None or plan.sparse is not None)
        step = max(min(num_rows * self.head_row_bytes, STEP_BYTES), self.head_row_bytes)
        num_sparse = sum(plan.sparse is not None for plan, _ in plans)
        return (
            STEP_COPIES * max(step, longest * self.hidden_bytes)
            + SPARSE_COPIES * num_sparse * self.head_row_bytes
        )

    def check(self, works: Sequence[Work], *, packed: bool, free: Callable[[], float]) -> None:
        """Raises `MemoryError` for a pass that does not fit, even after the free blocks of the result memory
        have been returned to the system."""
        needed = self.of_pass(works, packed=packed)
        if needed <= max(SMALL_BYTES, self.small_bytes) or needed <= free():
            return
        RESULT_MEMORY.release()
        if needed > (left := free()):
            raise MemoryError(
                f"a batch of {len(works)} inputs needs {needed / 2**20:,.0f} MiB of memory, "
                f"and {left / 2**20:,.0f} MiB are free"
            )

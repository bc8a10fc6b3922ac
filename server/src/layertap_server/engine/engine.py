"""The engine: runs a batch of texts through the model and returns the results as host buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from layertap_server.engine.cpu.pooling import pool_natively
from layertap_server.engine.heads import fill_logits
from layertap_server.engine.memory import free_bytes, within_memory
from layertap_server.engine.model import LoadedModel, Pass
from layertap_server.engine.packed import run_packed
from layertap_server.engine.packing import Packing
from layertap_server.engine.padded import run_padded, sub_batches
from layertap_server.engine.pooled_outputs import fill_pooled
from layertap_server.engine.pooling import Pool
from layertap_server.engine.sparse_vectors import compact, fill_sparse
from layertap_server.engine.taps import Part, Taps
from layertap_server.engine.threads import use_one_thread
from layertap_server.engine.transfer import Array, Transfer
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import Outputs, TensorData, Work


class Engine:
    """A loaded model and its passes."""

    def __init__(
        self,
        loaded: LoadedModel,
        run_pass: Pass | None = None,
        *,
        pool: Pool = pool_natively,
        free: Callable[[], float] | None = None,
    ) -> None:
        self._loaded = loaded
        self._run_pass = run_pass or (run_packed if loaded.facts.packed else run_padded)
        self._pool = pool
        self._free_bytes = free or partial(free_bytes, loaded.device)
        # Rows computed by all passes so far, padding included. Guarded by `_counting`.
        self.num_rows = 0
        self._counting = threading.Lock()
        # The number of cores that may run separate batches at the same time, each in a thread of its own.
        parts = loaded.device.type == "cpu" and loaded.facts.packed and not loaded.one_text_per_pass
        self.num_cores = torch.get_num_threads() if parts else 1
        # The stream of copies to the host, which run at the same time as the next pass.
        self._copies = torch.cuda.Stream(loaded.device) if loaded.device.type == "cuda" else None

    @property
    def facts(self) -> ModelFacts:
        return self._loaded.facts

    def use_one_core(self) -> None:
        """Makes the calling thread compute on one core from now on."""
        use_one_thread()

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[Outputs]:
        """Runs a batch and returns the results in the order given. Every work must want at least one output.

        May be called from several threads at the same time. Uses all cores,
        unless the calling thread has called `use_one_core`. Raises `MemoryError`
        if memory is short; all memory of the pass is released before that.
        """
        return within_memory(self._loaded.device, lambda: self._launch(works).wait())

    def _launch(self, works: Sequence[Work]) -> Pending:
        """Launches the passes of a batch on the device; on the CPU, it runs them to their end."""
        alone = self._loaded.one_text_per_pass
        in_one_pass = self.facts.packed and not alone
        groups = [range(len(works))] if in_one_pass else sub_batches(works, alone=alone)
        return Pending([self._launch_pass(works, group) for group in groups])

    def _launch_pass(self, works: Sequence[Work], group: Sequence[int]) -> PendingPass:
        batch = [works[index] for index in group]
        self._loaded.memory.check(batch, packed=self.facts.packed, free=self._free_bytes)
        packing = Packing.of(batch)
        with self._counting:
            self.num_rows += packing.num_rows if self.facts.packed else packing.num_padded_rows
        taps = Taps(
            packing,
            self.facts.num_layers,
            self._loaded.device,
            self.facts.last_index,
            contact_head=self._loaded.contact_head,
        )
        self._run_pass(self._loaded, packing, taps)
        taps.fill_repeated()
        taps.fill_contacts()
        scales = fill_pooled(taps, self._loaded.pooler, self._pool, self._loaded.projection)
        fill_logits(taps, self._loaded.head)
        fill_sparse(taps, self._loaded.head, self._loaded.sparse)
        blocks = {id(part.block): part.block for parts in taps.parts for part in parts if part is not None}
        blocks |= {id(part.block): part.block for part in scales.values()}
        return PendingPass(
            [group[position] for position in packing.order],
            packing.works,
            taps.parts,
            scales,
            list(blocks),
            Transfer(list(blocks.values()), self._copies),
        )


@dataclass(frozen=True, slots=True)
class PendingPass:
    """One pass over some texts of a batch, whose results are being copied to the host."""

    # For each text in packed order, its index in the batch.
    indices: list[int]
    works: Sequence[Work]
    # The results of each text in the order of its specs, and by (text, index of the spec) the second value
    # that `encode_vectors` returns for int8 and binary vectors.
    parts: list[list[Part | None]]
    scales: dict[tuple[int, int], Part]
    # The `id()` of each tensor that is copied, in the order of the transfer's tensors.
    blocks: list[int]
    transfer: Transfer

    def wait(self) -> Sequence[Outputs]:
        """Waits for the results and returns them in packed order. Raises `FloatingPointError` if the model
        gave NaN for a binary vector, which cannot express it."""
        arrays = dict(zip(self.blocks, self.transfer.wait(), strict=True))

        def array_of(part: Part | None, shape: Sequence[int]) -> Array:
            assert part is not None  # parts that the taps leave empty are filled after the pass
            block, first, last = part
            return arrays[id(block)][first:last].reshape(shape)

        def arrays_of(work: Work, parts: Sequence[Part | None]) -> list[Array]:
            plan, specs = work.plan.sparse, work.specs
            if plan is None:
                return [array_of(part, spec.shape) for part, spec in zip(parts, specs, strict=True)]
            first = next(number for number, spec in enumerate(specs) if spec.is_bound)
            ids, weights = (part and array_of(part, (1, -1)) for part in parts[first : first + 2])
            assert weights is not None
            found = [
                array_of(part, spec.shape)
                for part, spec in zip(parts, specs, strict=True)
                if not spec.is_bound
            ]
            found[first:first] = compact(ids, weights, plan)
            return found

        answers = [
            tuple([TensorData(array) for array in arrays_of(work, parts)])
            for work, parts in zip(self.works, self.parts, strict=True)
        ]
        for (text, number), part in self.scales.items():
            beside = array_of(part, (-1,))
            if self.works[text].specs[number].num_scales:
                answers[text][number].scales = beside
            elif beside.any():
                raise FloatingPointError("the model computed NaN, which a binary vector cannot represent")
        return answers


@dataclass(frozen=True, slots=True)
class Pending:
    """A batch that has been launched."""

    passes: list[PendingPass]

    def wait(self) -> list[Outputs]:
        """Waits for the results and returns them in the order of the batch. Raises `DeviceLostError` if the
        device has failed, and what `PendingPass.wait` raises."""
        answers: dict[int, Outputs] = {}
        for one in self.passes:
            answers.update(zip(one.indices, one.wait(), strict=True))
        return [answers[index] for index in range(len(answers))]

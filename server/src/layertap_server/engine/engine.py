"""One forward pass for one batch: plain data in, host buffers out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from layertap_server.engine.cpu.pooling import pool_natively
from layertap_server.engine.memory import free_bytes, within_memory
from layertap_server.engine.model import LoadedModel, Pass
from layertap_server.engine.packed import run_packed
from layertap_server.engine.packing import Packing
from layertap_server.engine.padded import run_padded, sub_batches
from layertap_server.engine.pooling import Pool, fill_pooled
from layertap_server.engine.taps import Part, Taps
from layertap_server.engine.threads import use_one_thread
from layertap_server.engine.transfer import Array, Transfer
from layertap_server.plan import ModelFacts, Outputs, TensorData, Work


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
        # Computed so far, of all passes: those beyond the texts' tokens are padding.
        self.num_rows = 0
        self._counting = threading.Lock()
        # That may take batches apart from each other, each in a thread of its own.
        parts = loaded.device.type == "cpu" and loaded.facts.packed and not loaded.runs_alone
        self.num_cores = torch.get_num_threads() if parts else 1
        # Copies to the host run here, beside the next pass.
        self._copies = torch.cuda.Stream(loaded.device) if loaded.device.type == "cuda" else None

    @property
    def facts(self) -> ModelFacts:
        return self._loaded.facts

    def use_one_core(self) -> None:
        """For what the calling thread computes from now on."""
        use_one_thread()

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[Outputs]:
        """Answers a batch, in the order given, with the cores of the calling thread: all, unless it has said
        otherwise. Several threads may. Every work wants something of the model.

        Raises `MemoryError` where memory is short; by then all that the pass held is released.
        """
        return within_memory(self._loaded.device, lambda: self._launch(works).wait())

    def _launch(self, works: Sequence[Work]) -> Pending:
        """Gives the device its work; on the CPU, does it."""
        alone = self._loaded.runs_alone
        in_one_pass = self.facts.packed and not alone
        groups = [range(len(works))] if in_one_pass else sub_batches(works, alone=alone)
        return Pending([self._launch_pass(works, group) for group in groups])

    def _launch_pass(self, works: Sequence[Work], group: Sequence[int]) -> PendingPass:
        batch = [works[index] for index in group]
        self._loaded.memory.check(batch, packed=self.facts.packed, free=self._free_bytes)
        packing = Packing.of(batch)
        with self._counting:
            self.num_rows += packing.num_rows if self.facts.packed else packing.num_padded_rows
        taps = Taps(packing, self.facts.num_layers, self._loaded.device, self.facts.last_index)
        self._run_pass(self._loaded, packing, taps)
        taps.fill_repeated()
        scales = fill_pooled(taps, self._loaded.pooler, self._pool, self._loaded.projection)
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
    """One pass over some texts of a batch, whose results are on their way to the host."""

    # Index in the batch of each text, as it was packed.
    indices: list[int]
    works: Sequence[Work]
    # Of each text, in the order of its specs; and what `encode_vectors` gives beside them, by text and number of
    # the tensor.
    parts: list[list[Part | None]]
    scales: dict[tuple[int, int], Part]
    # The ids of the tensors that travel, in their order.
    blocks: list[int]
    transfer: Transfer

    def wait(self) -> Sequence[Outputs]:
        """The answers, as the texts were packed. Raises `FloatingPointError` where a binary vector would hide
        that the model gave NaN."""
        arrays = dict(zip(self.blocks, self.transfer.wait(), strict=True))

        def array_of(part: Part | None, shape: Sequence[int]) -> Array:
            assert part is not None  # pooling has filled what taps have not
            block, first, last = part
            return arrays[id(block)][first:last].reshape(shape)

        answers = [
            tuple(
                [TensorData(array_of(part, spec.shape)) for part, spec in zip(parts, work.specs, strict=True)]
            )
            for work, parts in zip(self.works, self.parts, strict=True)
        ]
        for (text, number), part in self.scales.items():
            beside = array_of(part, (-1,))
            if self.works[text].specs[number].num_scales:
                answers[text][number].scales = beside
            elif beside.any():
                raise FloatingPointError("the model gave NaN, which a binary vector cannot say")
        return answers


@dataclass(frozen=True, slots=True)
class Pending:
    """A batch that was launched."""

    passes: list[PendingPass]

    def wait(self) -> list[Outputs]:
        """Its answers, in its order. Raises what the device has run into meanwhile."""
        answers: dict[int, Outputs] = {}
        for one in self.passes:
            answers.update(zip(one.indices, one.wait(), strict=True))
        return [answers[index] for index in range(len(answers))]

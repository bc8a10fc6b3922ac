"""CUDA graphs: a small pass launched at once, where kernel by kernel the launching takes longer than the work.

Recorded at load for a few numbers of rows. The texts' ids, positions and places are read at each
replay, so a graph serves any texts that fit; texts short of its number are empty ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from layertap_server.engine.cuda_attention import Sequences, sequence_starts
from layertap_server.engine.families import ModelInputs
from layertap_server.engine.model import LoadedModel
from layertap_server.engine.packed import run_varlen
from layertap_server.engine.packing import Packing, fill_up
from layertap_server.engine.taps import Taps
from layertap_server.engine.transfer import to_device
from layertap_server.plan import DType, ModelFacts, OutputPlan, Work

logger = logging.getLogger(__name__)

# Beyond so many rows the device is busy for longer than the launching takes; and texts of one graph.
MAX_ROWS = 2048
MAX_TEXTS = 32
# Matrix products work in tiles of about so many rows: finer sizes would save nothing.
ROW_STEP = 64
MAX_FILL = 1 / 4


def graph_rows(num_rows: int) -> int:
    """The rows of the graph that so many rows run in."""
    return fill_up(num_rows, ROW_STEP, MAX_FILL)


def graph_sizes(facts: ModelFacts) -> list[int]:
    """The numbers of rows that are recorded, ascending."""
    most = min(MAX_ROWS, MAX_TEXTS * facts.max_tokens)
    return [rows for rows in range(ROW_STEP, most + 1, ROW_STEP) if graph_rows(rows) == rows]


class Records(Protocol):
    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Does the work, and gives what does it again, and the tensor where its result then is."""


class Recorder:
    """Records what a CUDA device is given to do, in one pool of memory: of its graphs one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        current = torch.cuda.current_stream(self._device)
        # Within the current stream too: a recording that fails may leave its own behind (torch 2.8).
        with torch.cuda.device(self._device), torch.cuda.stream(current):
            # Once as it is: libraries choose their kernels at the first call, which cannot be recorded.
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                work()
            graph = torch.cuda.CUDAGraph()
            # thread_local: the threads of models that are served already go on as they please.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = work()
        return graph.replay, result


@dataclass(frozen=True, slots=True)
class GraphedPass:
    """All layers over a fixed number of rows."""

    replay: Callable[[], None]
    # Read by a replay: the arguments of the model's forward, (1, rows, …) each, and (MAX_TEXTS + 2,).
    inputs: ModelInputs
    cu_seqlens: torch.Tensor
    # Written by a replay: the last hidden state, (1, rows, H).
    hidden: torch.Tensor

    @classmethod
    def of(cls, loaded: LoadedModel, num_rows: int, recorder: Records) -> GraphedPass:
        packing = full_packing(num_rows, loaded.facts.max_tokens)
        inputs = {name: rows.clone() for name, rows in loaded.packed_inputs(packing).items()}
        cu_seqlens = places(packing, num_rows, loaded.device)
        # Of texts, and of the filling behind them.
        longest = min(num_rows, max(loaded.facts.max_tokens, ROW_STEP, int(num_rows * MAX_FILL)))
        sequences = Sequences(cu_seqlens, longest)

        def run() -> torch.Tensor:
            taps = Taps(packing, loaded.facts.num_layers, loaded.device, sequences=sequences)
            loaded.run_layers(taps, {**inputs, "taps": taps})
            return taps.kept[taps.num_layers][None]

        replay, hidden = recorder.record(run)
        return cls(replay, inputs, cu_seqlens, hidden)

    def run(self, packing: Packing, inputs: ModelInputs) -> torch.Tensor:
        """(1, rows, H), until the next run."""
        for name, rows in inputs.items():
            self.inputs[name][:, : packing.num_rows].copy_(rows)
        num_rows = self.hidden.shape[1]
        self.cu_seqlens.copy_(places(packing, num_rows, self.cu_seqlens.device))
        self.replay()
        return self.hidden


class GraphedPasses:
    """The varlen pass, by a graph where one fits."""

    def __init__(self, loaded: LoadedModel, recorder: Records) -> None:
        sizes = graph_sizes(loaded.facts)
        # The largest first: the others then find room in its memory.
        self._passes = {rows: GraphedPass.of(loaded, rows, recorder) for rows in reversed(sizes)}

    def run(self, loaded: LoadedModel, packing: Packing, taps: Taps) -> None:
        graphed = self._passes.get(graph_rows(packing.num_rows))
        wants_last_alone = not taps.map_taps and {*taps.row_taps, *taps.keep} == {taps.num_layers}
        if graphed is None or not wants_last_alone or len(packing.works) > MAX_TEXTS:
            run_varlen(loaded, packing, taps)
        else:
            taps.write_hidden_state(taps.num_layers, graphed.run(packing, loaded.packed_inputs(packing)))


def record_passes(loaded: LoadedModel) -> GraphedPasses:
    """Graphs of all sizes, and a line in the log of what they take."""
    sizes = graph_sizes(loaded.facts)
    torch.cuda.empty_cache()  # as recording does: what was cached before would be counted as given back
    free_bytes, _ = torch.cuda.mem_get_info(loaded.device)
    passes = GraphedPasses(loaded, Recorder(loaded.device))
    taken_bytes = free_bytes - torch.cuda.mem_get_info(loaded.device)[0]
    logger.info(
        "%s: %d CUDA graphs of %d to %d rows, in %.0f MB",
        loaded.facts.name,
        len(sizes),
        sizes[0],
        sizes[-1],
        taken_bytes / 1e6,
    )
    return passes


def full_packing(num_rows: int, max_tokens: int) -> Packing:
    """Texts that fill so many rows, and want the last hidden state kept."""
    plan = OutputPlan(DType.FLOAT32, pooler_output=True)
    lengths = [min(max_tokens, num_rows - start) for start in range(0, num_rows, max_tokens)]
    return Packing.of([Work(np.zeros(length, np.int64), None, plan, ()) for length in lengths])


def places(packing: Packing, num_rows: int, device: torch.device) -> torch.Tensor:
    return to_device(sequence_starts(packing, num_rows, MAX_TEXTS + 1), device)

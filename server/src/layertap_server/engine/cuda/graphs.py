"""CUDA graphs: a pass launched at once, where kernel by kernel the launching takes longer than the work.

Recorded at load for a few numbers of rows. The texts' ids, positions and places are read at each
replay, so a graph serves any texts that fit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from layertap_server.engine.cuda.attention import over_rows, run_rows
from layertap_server.engine.model import LoadedModel
from layertap_server.engine.packing import Packing, fill_up
from layertap_server.engine.taps import Taps
from layertap_server.plan import DType, OutputPlan, Work

logger = logging.getLogger(__name__)

# Beyond so many rows the device is busy for longer than the launching takes.
MAX_ROWS = 8192
# Matrix products work in tiles of about so many rows: finer sizes would save nothing.
ROW_STEP = 64
MAX_FILL = 1 / 8


def graph_rows(num_rows: int) -> int:
    """The rows of the graph that so many rows run in."""
    return fill_up(num_rows, ROW_STEP, MAX_FILL)


def graph_sizes() -> list[int]:
    """The numbers of rows that are recorded, ascending."""
    return [rows for rows in range(ROW_STEP, MAX_ROWS + 1, ROW_STEP) if graph_rows(rows) == rows]


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
    # Read by a replay, (5, rows): as `LoadedModel.rows_of` has them.
    rows: torch.Tensor
    # Written by a replay: the last hidden state, (1, rows, H).
    hidden: torch.Tensor

    @classmethod
    def of(cls, loaded: LoadedModel, num_rows: int, recorder: Records) -> GraphedPass:
        packing = full_packing(num_rows, loaded.facts.max_tokens)
        rows = loaded.rows_of(packing, num_rows).to(loaded.device, copy=True)

        def run() -> torch.Tensor:
            taps = Taps(packing, loaded.facts.num_layers, loaded.device)
            over_rows(loaded, rows, taps)
            return taps.kept[taps.num_layers][None]

        replay, hidden = recorder.record(run)
        return cls(replay, rows, hidden)

    def run(self, loaded: LoadedModel, packing: Packing) -> torch.Tensor:
        """(1, rows, H), until the next run."""
        self.rows.copy_(loaded.rows_of(packing, self.rows.shape[1]), non_blocking=True)
        self.replay()
        return self.hidden


class GraphedPasses:
    """The pass over rows, by a graph where one fits."""

    def __init__(self, loaded: LoadedModel, recorder: Records) -> None:
        # The largest first: the others then find room in its memory.
        self._passes = {rows: GraphedPass.of(loaded, rows, recorder) for rows in reversed(graph_sizes())}

    def run(self, loaded: LoadedModel, packing: Packing, taps: Taps) -> None:
        graphed = self._passes.get(graph_rows(packing.total_tokens))
        wants_last_alone = not taps.map_taps and {*taps.row_taps, *taps.keep} == {taps.num_layers}
        if graphed is None or not wants_last_alone:
            run_rows(loaded, packing, taps)
        else:
            taps.write_hidden_state(taps.num_layers, graphed.run(loaded, packing))


def record_passes(loaded: LoadedModel) -> GraphedPasses:
    """Graphs of all sizes, and a line in the log of what they take."""
    sizes = graph_sizes()
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

"""CUDA graphs: they launch a whole pass at once. For small batches, launching kernel by kernel takes longer
than the work of the kernels.

A graph is recorded at load for each of a few numbers of rows. The ids, positions and bounds of the texts are
read from memory at each replay, so a graph can be used for any texts that fit into its rows.
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
from layertap_server.enums import DType
from layertap_server.plan import OutputPlan, Work

logger = logging.getLogger(__name__)

# With more rows than this, the device takes longer for the work than the host for launching it.
MAX_ROWS = 8192
# Matrix products are computed in tiles of about this many rows, so graphs in finer steps would save nothing.
ROW_STEP = 64
MAX_FILL = 1 / 8


def graph_rows(num_rows: int) -> int:
    """The number of rows of the graph that runs a batch of `num_rows`."""
    return fill_up(num_rows, ROW_STEP, MAX_FILL)


def graph_sizes() -> list[int]:
    """The numbers of rows for which graphs are recorded, ascending."""
    return [rows for rows in range(ROW_STEP, MAX_ROWS + 1, ROW_STEP) if graph_rows(rows) == rows]


class Records(Protocol):
    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Records `work`. Returns a function that repeats it, and the
        tensor that holds the result afterwards."""


class Recorder:
    """Records work on a CUDA device as graphs. They share one memory
    pool, so only one of them may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        current = torch.cuda.current_stream(self._device)
        # The outer context restores the current stream: in torch 2.8, a recording that fails may leave its
        # own stream set as the current one.
        with torch.cuda.device(self._device), torch.cuda.stream(current):
            # First run without recording: libraries choose their
            # kernels at the first call, which cannot be recorded.
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                work()
            graph = torch.cuda.CUDAGraph()
            # thread_local: calls from other threads, which serve
            # models already, do not invalidate the recording.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = work()
        return graph.replay, result


@dataclass(frozen=True, slots=True)
class GraphedPass:
    """A recorded pass through all layers, for a fixed number of rows."""

    replay: Callable[[], None]
    # The input that a replay reads: (5, rows), as `LoadedModel.rows_of` returns it.
    rows: torch.Tensor
    # The output that a replay writes: the last hidden state, (1, rows, H).
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
        """The last hidden state, (1, rows, H). The next run overwrites it."""
        self.rows.copy_(loaded.rows_of(packing, self.rows.shape[1]), non_blocking=True)
        self.replay()
        return self.hidden


class GraphedPasses:
    """The packed pass with `attend_rows`; uses a graph for a batch
    that fits into one and wants only the last hidden state."""

    def __init__(self, loaded: LoadedModel, recorder: Records) -> None:
        # The largest is recorded first, so that the others reuse its memory.
        self._passes = {rows: GraphedPass.of(loaded, rows, recorder) for rows in reversed(graph_sizes())}

    def run(self, loaded: LoadedModel, packing: Packing, taps: Taps) -> None:
        graphed = self._passes.get(graph_rows(packing.total_tokens))
        wants_last_alone = not taps.map_taps and {*taps.row_taps, *taps.keep} == {taps.num_layers}
        if graphed is None or not wants_last_alone:
            run_rows(loaded, packing, taps)
        else:
            taps.write_hidden_state(taps.num_layers, graphed.run(loaded, packing))


def record_passes(loaded: LoadedModel) -> GraphedPasses:
    """Records graphs of all sizes, and logs the memory that they take."""
    sizes = graph_sizes()
    # Recording empties torch's cache as well: memory that was cached before would distort the difference below.
    torch.cuda.empty_cache()
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
    """Texts that fill exactly `num_rows` and want a pooler output, so that the last hidden state is kept."""
    plan = OutputPlan(DType.FLOAT32, pooler_output=True)
    lengths = [min(max_tokens, num_rows - start) for start in range(0, num_rows, max_tokens)]
    return Packing.of([Work(np.zeros(length, np.int64), None, plan, ()) for length in lengths])

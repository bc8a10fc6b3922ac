"""The engine on a CUDA device: it can launch a batch before the previous one is done, and uses faster passes
if their results are right on this device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from layertap_server.engine.cpu.pooling import pool_natively
from layertap_server.engine.cuda.attention import run_rows
from layertap_server.engine.cuda.graphs import graph_sizes, record_passes
from layertap_server.engine.cuda.pooling import pool_on_cuda
from layertap_server.engine.engine import Engine, Pending
from layertap_server.engine.loading.reference import probe_ids
from layertap_server.engine.memory import within_memory
from layertap_server.engine.model import LoadedModel, Pass
from layertap_server.engine.packed import run_packed
from layertap_server.engine.packing import Packing
from layertap_server.engine.pooling import REDUCTIONS, Pool, pool_segments
from layertap_server.engine.taps import Taps
from layertap_server.engine.transfer import DeviceLostError
from layertap_server.enums import DType, Encoding, LayerMerge
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import EmbeddingPlan
from layertap_server.plan import OutputPlan, Outputs, Work

logger = logging.getLogger(__name__)

# Largest relative Frobenius error of a text's last hidden state between two passes in 16 bits.
TOLERANCE = 1e-2

# Largest relative Frobenius error of vectors between two ways to pool them in float32.
POOLING_TOLERANCE = 1e-5
PROBE_ROWS = 300

# Passes that are faster than the plain packed pass, with their names. Each builds on the one before it.
FASTER: tuple[tuple[str, Callable[[LoadedModel], Pass]], ...] = (
    ("attention by rows", lambda _: run_rows),
    ("CUDA graphs for small batches", lambda loaded: record_passes(loaded).run),
)


class CudaEngine(Engine):
    """An engine on a device that runs asynchronously: a batch can be
    launched before the previous one is done."""

    def __init__(self, loaded: LoadedModel) -> None:
        run_pass = None
        if loaded.facts.packed and loaded.facts.compute_dtype is not DType.FLOAT32:
            run_pass, names = fastest_pass(loaded)
            if names:
                described = ", ".join(["packed without padding", *names])
                loaded = replace(loaded, facts=replace(loaded.facts, attention=described))
        super().__init__(loaded, run_pass, pool=fastest_pool(loaded))

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        with lost_device_noticed(self._loaded.device):
            answers: list[Outputs] = super().run(works)
            return answers

    @torch.inference_mode()
    def launch(self, works: Sequence[Work]) -> Pending:
        """Launches a batch on the device without waiting for it;
        `Pending.wait` waits and returns the results.

        Batches are completed in the order of their launches. Raises `MemoryError` if memory is short, and
        `DeviceLostError`, as `run` and `Pending.wait` do too, if the device itself has failed.
        """
        with lost_device_noticed(self._loaded.device):
            return within_memory(self._loaded.device, lambda: self._launch(works))


@contextmanager
def lost_device_noticed(device: torch.device) -> Iterator[None]:
    """Turns an exception into `DeviceLostError` if the device itself
    has failed: synchronizing it then fails too."""
    try:
        yield
    except Exception as error:
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            raise DeviceLostError(str(error)) from error
        raise


def fastest_pass(
    loaded: LoadedModel, faster: Sequence[tuple[str, Callable[[LoadedModel], Pass]]] = FASTER
) -> tuple[Pass, list[str]]:
    """The last pass of `faster` that works on this device, and the names of the passes up to it.

    The passes are tried in order, up to the first one that fails or whose results differ from those of the
    pass before it. If it is the first of `faster`, the result is the plain packed pass.
    """
    taken: Pass = run_packed
    names: list[str] = []
    for name, make in faster:
        try:
            with torch.inference_mode():
                candidate = make(loaded)
                error = largest_error(loaded, candidate, taken)
        except Exception as failure:  # the device, its driver or torch may raise anything
            logger.warning("%s: runs without %s: %s", loaded.facts.name, name, failure)
            break
        if not error <= TOLERANCE:
            logger.warning("%s: runs without %s: results differ by %.2g", loaded.facts.name, name, error)
            break
        taken = candidate
        names.append(name)
    return taken, names


def fastest_pool(loaded: LoadedModel, one_kernel: Pool = pool_on_cuda) -> Pool:
    """`one_kernel`, if it works on this device with the same results as torch's operations. Else
    `pool_natively`, which declines tensors on CUDA, so that torch's operations are used."""
    try:
        with torch.inference_mode():
            error = pooling_error(loaded, one_kernel)
    except Exception as failure:  # as above
        logger.warning("%s: runs without pooling in one kernel: %s", loaded.facts.name, failure)
        return pool_natively
    if not error <= POOLING_TOLERANCE:
        logger.warning(
            "%s: runs without pooling in one kernel: vectors differ by %.2g", loaded.facts.name, error
        )
        return pool_natively
    return one_kernel


def pooling_error(loaded: LoadedModel, pool: Pool) -> float:
    """The largest relative Frobenius error between `pool` and torch's operations: over all reductions, with
    and without normalizing, for ranges of many lengths."""
    hidden = torch.randn(PROBE_ROWS, loaded.facts.hidden_size, device=loaded.device)
    segments = [(0, 1), (1, 3), (3, PROBE_ROWS), (2, 40), (0, PROBE_ROWS)]
    errors = []
    for pooling, reductions in REDUCTIONS.items():
        dims = loaded.facts.hidden_size * len(reductions) - 1
        for normalize in (False, True):
            plan = EmbeddingPlan(
                pooling, (), LayerMerge.CONCAT, normalize, dims, Encoding.FLOAT32, (), has_spans=False
            )
            got = pool_segments(hidden, segments, plan, pool)
            expected = pool_segments(hidden, segments, plan)
            errors.append((got - expected).norm() / expected.norm())
    return float(torch.stack(errors).max())  # NaN if any error is NaN


def largest_error(loaded: LoadedModel, run: Pass, reference: Pass) -> float:
    """The largest relative Frobenius error of a text's last hidden state between two passes: over texts of
    many lengths, in batches of each size for which there is a graph."""
    errors = []
    for num_rows in graph_sizes():
        works = probe_works(loaded.facts, num_rows - 3)  # not full, so that some rows are padding
        for got, expected in zip(
            hidden_states(loaded, run, works), hidden_states(loaded, reference, works), strict=True
        ):
            errors.append((got - expected).norm() / expected.norm())
    return float(torch.stack(errors).max())  # NaN if any error is NaN


def probe_works(facts: ModelFacts, num_tokens: int) -> list[Work]:
    """Texts of 1, 3, 7, … tokens, `num_tokens` in total, that want their last hidden state."""
    plan = OutputPlan(DType.FLOAT32, last_hidden_state=True)
    works: list[Work] = []
    while num_tokens:
        length = min(2 ** (len(works) + 1) - 1, num_tokens, facts.max_tokens)
        ids = probe_ids(length, facts.vocab_size, length)
        works.append(Work(ids, None, plan, plan.specs(length, facts.hidden_size)))
        num_tokens -= length
    return works


def hidden_states(loaded: LoadedModel, run: Pass, works: Sequence[Work]) -> list[torch.Tensor]:
    taps = Taps(Packing.of(works), loaded.facts.num_layers, loaded.device)
    run(loaded, taps.packing, taps)
    return [buffer for (buffer,) in taps.buffers if buffer is not None]

"""The server for `bench.scheduler`: Layertap's own, with access to its state.

`python -m bench.scheduler_server real DTYPE | instant` prints its address, then answers each line of standard
input with its state, and serves until the input ends. `real` serves the default model; `instant` has the same
tokenizer, and an engine that takes no time.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from bench.echo_server import cpu_s
from layertap_server import app, model_sources
from layertap_server.config import Config
from layertap_server.engine_host import EngineHost
from layertap_server.enums import DType, Pooling
from layertap_server.local_model import LocalModel
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import Outputs, TensorData, Work
from layertap_server.scheduling.calibration import warm_up_work
from layertap_server.scheduling.cost_model import CostModel
from layertap_server.scheduling.fair_queue import Priority
from layertap_server.tokenization.inputs import Text, Truncation
from layertap_server.tokenization.tokenizer_loading import load_tokenizer
from layertap_server.tokenization.worker import Tokenization

SECOND = 1_000_000_000
# A pass over a text with this word fails.
POISON = "xyzzy"


class Instant:
    """An engine with prepared results. While it is held, a pass does not end."""

    def __init__(self) -> None:
        self._bytes = np.zeros(1 << 16, np.uint8)
        self.goes_on = threading.Event()
        self.goes_on.set()

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        self.goes_on.wait()
        return [[TensorData(self._bytes[: spec.nbytes]) for spec in work.specs] for work in works]


class Poisoned:
    """The engine, except that passes fail over texts that begin with these ids."""

    def __init__(self, engine: Any, ids: Sequence[int]) -> None:
        self._engine, self._ids = engine, list(ids)

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        for work in works:
            if work.input_ids[: len(self._ids)].tolist() == self._ids:
                raise RuntimeError("a poisoned input")
        outputs: list[Outputs] = self._engine.run(works)
        return outputs


def facts(name: str) -> ModelFacts:
    """The facts of the default model, as far as requests without a forward pass need them."""
    return ModelFacts(
        name=name,
        architecture="bert",
        revision="",
        hidden_size=384,
        num_layers=6,
        num_attention_heads=12,
        vocab_size=30522,
        type_vocab_size=2,
        max_tokens=512,
        has_pooler=True,
        has_attentions=True,
        default_pooling=Pooling.MEAN,
        default_normalize=True,
        pool_prompt=True,
        prompts={},
        compute_dtype=DType.FLOAT32,
        device="cpu",
        packed=True,
        attention="none",
    )


def load_instant(name: str, source: str, config: Config) -> LocalModel:
    """Replaces `model_sources.load`."""
    tokenization = Tokenization(load_tokenizer(source), max_tokens=512)
    return LocalModel(EngineHost(facts(name), Instant(), config), tokenization)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def state_of(server: app.Server) -> dict[str, Any]:
    """The state: what is in memory and in the queue, counters, and the predicted time of a full batch."""
    [model] = server.service.models.values()
    scheduler = model.scheduler
    stats = scheduler.stats
    return {
        "at_s": time.perf_counter(),
        "cpu_s": cpu_s(),
        "resident_bytes": resident_bytes(),
        "num_tasks": len(asyncio.all_tasks()),
        "queued_tokens": scheduler.queued_tokens,
        "held_bytes": server.service.budget.reserved_bytes,
        "num_answered": stats.num_answered,
        "num_inputs": stats.num_inputs,
        "num_batches": stats.num_batches,
        "num_tokens": stats.num_tokens,
        "busy_s": stats.busy_ns / SECOND,
        "dropped": {" ".join(key): count for key, count in stats.dropped.items()},
        "never_tokenized": model.tokenization.num_cancelled,
        "batch_tokens": scheduler.max_batch_tokens,
        # The time of one such batch from start to end; on one core, if each core runs batches of its own.
        "batch_s": scheduler.admission.cost.predict(scheduler.max_batch_tokens)
        * scheduler.num_cores
        / SECOND,
        "margin": asdict(scheduler.admission.margin),
        "pace": scheduler.admission.cost.slowdown,
        "error": scheduler.admission.cost.error,
        "refused": dict(server.service.refused),
    }


async def serve_layertap(kind: str, dtype: str = "float32") -> None:
    if kind == "instant":
        model_sources.load = load_instant
    # One caller queues 10,000 inputs at once.
    server = app.Server(
        Config(port=0, device="cpu", dtype=dtype, max_queue_tokens=1 << 20, max_inputs_per_request=10_000)
    )
    await server.startup()
    [model] = server.service.models.values()
    print(server.address, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        match line.split():
            case ["poison"]:
                [[encoded]] = model.tokenization.encode_many([([Text(POISON)], Truncation.END)])  # type: ignore[misc]
                model.scheduler.engine = Poisoned(model.scheduler.engine, encoded.input_ids[:-1].tolist())
            case ["hold"]:
                # The predicted backlog is an hour, so that every call with a deadline is rejected.
                model.scheduler.admission.cost = CostModel(fixed_ns=3600 * SECOND)
                model.scheduler.engine.goes_on.clear()  # type: ignore[attr-defined]
                model.scheduler.submit([warm_up_work(model.facts, 8)], Priority.NORMAL, None)
                model.scheduler.wake()
            case ["go"]:
                model.scheduler.engine.goes_on.set()  # type: ignore[attr-defined]
        print(json.dumps(state_of(server)), flush=True)
    await server.shutdown()


if __name__ == "__main__":
    uvloop.run(serve_layertap(*sys.argv[1:]))  # as `app.run` does

"""An engine process for `bench.fronts`: the default model's tokenizer, and an engine that takes no time.

Also the same in one process, and the supervisor with this engine process:
`python -m bench.fronts_engine --serve FRONTS [--real [--model FOLDER]]`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
import numpy as np

from bench.scheduler_server import facts
from layertap_server import app, model_sources
from layertap_server.config import Config
from layertap_server.engine_host import EngineHost
from layertap_server.link.arena import Bytes, WritableArena
from layertap_server.local_model import LocalModel
from layertap_server.model_sources import in_thread
from layertap_server.plan import Outputs, TensorData, Work
from layertap_server.processes import supervisor
from layertap_server.processes.child import run_child
from layertap_server.processes.engine import EngineProcess
from layertap_server.tokenization.tokenizer_loading import load_tokenizer
from layertap_server.tokenization.worker import Tokenization

# The largest result of one input.
NUM_BYTES = 2**25


class Instant:
    """An engine whose results are prepared."""

    def __init__(self, memory: Bytes) -> None:
        self._bytes = memory

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        return [[TensorData(self._bytes[: spec.nbytes]) for spec in work.specs] for work in works]


def load_instant(name: str, source: str, config: Config, memory: Bytes | None = None) -> LocalModel:
    """As `model_sources.load`, which it replaces in one process."""
    engine = Instant(np.zeros(NUM_BYTES, np.uint8) if memory is None else memory)
    tokenization = Tokenization(load_tokenizer(source), max_tokens=512)
    return LocalModel(EngineHost(facts(name), engine, config), tokenization)


class InstantEngine(EngineProcess):
    async def _load_models(self, arena: WritableArena) -> None:
        memory = arena.take(NUM_BYTES)
        for name, source in self._config.models().items():
            self._add(name, await in_thread(load_instant, name, source, self._config, memory))


@click.command()
@click.option("--serve", "num_fronts", type=int, required=True)
@click.option("--real", "is_real", is_flag=True)
@click.option("--device", default="cpu")
@click.option("--metrics-port", default=0)
@click.option("--model", multiple=True)
def serve(num_fronts: int, is_real: bool, device: str, metrics_port: int, model: tuple[str, ...]) -> None:
    config = Config(
        model=model, port=0, grace_s=1.0, fronts=str(num_fronts), device=device, metrics_port=metrics_port
    )
    if num_fronts:
        engine = supervisor.ENGINE if is_real else "bench.fronts_engine"
        sys.exit(supervisor.run(config, num_fronts, engine))
    if not is_real:
        model_sources.load = load_instant
    sys.exit(app.run(config))


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    sys.exit(run_child(InstantEngine))

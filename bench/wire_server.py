"""The real server, service and scheduler with an engine whose results are prepared, for `bench.wire`.

Replies take the same way as in production, without waiting for a model. Prints its address, and serves until
its standard input ends. There are two models of BERT-base's shape: `shared` answers every request from one
buffer, `fresh` copies it for each request, as a real engine would.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import uvloop

from layertap_server import app, model_sources
from layertap_server.api.cooperative import map_with_yields
from layertap_server.config import Config
from layertap_server.engine_host import EngineHost
from layertap_server.enums import DType, Pooling
from layertap_server.local_model import LocalModel
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import Outputs, TensorData, TensorSpec, Work
from layertap_server.tokenization.inputs import Encoded, TokenIds, Truncation

HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, MAX_TOKENS = 768, 12, 12, 512
# All attention maps of one text of 512 tokens in float32, the largest result in the benchmark.
NUM_BYTES = NUM_LAYERS * NUM_HEADS * MAX_TOKENS**2 * 4


class Precomputed:
    """An engine that returns parts of one buffer."""

    def __init__(self, fresh: bool) -> None:
        values = np.random.default_rng(0).standard_normal(NUM_BYTES // 4, np.float32)
        self._bytes: npt.NDArray[np.uint8] = values.view(np.uint8)
        self._fresh = fresh

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        return [[self._tensor(spec) for spec in work.specs] for work in works]

    def _tensor(self, spec: TensorSpec) -> TensorData:
        data = self._bytes[: spec.nbytes].reshape(-1)
        scales = np.ones(spec.num_scales, np.float32) if spec.num_scales else None
        return TensorData(data.copy() if self._fresh else data, scales)


class ReadyTokens:
    """Returns token ids unchanged; a text has one token for each character."""

    is_busy = False

    async def encode(self, inputs: Sequence[Any], truncation: Truncation) -> list[Encoded]:
        # Yields to the event loop in between; a real tokenizer runs in another thread.
        return await map_with_yields(lambda _, one: self._encoded(one), inputs)

    def _encoded(self, one: Any) -> Encoded:
        ids = one.ids if isinstance(one, TokenIds) else np.full(max(len(one.text), 1), 7, np.int64)
        return Encoded(ids, np.zeros_like(ids), 0, False, 0, lambda: None)  # type: ignore[arg-type,return-value]

    def close(self) -> None:
        """Holds nothing."""


def facts(name: str) -> ModelFacts:
    return ModelFacts(
        name=name,
        architecture="bert",
        revision="",
        hidden_size=HIDDEN_SIZE,
        num_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        vocab_size=30522,
        type_vocab_size=2,
        max_tokens=MAX_TOKENS,
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


def load(name: str, source: str, config: Config) -> LocalModel:
    """Replaces `model_sources.load`."""
    return LocalModel(EngineHost(facts(name), Precomputed(name == "fresh"), config), ReadyTokens())  # type: ignore[arg-type]


async def main(settings: dict[str, Any]) -> None:
    model_sources.load = load
    server = app.Server(Config(port=0, model=("shared=none", "fresh=none"), grace_s=0.0, **settings))
    await server.startup()
    print(server.address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.shutdown()


if __name__ == "__main__":
    pairs = (argument.split("=", 1) for argument in sys.argv[1:])
    uvloop.run(main({name: int(value) if value.isdigit() else value for name, value in pairs}))

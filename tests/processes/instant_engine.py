"""An engine process that starts at once, without torch, and answers each input with a pattern of its own.

The value of every element of an input's outputs is its first token id, so that any mix-up of memory shows.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from layertap_server.engine_host import EngineHost
from layertap_server.link.arena import WritableArena
from layertap_server.local_model import LocalModel
from layertap_server.plan import Outputs, TensorData, TensorSpec, Work
from layertap_server.processes.child import run_child
from layertap_server.processes.engine import EngineProcess
from layertap_server.tokenization.tokenizer_loading import LoadedTokenizer
from layertap_server.tokenization.worker import Tokenization
from scheduling.fake_engine import facts

SMALL_BYTES = 1 << 12


class PatternEngine:
    """Large outputs lie in the arena, until nothing refers to them."""

    def __init__(self, arena: WritableArena) -> None:
        self._arena = arena

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        return [[self._filled(spec, int(work.input_ids[0])) for spec in work.specs] for work in works]

    def _filled(self, spec: TensorSpec, value: int) -> TensorData:
        memory = self._arena.take(spec.nbytes) if spec.nbytes > SMALL_BYTES else None
        if memory is None:
            memory = np.empty(spec.nbytes, np.uint8)
        else:
            offset = self._arena.offset_of(memory)
            assert offset is not None
            weakref.finalize(memory, self._arena.free, offset, spec.nbytes).atexit = False
        values = memory.view(np.float32)
        values[:] = value
        return TensorData(values)


class InstantEngine(EngineProcess):
    async def _load_models(self, arena: WritableArena) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
        tokenizer = LoadedTokenizer(words, None, 512, True, frozenset())
        # Rows of 64 elements keep replies of many layers small enough for a test.
        own = replace(facts(), hidden_size=64, vocab_size=100_000)
        host = EngineHost(own, PatternEngine(arena), self._config)
        self._add(own.name, LocalModel(host, Tokenization(tokenizer, max_tokens=512)))


if __name__ == "__main__":
    sys.exit(run_child(InstantEngine))

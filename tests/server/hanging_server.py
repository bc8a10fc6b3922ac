"""A real server process whose passes never end: they stay in native code that has let the interpreter go.

`python hanging_server.py FLAGS`, those of `layertap-server`. It loads no model, so it starts at once, and takes token
ids only.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from layertap_server import cli, model_sources
from layertap_server.config import Config
from layertap_server.engine_host import EngineHost
from layertap_server.local_model import LocalModel
from layertap_server.plan import Outputs, Work
from layertap_server.tokenization.inputs import Encoded
from scheduling.fake_engine import facts


class Hanging:
    """An engine."""

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        ctypes.CDLL(None).sleep(1_000_000)
        raise AssertionError


class ReadyTokens:
    """Takes ids as they are."""

    is_busy = False

    async def encode(self, inputs: Sequence[Any], truncation: object) -> list[Encoded]:
        return [Encoded(one.ids, np.zeros_like(one.ids), 0, False, 0, lambda: None) for one in inputs]  # type: ignore[arg-type,return-value]

    def close(self) -> None:
        """Holds nothing."""


def load(name: str, source: str, config: Config) -> LocalModel:
    """In place of `model_sources.load`."""
    return LocalModel(EngineHost(facts(), Hanging(), config), ReadyTokens())  # type: ignore[arg-type]


if __name__ == "__main__":
    model_sources.load = load
    sys.exit(cli.main())

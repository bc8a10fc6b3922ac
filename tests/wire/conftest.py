"""The real server over an engine whose results are computed already: of BERT-base's shape, at no cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from bench import wire_server
from harness import IS_LINKED, Running, serve


@pytest.fixture
def precomputed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    """Starts such a server with the given settings."""
    if IS_LINKED:
        pytest.skip("its tokenizer cannot be described to a front")
    monkeypatch.setattr("layertap_server.model_sources.load", wire_server.load)
    with ExitStack() as stack:

        def start(**settings: Any) -> Running:
            return stack.enter_context(serve({"shared": "none"}, **settings))

        yield start

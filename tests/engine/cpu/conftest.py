"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.cpu.variants import kernels_of


@pytest.fixture(scope="module", params=["this processor", "emulated tiles"])
def kernels_with_tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """The engine's native code for this processor, and with emulated tiles where it may have none. Skips where
    there is no compiler."""
    with kernels_of(request.param):
        yield

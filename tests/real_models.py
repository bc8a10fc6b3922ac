"""Servers over the default model, and over the README's example: bert-base-chinese's shape with random weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import serve
from layertap_server.config import Config, ConfigError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def default_server() -> Iterator[str]:
    """The address of what `make serve` serves."""
    try:
        models = Config().models()
    except ConfigError as error:
        pytest.skip(str(error))
    with serve(models) as server:
        yield server.address


@pytest.fixture(scope="session")
def example_folder() -> Path:
    """The model that `make chinese-bert` builds, once."""
    folder = ROOT / "build" / "bert-base-chinese-random"
    command = [sys.executable, str(ROOT / "tools" / "chinese_bert.py"), str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "pip install" in built.stderr:
        pytest.skip(built.stderr.strip())
    assert built.returncode == 0, built.stderr
    assert "RANDOM" in built.stdout
    return folder


@pytest.fixture(scope="session")
def example_server(example_folder: Path) -> Iterator[str]:
    """The address of a server over the example."""
    with serve({example_folder.name: example_folder}) as server:
        yield server.address

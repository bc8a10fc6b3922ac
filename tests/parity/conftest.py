"""One real server over the tiny models of every family, shared by all parity tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from reference import Reference, make_references

import layertap
from families import FAMILIES, build_all
from harness import Running, serve


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_all(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def running(folders: dict[str, Path]) -> Iterator[Running]:
    """Where cores may take batches apart from each other they do, whatever is the faster way for models so
    small; texts alone they share."""
    with serve(folders, is_calibrated=False) as running:
        for model in running.models.values():
            model.scheduler.max_shared_tokens = 0
        yield running


@pytest.fixture(scope="session")
def client(running: Running) -> Iterator[layertap.Client]:
    with layertap.Client(running.address) as client:
        yield client


@pytest.fixture(scope="session")
def references(folders: dict[str, Path]) -> dict[str, Reference]:
    return make_references(folders)


@pytest.fixture(params=list(FAMILIES))
def reference(request: pytest.FixtureRequest, references: dict[str, Reference]) -> Reference:
    """Each family in turn."""
    return references[request.param]

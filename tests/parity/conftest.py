"""One real server over the tiny models of every family, shared by all parity tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from reference import Reference, make_references

import layertap
from families import FAMILIES, build_all
from harness import serve
from layertap_server.engine.lanes import LaneEngine


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_all(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def client(folders: dict[str, Path]) -> Iterator[layertap.Client]:
    """Where there are cores to take texts apart from each other they do, whatever is the faster way for models
    so small; texts alone, and those that cannot be parted evenly, they share."""
    with serve(folders) as running, layertap.Client(running.address) as client:
        for model in running.server.service.models.values():
            if isinstance(model.scheduler.engine, LaneEngine):
                model.scheduler.engine.min_tokens = 0
        yield client


@pytest.fixture(scope="session")
def references(folders: dict[str, Path]) -> dict[str, Reference]:
    return make_references(folders)


@pytest.fixture(params=list(FAMILIES))
def reference(request: pytest.FixtureRequest, references: dict[str, Reference]) -> Reference:
    """Each family in turn."""
    return references[request.param]

"""What libraries decide once, when they are first imported, and how tests are shared out to processes."""

from __future__ import annotations

import gc
import os
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores: a thread of one must not spin where another process would compute.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
import torch

import drawings  # noqa: F401  # its profile can be named on the command line

# What gRPC's threads are for.
import layertap_server  # noqa: F401

if not torch.cuda.is_available():
    # Triton interprets kernels.
    os.environ["TRITON_INTERPRET"] = "1"

# One server over three tiny models, shared by the tests of the server's packages; and those over real models.
pytest_plugins = ("server.fixtures", "real_models")

MAX_PROCESSES = 4
# The tests of a file run in one process, and so do those of files that share a fixture whose setup takes long.
GROUPS = {
    "tests/parity/test_parity_mixed.py": "families",
    "tests/parity/test_parity_outputs.py": "families",
    "tests/parity/test_parity_selections.py": "families",
    "tests/parity/test_chinese_bert.py": "real models",
    "tests/parity/test_parity_minilm.py": "real models",
    "tests/test_docs.py": "real models",
}
# These take the longest, and begin first, so that no process is left with one of them at the end.
FIRST = (
    "real models",
    "families",
    "tests/simulation/test_simulation.py",
    "tests/engine/cuda/test_engine.py",
    "tests/parity/test_every_model.py",
    "tests/examples/test_clients.py",
)


def group_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return GROUPS.get(file, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: a process for each core, and no process beside this one for a single file of tests."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_processes = min(num_cores, MAX_PROCESSES)
    files = {argument.partition("::")[0] for argument in config.args}
    if all(file.endswith(".py") for file in files):
        num_processes = min(num_processes, len(files))
    return num_processes if num_processes > 1 else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, with `GROUPS`, and in the order of the collection."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


def pytest_collection_finish() -> None:
    """The modules stay: to look through them for garbage each time would take most of a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {name: place for place, name in enumerate(FIRST)}
        items.sort(key=lambda item: order.get(group_of(item.nodeid), len(order)))

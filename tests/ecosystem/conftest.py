"""A fake server that keeps its requests, and a real one. `make test-ecosystem` runs these tests in an environment
of their own, without torch; those whose package is not installed skip."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.fake_server import FakeEncoder, serving
from layertap.v1 import encoder_pb2 as pb

# Haystack reports its use over the network otherwise.
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
START_S = 240.0


class KeepingEncoder(FakeEncoder):
    """Keeps what arrives. `prompts` are those that are configured with its models."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = {"query": "query: ", "passage": "passage: "}
        self.requests: list[pb.EncodeRequest] = []

    def _model(self, name: str) -> pb.Model:
        model = super()._model(name)
        model.prompts.clear()
        model.prompts.update(self.prompts)
        return model

    def _results(self, request: pb.EncodeRequest, context: Any) -> list[pb.EncodeResult]:
        self.requests.append(request)
        return super()._results(request, context)

    @property
    def prompts_asked(self) -> list[tuple[str, str]]:
        """The `prompt` and the `prompt_name` of each request."""
        return [(request.prompt, request.prompt_name) for request in self.requests]


@pytest.fixture
def fake() -> KeepingEncoder:
    return KeepingEncoder()


@pytest.fixture
def address(fake: KeepingEncoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("LAYERTAP_TOKEN", raising=False)
    with serving(fake) as address:
        yield address


@pytest.fixture(scope="session")
def real_server() -> Iterator[str]:
    """The address of a server over the default model, in a process of its own: torch is not in this one."""
    program = Path(
        os.environ.get("LAYERTAP_TEST_SERVER") or Path(sys.executable).with_name("layertap-server")
    )
    if not program.exists():
        pytest.skip(f"{program}: there is no server to start; make test-ecosystem names one")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LAYERTAP_")}
    server = subprocess.Popen(
        [str(program), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        assert server.stderr is not None
        lines = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"serving on (\S+), ready in", line):
                break
        else:
            pytest.fail("".join(lines))
        yield found[1]
    finally:
        server.kill()
        server.communicate()

"""The clients in examples/ are built by the commands of their READMEs, and read what the Python client reads."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2 as details_pb2

from client.fake_server import FakeEncoder, RequestError, serving
from families import build
from harness import serve
from layertap import Attentions, Client, LayertapError, Result
from layertap.v1 import encoder_pb2 as pb

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TOOLS = {"go": ["go"], "typescript": ["node", "npm"], "java": ["java", "mvn"]}
ADDRESS = "127.0.0.1:50051"
BUILD_S = 900.0
RUN_S = 300.0
ENVIRONMENT = os.environ | {
    # buf is one of the packages for developers.
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "MAVEN_OPTS": f"{os.environ.get('MAVEN_OPTS', '')} -Djansi.mode=strip",
}
CANNOT_BE_FETCHED = re.compile(
    r"dial tcp|no such host|proxyconnect|unrecognized import path|: (?:403|404|410) "  # go
    r"|ENOTFOUND|ECONNREFUSED|ECONNRESET|EAI_AGAIN|ETIMEDOUT|E40[134]"  # npm
    r"|Could not (?:resolve|transfer|find artifact)|Unable to resolve artifact|resolution was re-attempted"  # mvn
)
NUMBER = re.compile(r"-?\d+\.\d+")
SEPARATOR = "\N{HORIZONTAL ELLIPSIS}"


def run(command: list[str], folder: Path, limit_s: float) -> tuple[int, str, str]:
    ended = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, timeout=limit_s, check=False
    )
    return ended.returncode, *(output.decode() for output in (ended.stdout, ended.stderr))


def build_step(command: list[str], folder: Path) -> None:
    """Skips the test if a package cannot be fetched."""
    status, output, errors = run(command, folder, BUILD_S)
    if status and (found := CANNOT_BE_FETCHED.search(output + errors)):
        pytest.skip(f"`{shlex.join(command)}` cannot fetch its packages: {found[0]}")
    assert status == 0, output + errors


@dataclass(frozen=True, slots=True)
class Program:
    folder: Path
    command: str

    def run(self, address: str) -> tuple[int, list[str]]:
        """Its exit status, and the lines that it prints."""
        command = shlex.split(self.command.replace(ADDRESS, address))
        status, output, errors = run(command, self.folder, RUN_S)
        lines = re.sub(r"\x1b\[\d*m", "", output).splitlines()  # mvn
        assert lines, errors
        return status, [line for line in lines if line]


@pytest.fixture(scope="module", params=TOOLS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The client in one language, in a copy of its folder."""
    language = str(request.param)
    for tool in TOOLS[language]:
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    readme = (EXAMPLES / language / "README.md").read_text(encoding="utf-8")
    *steps, command = re.findall(r"^\$ (.+)$", readme, re.MULTILINE)
    assert ADDRESS in command
    root = tmp_path_factory.mktemp(language)
    shutil.copytree(ROOT / "proto", root / "proto")
    folder = root / "examples" / language
    # Without what a developer has generated or installed.
    shutil.copytree(
        EXAMPLES / language, folder, ignore=shutil.ignore_patterns("gen", "dist", "node_modules", "target")
    )
    if language == "go":
        build_step(["go", "mod", "download"], folder)
    for step in steps:
        build_step(shlex.split(step), folder)
    return Program(folder, command)


# ------------------------------------------------------------------------- what it should print


def lines_of(label: str, result: Result) -> Iterator[str]:
    named = {
        "hidden_states": result.hidden_states,
        "attentions": result.attentions,
        "embedding": result.embedding if result.embeddings else None,
    }
    for name, array in named.items():
        if array is not None:
            values = array.reshape(-1)
            shape = " ".join(map(str, array.shape))
            shown = f"{values[0]:.4f} {values[1]:.4f} {SEPARATOR} {values[-1]:.4f}"
            yield f"  {label}: {name} [{shape}]: {shown}"


def lines_of_refusal(client: Client) -> list[str]:
    try:
        client.encode("a text", last_hidden_state=True, max_tokens=1_000_000)
    except LayertapError as error:
        fields = [f"    field {field}: {text}" for field, text in error.violations]
        return [f"  {error.code.name}: {error.message}", f"    reason {error.reason}", *fields]
    raise AssertionError("it was not refused")


def expected_lines(address: str, num_connections: int) -> Iterator[str]:
    """What the program prints of a server, as the Python client reads it."""
    with Client(address, connections=1) as client:
        model = client.model()
        shape = f"{model.num_layers} layers, {model.num_attention_heads} heads"
        yield f"{model.name}: {shape}, {num_connections} connections"
        yield "Encode:"
        row = Attentions(layers=[-1], mean_over_heads=True, query_positions=[0])
        results = client.encode(["a text", "another text"], tokens=True, embeddings=True, attentions=row)
        for index, result in enumerate(results):
            yield from lines_of(str(index), result)
            assert result.tokens is not None
            assert result.attentions is not None
            for token, weight in zip(result.tokens.tokens, result.attentions.reshape(-1), strict=True):
                yield f"  {index}: looks at {token} with {weight:.4f}"
        yield "EncodeStream:"
        for number in range(1, 9):
            yield from lines_of(f"{number}.0", client.encode(f"text {number}", embeddings=True))
        texts = ["a text", "text " * 250]
        maps = Attentions(layers=[0, -1])
        results = client.encode(texts, hidden_states=True, attentions=maps, truncation="end")
        for index, result in enumerate(results):
            yield from lines_of(f"9.{index}", result)
        yield "  10:"
        yield from lines_of_refusal(client)
        yield "a refused request:"
        yield from lines_of_refusal(client)


def assert_same(lines: list[str], expected: list[str]) -> None:
    assert [NUMBER.sub("#", line) for line in lines] == [NUMBER.sub("#", line) for line in expected]
    for line, other in zip(lines, expected, strict=True):
        values, others = ([float(number) for number in NUMBER.findall(one)] for one in (line, other))
        assert values == pytest.approx(others, abs=2e-4), line


# ----------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a real server, which sends the large answer in some fifty chunks."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    build("bert", folder)
    with serve({"bert": folder}, frame_bytes=4096) as running:
        yield running.address


def test_reads_what_python_reads(program: Program, address: str) -> None:
    status, lines = program.run(address)
    assert status == 0
    assert_same(lines, list(expected_lines(address, 1)))


class MixingEncoder(FakeEncoder):
    """Advises three connections. On a stream, it sends a request with one input whole, chunks of different
    requests and inputs mixed, and four frames in each message: the client must end its requests first."""

    def __init__(self) -> None:
        super().__init__()
        self.connections = 3

    def _frames(self, message: pb.EncodeStreamRequest, context: Any) -> Iterator[pb.EncodeStreamResponse]:
        self.sends_whole = len(message.request.inputs) == 1
        yield from super()._frames(message, context)

    def EncodeStream(
        self, requests: Iterator[pb.EncodeStreamRequest], context: Any
    ) -> Iterator[pb.EncodeStreamResponse]:
        frames = super().EncodeStream(requests, context)
        while group := list(islice(frames, 4)):
            yield pb.EncodeStreamResponse(grouped=pb.FrameGroup(frames=group))


def test_uses_the_connections_and_frames_of_several_requests_at_once(program: Program) -> None:
    fake = MixingEncoder()
    with serving(FakeEncoder()) as plain:
        expected = list(expected_lines(plain, fake.connections))
    with serving(fake) as mixing:
        status, lines = program.run(mixing)
    assert status == 0
    assert_same(lines, expected)
    assert [rpc for rpc, _ in fake.peers] == ["GetModel", "Encode", "EncodeStream", "Encode"]
    assert len({peer for _, peer in fake.peers}) == 4


class LoadingEncoder(FakeEncoder):
    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        info = details_pb2.ErrorInfo(reason="LOADING", domain="layertap")
        delay = duration_pb2.Duration(seconds=2, nanos=500_000_000)
        details = [info, details_pb2.RetryInfo(retry_delay=delay)]
        with self._errors(context):
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "the models are loading", details)
        raise AssertionError


def test_says_when_to_try_again(program: Program) -> None:
    with serving(LoadingEncoder()) as loading:
        status, lines = program.run(loading)
    assert status == 1
    assert lines == [
        "failed:",
        "  UNAVAILABLE: the models are loading",
        "    reason LOADING",
        "    try again in 2.5 s",
    ]

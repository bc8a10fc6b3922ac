"""Go's generated code reads the same bytes from a reply as the Python client, for every output kind."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from families import build
from harness import serve
from layertap import Attentions, Embedding, Quantized, Result, Span, _replies, _requests
from layertap._pipeline import Pipeline
from layertap.v1 import encoder_pb2 as pb
from layertap_server.api.serialization import grouped_frame

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "go"
SERVICE = "/layertap.v1.EncoderService"
TEXTS = ["a text", "another text, and longer than the first"]
POOLED = [
    *(Embedding(pooling=pooling) for pooling in ("mean", "cls", "max", "last_token", "mean_max", "pooler")),
    *(Embedding(encoding=encoding) for encoding in ("float32", "float16", "bfloat16", "int8", "binary")),
    Embedding(layers=[0, 1], layer_merge="concat", dimensions=40),
    Embedding(spans=[Span(0, 1), Span(0, 6)], encoding="int8"),
    Embedding(spans=[Span(0, 1), Span(0, 6)], encoding="binary"),
]
EVERYTHING: dict[str, Any] = {
    "last_hidden_state": True,
    "pooler_output": True,
    "hidden_states": True,
    "attentions": True,
    "embeddings": POOLED,
    "tokens": True,
}
CHOSEN: dict[str, Any] = {
    "hidden_states": [-1, 0],
    "attentions": Attentions(layers=[1], mean_over_heads=True, query_positions=[0, -1]),
}


def run(*command: str | Path, cwd: Path) -> None:
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=240)
    if ended.returncode:
        raise RuntimeError(ended.stderr)


@pytest.fixture(scope="module")
def go_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in go/, with code that Go's own plugin generates from the contract."""
    if shutil.which("go") is None:
        pytest.skip("there is no Go toolchain")
    protoc = pytest.importorskip("grpc_tools")
    folder = tmp_path_factory.mktemp("go")
    shutil.copytree(SOURCE, folder, dirs_exist_ok=True)
    try:
        run("go", "mod", "download", cwd=folder)
    except RuntimeError as error:
        pytest.skip(f"the Go modules cannot be had: {error}")
    plugin = folder / "protoc-gen-go"
    run("go", "build", "-o", plugin, "google.golang.org/protobuf/cmd/protoc-gen-go", cwd=folder)
    includes = [ROOT / "proto", Path(next(iter(protoc.__path__))) / "_proto"]
    run(
        *(sys.executable, "-m", "grpc_tools.protoc", f"--plugin={plugin}"),
        *(f"-I{path}" for path in includes),
        *(f"--go_out={folder}", "--go_opt=paths=source_relative"),
        "layertap/v1/encoder.proto",
        cwd=folder,
    )
    run("go", "build", "-o", folder / "reader", ".", cwd=folder)
    return folder / "reader"


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    model = tmp_path_factory.mktemp("models") / "bert"
    build("bert", model)
    with (
        serve({"bert": model}, frame_bytes=4096) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        yield channel


def read_by_go(reader: Path, messages: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
    written = b"".join(kind + struct.pack(">I", len(message)) + message for kind, message in messages)
    ended = subprocess.run([reader], input=written, capture_output=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    found: list[dict[str, Any]] = json.loads(ended.stdout)
    return found


def described(where: str, result: Result, dtype: str) -> list[dict[str, Any]]:
    """The tensors of a result of the Python client, as the Go program describes its own."""
    found = []
    types = {"float32": 1, "float16": 2, "int8": 4, "uint8": 5}

    def add(name: str, array: Any, dtype: str) -> None:
        scale = None
        if isinstance(array, Quantized):
            array, scale = array.values, array.scale.reshape(-1).tolist()
        number = types[array.dtype.name]
        shape = list(array.shape)
        if (
            dtype == "bfloat16" and number == 1
        ):  # numpy has no bfloat16: the client returns float32 of the same value
            number, array = 3, (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)
        data = base64.b64encode(array.tobytes()).decode()
        found.append(
            {"result": where, "name": name, "dtype": number, "shape": shape, "scale": scale, "data": data}
        )

    for name in ("last_hidden_state", "pooler_output", "hidden_states", "attentions"):
        if (array := getattr(result, name)) is not None:
            add(name, array, dtype)
    for number, vector in enumerate(result.embeddings):
        add(f"embeddings.{number}", vector, POOLED[number].encoding or dtype)
    if result.tokens is not None:
        ids = result.tokens.ids.tolist()
        found.append(
            {"result": where, "name": "tokens", "dtype": 0, "shape": ids, "scale": None, "data": None}
        )
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("outputs", [EVERYTHING, CHOSEN], ids=["everything", "chosen"])
def test_go_reads_the_same_bytes(
    channel: grpc.Channel,
    go_reader: Path,
    outputs: dict[str, Any],
    dtype: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layertap._wire.SLICED_BYTES", 0)  # by slices, as large messages are read
    template = _requests.encode_request(dtype=dtype, **outputs)
    reply = channel.unary_unary(f"{SERVICE}/Encode")(_requests.filled(template, TEXTS).SerializeToString())
    expected = [
        one
        for index, result in enumerate(_replies.decode_reply(reply))
        for one in described(f"reply 0.{index}", result, dtype)
    ]

    pipeline = Pipeline(template, ordered=True, max_inputs=len(TEXTS))
    # In one frame, and in many.
    in_one, in_many = (request for _ in range(2) for request in pipeline.submit(TEXTS))
    in_many.accepts_whole = False
    asked = [request.SerializeToString() for request in (in_one, in_many)]
    frames = list(channel.stream_stream(f"{SERVICE}/EncodeStream")(iter(asked)))
    assert len(frames) > 2 * len(TEXTS)
    results = [result for frame in frames for _, result in pipeline.receive(frame)]
    for index, result in enumerate(results):
        expected += described(f"stream {index // len(TEXTS)}.{index % len(TEXTS)}", result, dtype)

    found = read_by_go(go_reader, [(b"R", reply), *((b"F", frame) for frame in frames)])
    assert len(found) == len(TEXTS) * 3 * (19 if outputs is EVERYTHING else 2)
    for one, other in zip(found, expected, strict=True):
        assert one == other, (one["name"], other["name"])
    assert found == read_by_go(go_reader, [(b"R", reply), (b"F", grouped_frame(frames))])


def test_the_go_program_says_what_is_wrong(go_reader: Path) -> None:
    """A reader that would say yes to anything proves nothing."""
    chunk = pb.EncodeStreamResponse(chunk=pb.TensorChunk(offset=1, data=b"1"))
    header = pb.EncodeStreamResponse(
        header=pb.ResultHeader(result=pb.EncodeResult(pooler_output=pb.Tensor(dtype=1, shape=[1])))
    )
    with pytest.raises(AssertionError, match="a chunk at 1, after 0 bytes"):
        read_by_go(go_reader, [(b"F", one.SerializeToString()) for one in (header, chunk)])

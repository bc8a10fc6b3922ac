"""Generates and checks the Python code of the protobuf contract.

`generate` writes client/src/layertap/v1. `check` lints the contract with buf, and fails if the committed code
differs from the generated code. google/rpc/status.proto is read from the installed googleapis-common-protos,
so nothing is downloaded.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import google.rpc
import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = "layertap/v1/encoder.proto"
COMMITTED = ROOT / "client" / "src"
GENERATED = [f"layertap/v1/encoder_pb2{ending}" for ending in (".py", ".pyi", "_grpc.py")]

INCLUDES = [
    ROOT / "proto",
    Path(next(iter(google.rpc.__path__))).parent.parent,  # google/rpc/status.proto
    Path(next(iter(grpc_tools.__path__))) / "_proto",  # google/protobuf/any.proto
]


def run_protoc(*flags: str) -> None:
    if protoc.main(["protoc", *(f"-I{path}" for path in INCLUDES), *flags, CONTRACT]):
        sys.exit("protoc failed")


def generate(into: Path) -> None:
    run_protoc(f"--python_out={into}", f"--pyi_out={into}", f"--grpc_python_out={into}")


def lint(scratch: Path) -> None:
    """Runs buf on the compiled contract: buf itself would download google/rpc from a registry."""
    image = scratch / "contract.binpb"
    run_protoc(f"--descriptor_set_out={image}", "--include_imports", "--include_source_info")
    command = ["lint", str(image), "--config", str(ROOT / "proto" / "buf.yaml"), "--path", CONTRACT]
    if subprocess.run([Path(sys.executable).with_name("buf"), *command], check=False).returncode:
        sys.exit("buf lint failed")


def check(scratch: Path) -> None:
    lint(scratch)
    generate(scratch)
    stale = [
        name
        for name in GENERATED
        if not (COMMITTED / name).exists() or (COMMITTED / name).read_bytes() != (scratch / name).read_bytes()
    ]
    if stale:
        sys.exit(f"stale: {', '.join(stale)}; run `make proto` and commit the result")
    print("the contract passes the lint, and the generated code is up to date")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["generate"]:
            generate(COMMITTED)
        case ["check"]:
            with tempfile.TemporaryDirectory() as folder:
                check(Path(folder))
        case _:
            sys.exit("usage: protoc.py generate|check")

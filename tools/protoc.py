"""Generates and checks the Python code of the protobuf contract.

`generate` writes client/src/layertap/v1. `check` lints the contract with buf, and fails if the committed code
differs from the generated code. Nothing is downloaded: proto/ has a copy of google/rpc/status.proto, of which
no Python code is generated, since that comes from googleapis-common-protos.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = "layertap/v1/encoder.proto"
COMMITTED = ROOT / "client" / "src"
GENERATED = [f"layertap/v1/encoder_pb2{ending}" for ending in (".py", ".pyi", "_grpc.py")]

INCLUDES = [
    ROOT / "proto",
    Path(next(iter(grpc_tools.__path__))) / "_proto",  # google/protobuf/any.proto
]


def generate(into: Path) -> None:
    flags = [f"--python_out={into}", f"--pyi_out={into}", f"--grpc_python_out={into}"]
    if protoc.main(["protoc", *(f"-I{path}" for path in INCLUDES), *flags, CONTRACT]):
        sys.exit("protoc failed")


def lint() -> None:
    command = [Path(sys.executable).with_name("buf"), "lint", ROOT / "proto"]
    if subprocess.run(command, check=False).returncode:
        sys.exit("buf lint failed")


def check(scratch: Path) -> None:
    lint()
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

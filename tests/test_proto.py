"""proto/ is all that protoc and buf need, and says how each language names its code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import grpc_tools
import pytest
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_tools import protoc

from layertap.v1 import encoder_pb2 as pb

PROTO = Path(__file__).resolve().parent.parent / "proto"
WELL_KNOWN = Path(next(iter(grpc_tools.__path__))) / "_proto"  # a protoc by itself has these


def test_packages_are_named() -> None:
    options = pb.DESCRIPTOR.GetOptions()
    assert options.go_package == "layertap/v1;layertapv1"
    assert (options.java_package, options.java_multiple_files) == ("layertap.v1", True)
    assert options.csharp_namespace == "Layertap.V1"


def compiled(name: str, folder: Path) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """The files that protoc reads for one, by name."""
    found = folder / "descriptors"
    arguments = [f"-I{PROTO}", f"-I{WELL_KNOWN}", "--include_imports", f"--descriptor_set_out={found}", name]
    assert protoc.main(["protoc", *arguments]) == 0
    files = descriptor_pb2.FileDescriptorSet.FromString(found.read_bytes()).file
    return {file.name: file for file in files}


def test_protoc_needs_no_other_files(tmp_path: Path) -> None:
    assert set(compiled("layertap/v1/encoder.proto", tmp_path)) == {
        "google/protobuf/any.proto",
        "google/rpc/status.proto",
        "layertap/v1/encoder.proto",
    }


def test_copies_are_those_of_googleapis(tmp_path: Path) -> None:
    """The messages of theirs that a client of this server reads."""
    for name, original, messages in (
        ("google/rpc/status.proto", status_pb2.DESCRIPTOR, ["Status"]),
        ("google/rpc/error_details.proto", error_details_pb2.DESCRIPTOR, ["ErrorInfo", "RetryInfo"]),
    ):
        file = compiled(name, tmp_path)[name]
        for message in messages:
            [copy] = [one for one in file.message_type if one.name == message]
            expected = descriptor_pb2.DescriptorProto()
            original.message_types_by_name[message].CopyToProto(expected)
            for field in [*copy.field, *(field for nested in copy.nested_type for field in nested.field)]:
                field.ClearField("json_name")
            assert copy == expected


@pytest.mark.long
@pytest.mark.timeout(900)
def test_buf_generates_go_code(tmp_path: Path) -> None:
    buf = Path(sys.executable).with_name("buf")
    if not buf.exists() or shutil.which("go") is None:
        pytest.skip("there is no buf or no Go toolchain")
    folder = tmp_path / "proto"
    shutil.copytree(PROTO, folder, ignore=shutil.ignore_patterns("gen"))
    ended = subprocess.run(
        [buf, "generate"], cwd=folder, capture_output=True, text=True, timeout=800, check=False
    )
    if "dial tcp" in ended.stderr or "no such host" in ended.stderr:
        pytest.skip(f"the plugins cannot be fetched: {ended.stderr}")
    assert ended.returncode == 0, ended.stderr
    written = {path.relative_to(folder / "gen").as_posix() for path in (folder / "gen").rglob("*.go")}
    assert written == {"layertap/v1/encoder.pb.go", "layertap/v1/encoder_grpc.pb.go"}
    for name in written:
        assert "package layertapv1\n" in (folder / "gen" / name).read_text(encoding="utf-8")

"""Reflection over the wire: by its protocol, and with the tools that people use."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2

from layertap.v1 import encoder_pb2, encoder_pb2_grpc
from layertap_server.rpc.reflection import add_reflection
from layertap_server.rpc.server import RpcServer

SERVICE = "layertap.v1.EncoderService"
METHODS = {"Encode", "EncodeStream", "Tokenize", "GetModel", "ListModels"}


class Counting(encoder_pb2_grpc.EncoderServiceServicer):
    """Answers each input with the length of its text."""

    async def Encode(
        self, request: encoder_pb2.EncodeRequest, context: grpc.aio.ServicerContext
    ) -> encoder_pb2.EncodeResponse:
        results = [encoder_pb2.EncodeResult(token_count=len(one.text)) for one in request.inputs]
        return encoder_pb2.EncodeResponse(results=results)


@pytest_asyncio.fixture(params=[grpc.aio.server, partial(RpcServer, [])], ids=["stock", "fast"])
async def address(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    server = request.param()
    encoder_pb2_grpc.add_EncoderServiceServicer_to_server(Counting(), server)
    add_reflection([SERVICE], server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture(params=["v1", "v1alpha"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def ask(address: str, version: str, **request: Any) -> reflection_pb2.ServerReflectionResponse:
    """The messages of both versions are the same; the method is called by its name."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        async for reply in call(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=20):
            return reply
    raise AssertionError("no reply")


def files_in(reply: reflection_pb2.ServerReflectionResponse) -> list[descriptor_pb2.FileDescriptorProto]:
    files = reply.file_descriptor_response.file_descriptor_proto
    return [descriptor_pb2.FileDescriptorProto.FromString(file) for file in files]


async def test_lists_our_service_and_the_standard_ones(address: str, version: str) -> None:
    reply = await ask(address, version, list_services="")
    assert [service.name for service in reply.list_services_response.service] == [
        "grpc.channelz.v1.Channelz",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        SERVICE,
    ]


@pytest.mark.parametrize("described", ["v1", "v1alpha"])
async def test_describes_itself(address: str, version: str, described: str) -> None:
    package = f"grpc.reflection.{described}"
    name = {"v1": "grpc/reflection/v1", "v1alpha": "grpc_reflection/v1alpha"}[described] + "/reflection.proto"
    service = f"{package}.ServerReflection"
    for asked in (
        {"file_containing_symbol": service},
        {"file_containing_symbol": f"{service}.ServerReflectionInfo"},
        {"file_containing_symbol": f"{package}.ErrorResponse"},
        {"file_by_filename": name},
    ):
        [file] = files_in(await ask(address, version, **asked))
        assert (file.name, file.package) == (name, package)
        [method] = file.service[0].method
        assert (method.input_type, method.output_type) == (
            f".{package}.ServerReflectionRequest",
            f".{package}.ServerReflectionResponse",
        )
        descriptor_pool.DescriptorPool().AddSerializedFile(file.SerializeToString())  # all its names resolve
    reply = await ask(address, version, all_extension_numbers_of_type=f"{package}.ErrorResponse")
    assert reply.all_extension_numbers_response.base_type_name == f"{package}.ErrorResponse"


@pytest.mark.parametrize(
    "symbol",
    [
        SERVICE,
        f"{SERVICE}.Encode",
        f"{SERVICE}.EncodeStream",
        "layertap.v1.Tensor",
        "grpc.health.v1.Health.Check",
    ],
)
async def test_finds_the_file_of_a_symbol_methods_included(address: str, version: str, symbol: str) -> None:
    files = files_in(await ask(address, version, file_containing_symbol=symbol))
    package = symbol.rsplit(".v1.", 1)[0] + ".v1"
    [file] = [file for file in files if file.package == package]
    if package == "layertap.v1":
        assert {method.name for method in file.service[0].method} == METHODS


@pytest.mark.parametrize("symbol", [f"{SERVICE}.Decode", "layertap.v2.EncoderService", ""])
async def test_an_unknown_symbol_is_not_found(address: str, version: str, symbol: str) -> None:
    reply = await ask(address, version, file_containing_symbol=symbol)
    assert reply.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def tool(name: str) -> str:
    """The path of a Go tool; skips the test where it is not installed."""
    places = [os.environ.get("PATH", ""), str(Path(__file__).parents[2] / "build" / "bin")]
    if go := shutil.which("go"):
        gopath = subprocess.run([go, "env", "GOPATH"], capture_output=True, text=True, timeout=60, check=True)
        places.append(str(Path(gopath.stdout.strip()) / "bin"))
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip(f"{name} is neither on PATH nor in build/bin nor in GOPATH/bin")
    return found


async def output_of(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_grpcurl_lists_and_describes_methods(address: str) -> None:
    grpcurl = [tool("grpcurl"), "-plaintext"]
    assert SERVICE in (await output_of(*grpcurl, address, "list")).splitlines()
    described = await output_of(*grpcurl, address, "describe", f"{SERVICE}.Encode")
    assert "rpc Encode ( .layertap.v1.EncodeRequest ) returns ( .layertap.v1.EncodeResponse )" in described


async def test_grpcurl_calls_by_name(address: str) -> None:
    request = json.dumps({"inputs": [{"text": "four"}], "outputs": {"last_hidden_state": True}})
    output = await output_of(tool("grpcurl"), "-plaintext", "-d", request, address, f"{SERVICE}/Encode")
    [result] = json.loads(output)["results"]
    assert list(result.values()) == [4]


async def test_ghz_runs_without_a_proto(address: str, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(
        json.dumps([{"inputs": [{"text": text}]} for text in ("{{braces}}", "a")]), encoding="utf-8"
    )
    output = await output_of(
        *(
            tool("ghz"),
            "--insecure",
            "--call",
            f"{SERVICE}/Encode",
            "-D",
            str(data),
            "--disable-template-data",
        ),
        *("-n", "200", "-c", "4", "--cpus", "1", "-O", "json", address),
    )
    report = json.loads(output)
    assert report["count"] == 200
    assert report["statusCodeDistribution"] == {"OK": 200}

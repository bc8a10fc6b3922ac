"""Server reflection that stock tools can use: ghz and grpcurl look methods up by name."""

import functools
from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

CHANNELZ = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
V1ALPHA = reflection.SERVICE_NAME
V1 = V1ALPHA.replace("v1alpha", "v1")
STANDARD_SERVICES = (health.SERVICE_NAME, CHANNELZ, V1, V1ALPHA)


def v1_pool() -> Any:
    """A descriptor pool with reflection v1, which grpcio-reflection does not have.

    v1 is v1alpha under another name: the messages have the same fields. The pool is not the default one,
    where another package that brings v1 would find its file defined already.
    """
    alpha = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    text = text_format.MessageToString(alpha).replace("grpc.reflection.v1alpha", "grpc.reflection.v1")
    v1 = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    v1.name = "grpc/reflection/v1/reflection.proto"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(v1.SerializeToString())
    return pool


class ReflectedPool:
    """The default descriptor pool, with reflection v1; it also finds the file that a method is defined in.

    Protobuf's own Python pool finds a service by name but not its methods, and ghz and
    `grpcurl describe` ask for the method (ghz issue 419, grpc issue 34743).
    """

    def __init__(self) -> None:
        self._default: Any = descriptor_pool.Default()
        self._v1 = v1_pool()

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._find, name)

    def _find(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._default, name)(*arguments)
        except KeyError:
            return getattr(self._v1, name)(*arguments)

    def FindFileContainingSymbol(self, symbol: str) -> Any:  # noqa: N802 - the pool's own name
        try:
            return self._find("FindFileContainingSymbol", symbol)
        except KeyError:
            return self._find("FindMethodByName", symbol).containing_service.file


def add_reflection(service_names: Iterable[str], server: Any) -> None:
    """Adds reflection, v1 and v1alpha, to a grpc or grpc.aio server, before it starts.

    Lists `service_names` and, with them, health, channelz and reflection itself.
    """
    kind = reflection.aio if isinstance(server, grpc.aio.Server) else reflection
    servicer = kind.ReflectionServicer({*service_names, *STANDARD_SERVICES}, pool=ReflectedPool())
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (V1, V1ALPHA):
        handlers = grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method})
        server.add_generic_rpc_handlers((handlers,))

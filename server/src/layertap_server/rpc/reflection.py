"""Server reflection that stock tools can use: ghz and grpcurl look methods up by name."""

from collections.abc import Iterable
from typing import Any

from google.protobuf import descriptor_pool
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

CHANNELZ = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
STANDARD_SERVICES = (health.SERVICE_NAME, CHANNELZ, reflection.SERVICE_NAME)


class MethodPool:
    """The default descriptor pool; it also finds the file that a method is defined in.

    Protobuf's own Python pool finds a service by name but not its methods, and ghz and
    `grpcurl describe` ask for the method (ghz issue 419, grpc issue 34743).
    """

    def __init__(self) -> None:
        self._pool: Any = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:  # noqa: N802 - the pool's own name
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file


def add_reflection(service_names: Iterable[str], server: Any) -> None:
    """Adds reflection (v1alpha) to a grpc or grpc.aio server, before it starts.

    Lists `service_names` and, with them, health, channelz and reflection itself.
    """
    names = {*service_names, *STANDARD_SERVICES}
    reflection.enable_server_reflection(sorted(names), server, pool=MethodPool())

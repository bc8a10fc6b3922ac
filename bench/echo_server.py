"""A minimal server that answers each call with a fixed number of bytes: gRPC's own server, or the one that
Layertap's server is built on.

`python -m bench.echo_server BYTES [ours]` prints its address, then answers each line of standard input with
the CPU time that it has used, and serves until the input ends. For gRPC's own server, the package of
Layertap's server is not imported, since it changes gRPC's settings.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from typing import Any

import grpc

from layertap.v1 import encoder_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["EncoderService"].full_name


def cpu_s() -> float:
    """CPU time of this process since its start, including system time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def ours() -> Any:
    from layertap_server.rpc.server import RpcServer

    return RpcServer()


async def serve(num_bytes: int, whose: str = "grpc.aio's") -> None:
    reply = bytes(num_bytes)

    async def echo(data: bytes, context: Any) -> bytes:
        return reply

    server = ours() if whose == "ours" else grpc.aio.server()
    methods = {"Encode": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps({"at_s": time.perf_counter(), "cpu_s": cpu_s()}), flush=True)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), *sys.argv[2:]))

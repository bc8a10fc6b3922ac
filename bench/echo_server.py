"""A bare server, that answers each call with as many bytes and nothing else: gRPC's own, or the one that
Layertap's server is built on.

`python -m bench.echo_server BYTES [ours]` prints its address, then answers each line of standard input with
the CPU that it has taken, and serves until the input ends. gRPC's own is as anyone has it: the package of
Layertap's server, which sets gRPC up for itself, is not imported then.
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
    """Of this process since its start, the kernel's work for it included."""
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

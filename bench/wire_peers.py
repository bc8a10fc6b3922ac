"""Processes that `bench.wire` compares with: plain TCP, plain protobuf replies, and a caller of small
requests.

`python -m bench.wire_peers tcp|plain` prints its address, and serves until its standard input ends; `burn`
uses CPU time until then. `small ADDRESS SECONDS` requests one pooled vector after another, and prints the
time of each call in seconds.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceServicer, add_EncoderServiceServicer_to_server

HIDDEN_SHAPE = (13, 512, 768)
ENCODE = "/layertap.v1.EncoderService/Encode"


def hidden_states() -> np.ndarray[Any, Any]:
    """(layers, T, H): the hidden states of one text of 512 tokens, 20 MB."""
    return np.random.default_rng(0).standard_normal(HIDDEN_SHAPE, np.float32)


def serve_tcp() -> None:
    """Sends the same bytes for each byte that it receives."""
    data = hidden_states().data.cast("B")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        connection, _ = listener.accept()
        with connection:
            while connection.recv(1):
                connection.sendall(data)


class Plain(EncoderServiceServicer):
    """Answers as usual with generated code: the tensor's bytes are a field of a message."""

    def __init__(self) -> None:
        self.array = hidden_states()

    def Encode(self, request: pb.EncodeRequest, context: Any) -> pb.EncodeResponse:  # noqa: N802
        tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=HIDDEN_SHAPE, data=self.array.tobytes())
        return pb.EncodeResponse(results=[pb.EncodeResult(token_count=512, hidden_states=tensor)])


def serve_plain() -> None:
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_send_message_length", -1)])
    add_EncoderServiceServicer_to_server(Plain(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    server.stop(None).wait()


def burn() -> None:
    """Computes until its standard input ends."""
    print("-", flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    while True:
        pass


def small_request(num_tokens: int = 16) -> pb.EncodeRequest:
    """A request for one pooled vector of 768 float32."""
    ids = pb.TokenIds(ids=range(1000, 1000 + num_tokens))
    outputs = pb.OutputSelection(embeddings=[pb.EmbeddingSpec()])
    return pb.EncodeRequest(inputs=[pb.Input(token_ids=ids)], outputs=outputs)


def call_small(address: str, seconds: float) -> None:
    request = small_request().SerializeToString()
    times = []
    with grpc.insecure_channel(address) as channel:
        encode = channel.unary_unary(ENCODE)
        encode(request)
        ends = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < ends:
            encode(request)
            times.append(time.perf_counter() - begun)
    print(json.dumps(times), flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tcp"]:
            serve_tcp()
        case ["plain"]:
            serve_plain()
        case ["burn"]:
            burn()
        case ["small", address, seconds]:
            call_small(address, float(seconds))

"""Metrics over HTTP, of a server that answered, refused and dropped something."""

from __future__ import annotations

import os
import socket
import urllib.request
from contextlib import suppress
from itertools import count
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness import Running, serve
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from server.support import WAIT_S, eventually, gated, refusal_of, served, texts, tokens


def free_port() -> int:
    """Below those that the system gives to whoever asks for any port, so that it stays free until it is used."""
    for port in count(20_000 + os.getpid() % 10_000):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def scrape(port: int, model: str | None = "bert") -> dict[tuple[str, ...], float]:
    """Each sample by its name and the values of its labels, less the model's. `model` None: of any model."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as reply:
        text = reply.read().decode()
    return {
        (sample.name, *(value for label, value in sample.labels.items() if label != "model")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if model is None or sample.labels.get("model", model) == model
    }


def test_metrics_say_what_happened(folders: dict[str, Path]) -> None:
    port = free_port()
    models = {"bert": folders["bert"], "distilbert": folders["distilbert"]}
    with serve(models, metrics_port=port) as server, grpc.insecure_channel(server.address) as channel:
        stub = EncoderServiceStub(channel)
        scheduler = served(server).scheduler
        before = scrape(port)
        assert before["layertap_batches_total",] == 0
        assert before["layertap_engine_up",] == 1
        with gated(server) as gate:
            running = stub.Encode.future(texts("a b"), timeout=WAIT_S)
            gate.wait_for_batch()
            left = stub.Encode.future(tokens([2, 9, 9, 3]), timeout=WAIT_S)
            eventually(server, lambda: scheduler.queued_tokens == 4)
            amid = scrape(port)
            assert amid["layertap_queue_tokens",] == 4
            assert amid["layertap_queue_requests",] == 1
            assert amid["layertap_queue_age_seconds",] > 0
            left.cancel()
            eventually(server, lambda: scheduler.queued_tokens == 0)
            gate.open()
            assert running.result().results
        refusal_of(stub.Encode, texts(), timeout=WAIT_S)
        assert stub.Encode(texts("a", outputs=pb.OutputSelection(last_hidden_state=True))).results
        after = scrape(port)
        assert after["layertap_batches_total",] == 2
        assert after["layertap_batch_inputs_total",] == 2
        assert after["layertap_batch_tokens_total",] == 4 + 3
        assert after["layertap_batch_room_tokens_total",] == 2 * 2048
        assert after["layertap_engine_busy_seconds_total",] > 0
        assert after["layertap_engine_rows_total",] >= 4 + 3
        assert after["layertap_requests_total", "admitted"] == 3
        assert after["layertap_requests_total", "answered"] == 2
        assert after["layertap_dropped_total", "cancelled", "queued"] == 1
        assert after["layertap_refused_total", "NO_INPUTS"] == 1
        assert after["layertap_reply_bytes_total", "last_hidden_state"] == 3 * served_width(server) * 4
        assert after["layertap_cost_seconds", "token"] > 0
        assert after["layertap_pace_ratio",] > 0
        assert after["layertap_batch_max_tokens",] == 2048
        assert after["layertap_out_of_memory_total",] == 0
        assert after["layertap_event_loop_lag_seconds",] >= 0
    with pytest.raises(OSError):
        scrape(port)


def served_width(server: Running) -> int:
    return served(server).facts.hidden_size

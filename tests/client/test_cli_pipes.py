"""The command in pipes: JSON, Parquet and stacked arrays out; pairs, words and ids in; spans; interrupts."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from layertap import Client, Embedding, Pair, Ranked, Span, TokenIds, Words, _interrupts, load
from layertap._commands import commands
from layertap._writers import json_line, ranked_line

from .fake_server import FakeEncoder
from .test_ready import health_server


@pytest.fixture
def run(address: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LAYERTAP_ADDRESS", address)
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments: object, code: int = 0, **options: Any) -> Result:
        result = CliRunner().invoke(commands, list(map(str, arguments)), **options)
        assert result.exit_code == code, result.output
        return result

    return run


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("options", [["--json"], ["-o", "-"], ["--json", "-o", "-"]])
def test_json_lines(run: Any, client: Client, options: list[str]) -> None:
    texts = ["ab", "ü", *map(str, range(40))]
    found = lines(run("encode", *texts, *options, "--embedding", "--last-hidden-state", "--tokens"))
    assert [one["index"] for one in found] == list(range(len(texts)))
    assert [one["text"] for one in found] == texts
    for one, expected in zip(
        found, client.encode(texts, embeddings=True, last_hidden_state=True, tokens=True), strict=True
    ):
        assert one["token_count"] == expected.token_count
        np.testing.assert_array_equal(np.array(one["embeddings"][0], np.float32), expected.embedding)
        np.testing.assert_array_equal(
            np.array(one["last_hidden_state"], np.float32), expected.last_hidden_state
        )
        assert one["tokens"]["tokens"] == list(expected.tokens.tokens)
        assert one["tokens"]["ids"] == expected.tokens.ids.tolist()


def test_json_has_no_nan(client: Client) -> None:
    result = client.encode("a", last_hidden_state=True)
    array = np.array([[np.nan, 1.5], [-np.inf, 0]], np.float32)
    object.__setattr__(result, "last_hidden_state", array)
    assert json.loads(json_line(3, "a", result))["last_hidden_state"] == [[None, 1.5], [None, 0]]


def test_json_of_int8_is_its_numbers(run: Any, client: Client) -> None:
    (found,) = lines(run("encode", "ab", "--json", "--encoding", "int8"))
    expected = client.encode("ab", embeddings=Embedding(encoding="int8")).embedding.dequantize()
    np.testing.assert_allclose(found["embeddings"][0], expected)


def test_failures_in_json(run: Any) -> None:
    stopped = run("encode", "a", "poison", "b", "--json", code=1)
    assert [one["index"] for one in lines(stopped)] == [0]
    skipped = run("encode", "a", "poison", "b", "--json", "--on-error", "skip")
    assert [one["index"] for one in lines(skipped)] == [0, 2]
    assert "skipped: " in skipped.stderr


INPUTS: list[tuple[dict[str, Any], Any]] = [
    ({"text": "ab"}, "ab"),
    ({"pair": ["a", "bc"]}, Pair("a", "bc")),
    ({"ids": [1, 20, 2]}, TokenIds([1, 20, 2])),
    ({"ids": [1, 20, 2], "type_ids": [0, 0, 1]}, TokenIds([1, 20, 2], [0, 0, 1])),
    ({"words": ["a", "bc"]}, Words(["a", "bc"])),
    ({"text": "more", "id": 7}, "more"),
]


@pytest.mark.parametrize("by_name", [True, False])
def test_inputs_from_json_lines(run: Any, client: Client, tmp_path: Path, by_name: bool) -> None:
    source = tmp_path / ("inputs.jsonl" if by_name else "inputs.txt")
    source.write_text("".join(json.dumps(line) + "\n" for line, _ in INPUTS))
    found = lines(run("encode", "-i", source, "--json", *([] if by_name else ["--jsonl"])))
    for one, (line, value) in zip(found, INPUTS, strict=True):
        for name in set(line) - {"id"}:
            assert one[name] == line[name]
        np.testing.assert_array_equal(
            np.array(one["embeddings"][0], np.float32), client.encode(value, embeddings=True).embedding
        )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "this is not JSON"),
        ("[]", "the line has 0 of the fields"),
        ('{"text": "a", "words": []}', "the line has 2 of the fields text, pair, ids and words"),
        ('{"pair": ["a"]}', "pair has a wrong type: give an object such as"),
        ('{"ids": [true]}', "ids has a wrong type"),
        ('{"ids": [1], "type_ids": ["a"]}', "type_ids has a wrong type"),
        ("[" * 100_000, "this is not JSON"),
        ('{"text": null}', "text has a wrong type"),
    ],
)
def test_wrong_lines_are_named(run: Any, line: str, problem: str) -> None:
    given = '{"text": "a"}\n' + line + "\n"
    result = run("encode", "-i", "-", "--jsonl", "--json", code=1, input=given)
    assert f"Error: standard input:2: {problem}" in result.stderr


def test_tokenize_in_pipes(run: Any, client: Client, tmp_path: Path) -> None:
    source = tmp_path / "inputs.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line, _ in INPUTS))
    found = lines(run("tokenize", "-i", source, "--json"))
    for index, (one, (line, value)) in enumerate(zip(found, INPUTS, strict=True)):
        expected = client.tokenize(value)
        assert one["index"] == index
        for name in set(line) - {"id"}:
            assert one[name] == line[name]
        assert one["token_count"] == len(expected)
        assert one["tokens"]["tokens"] == list(expected.tokens)
        assert one["tokens"]["starts"] == expected.starts.tolist()
        assert one["tokens"]["special"] == expected.special.tolist()
    (encoded,) = lines(run("encode", "ab", "--json", "--tokens"))
    (tokenized,) = lines(run("tokenize", "ab", "--json"))
    assert tokenized["tokens"] == encoded["tokens"]
    shown = run("tokenize", "-i", source).stdout
    assert '{"pair": ["a", "bc"]}' in shown
    assert "[CLS]" in shown
    assert [one["pair"] for one in lines(run("tokenize", "a|b", "--pair-separator", "|", "--json"))] == [
        ["a", "b"]
    ]
    (bare,) = lines(run("tokenize", "-i", "-", "--json", "--without-special-tokens", input="ab\n"))
    assert bare["tokens"]["tokens"] == ["t107", "t108"]


def test_rerank_in_pipes(run: Any, client: Client, tmp_path: Path) -> None:
    texts = ["a", "bc", "zebra", 'x\t"y']
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text, "id": 7}) + "\n" for text in texts))
    expected = client.rerank("q", texts, model="reranker")
    found = lines(run("rerank", "q", "-i", source, "--model", "reranker", "--json"))
    assert found == [{"index": one.index, "score": one.score, "text": one.text} for one in expected]
    assert lines(run("rerank", "q", *texts, "--model", "reranker", "--json")) == found
    (best,) = lines(run("rerank", "q", "-i", source, "--model", "reranker", "--json", "--top-k", "1"))
    assert best == found[0]
    shown = run("rerank", "q", "--jsonl", "-i", "-", "--model", "reranker", input=source.read_bytes()).stdout
    assert shown.splitlines()[0].split("\t")[1] == str(expected[0].index)
    assert json.loads(ranked_line(Ranked(1, float("nan"), "a"))) == {"index": 1, "score": None, "text": "a"}


@pytest.mark.parametrize("command", [("tokenize",), ("rerank", "q", "--model", "reranker")])
def test_lines_that_are_wrong(run: Any, tmp_path: Path, command: tuple[str, ...]) -> None:
    source = tmp_path / "inputs.jsonl"
    source.write_text('{"text": "a"}\n{"text": "poison"}\n')
    failed = run(*command, "-i", source, "--json", code=1)
    assert failed.stderr.startswith(f"Error: {source}:2: the request has a bad field")
    source.write_text('{"text": "a"}\n{"texts": "b"}\n')
    failed = run(*command, "-i", source, "--json", code=1)
    assert f"Error: {source}:2: the line has 0 of the fields text" in failed.stderr
    assert failed.stdout == ""
    for arguments in ([], ["a", "-i", source]):
        assert "give TEXTS, or -i FILE" in run(*command, *arguments, code=2).stderr
    if command[0] == "rerank":
        source.write_text('{"text": "a"}\n{"pair": ["b", "c"]}\n')
        failed = run(*command, "-i", source, code=1)
        assert f'{source}:2: the line has no text: give an object such as {{"text": "…"}}' in failed.stderr


def test_pairs(run: Any, client: Client) -> None:
    found = lines(run("encode", "a\tb\tc", "d\te", "--pair-separator", "\t", "--json"))
    assert [one["pair"] for one in found] == [["a", "b\tc"], ["d", "e"]]
    np.testing.assert_array_equal(
        np.array(found[1]["embeddings"][0], np.float32),
        client.encode(Pair("d", "e"), embeddings=True).embedding,
    )
    wrong = run("encode", "-i", "-", "--pair-separator", "|", "--json", code=1, input="a|b\nc\n")
    assert "standard input:2: there is no separator '|' between two texts" in wrong.stderr


def test_spans(run: Any, client: Client) -> None:
    (found,) = lines(run("encode", "abcd", "--json", "--span", "0:2", "--span", "1:3:word"))
    spans = Embedding(spans=[Span(0, 2), Span(1, 3, "word")])
    np.testing.assert_array_equal(
        np.array(found["embeddings"][0], np.float32), client.encode("abcd", embeddings=spans).embedding
    )
    assert "'1-2' is not START:END" in run("encode", "a", "--span", "1-2", code=2).stderr


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_stacked(run: Any, client: Client, tmp_path: Path, suffix: str) -> None:
    texts, output = [*map(str, range(30)), "poison", "ab"], tmp_path / f"out.{suffix}"
    run("encode", *texts, "-o", output, "--stack", "--embedding", "--pooler", "--on-error", "skip")
    arrays = load_file(output) if suffix == "safetensors" else dict(np.load(output))
    of_file = {"token_count", "truncated_tokens", "timing", "inputs", "inputs.shape"}
    assert set(arrays) - of_file - {"layertap"} == {"index", "embeddings.0", "pooler_output"}
    kept = [text for text in texts if text != "poison"]
    assert arrays["index"].tolist() == [*range(30), 31]
    np.testing.assert_array_equal(arrays["embeddings.0"], client.embed(kept))
    assert arrays["pooler_output"].shape == (31, 4)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    saved = load(output)
    assert list(saved.inputs) == kept
    assert saved.numbers.tolist() == [*range(30), 31]
    assert saved.model == client.model()
    assert set(saved.failures) == {30}
    assert "is poison" in saved.failures[30]
    np.testing.assert_array_equal(saved[-1].embedding, client.embed("ab"))


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_stacked_rows(run: Any, client: Client, tmp_path: Path, suffix: str) -> None:
    texts, output = ["a", "abc", "", "ab"], tmp_path / f"out.{suffix}"
    run("encode", *texts, "-o", output, "--stack", "--last-hidden-state", "--attentions", "all")
    arrays = load_file(output) if suffix == "safetensors" else dict(np.load(output))
    results = client.encode(texts, last_hidden_state=True, attentions=True)
    np.testing.assert_array_equal(
        arrays["last_hidden_state"], np.concatenate([one.last_hidden_state for one in results])
    )
    assert arrays["last_hidden_state.shape"].tolist() == [[3, 4], [5, 4], [2, 4], [4, 4]]
    np.testing.assert_array_equal(
        arrays["attentions"], np.concatenate([one.attentions.reshape(-1) for one in results])
    )
    for found, one in zip(load(output), results, strict=True):
        np.testing.assert_array_equal(found.attentions, one.attentions)


def test_what_is_written_otherwise_is_loaded(run: Any, client: Client, tmp_path: Path) -> None:
    expected = client.encode("ab", embeddings=True, tokens=True)
    (tmp_path / "printed.jsonl").write_text(run("encode", "ab", "--json", "--embedding", "--tokens").stdout)
    run("encode", "ab", "-o", tmp_path / "file.jsonl", "--embedding", "--tokens")
    for name in ("printed", "file"):
        saved = load(tmp_path / f"{name}.jsonl")
        assert list(saved.inputs) == ["ab"]
        assert saved.model == (None if name == "printed" else client.model())
        np.testing.assert_array_equal(saved[0].embedding, expected.embedding)
        assert saved[0].tokens.tokens == expected.tokens.tokens
    run("encode", "ab", "-o", tmp_path / "numbered.npz")
    with pytest.raises(ValueError, match="write it with `layertap encode --stack`"):
        load(tmp_path / "numbered.npz")


def test_what_cannot_be_stacked(run: Any, tmp_path: Path) -> None:
    for arguments, message in (
        (["--stack"], "--stack needs -o"),
        (["--stack", "--json"], "--stack needs -o"),
        (["--json", "-o", "x.npz"], "for a file, give -o FILE.jsonl"),
        (["--jsonl", "--pair-separator", "|"], "--pair-separator is for texts"),
    ):
        assert message in run("encode", "a", *arguments, code=2).stderr
    stacked = run("encode", "a", "-o", tmp_path / "x.parquet", "--stack", code=2)
    assert "--stack writes .npz and .safetensors; leave it out for .parquet" in stacked.stderr


def test_json_files(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run("encode", "a", "b", "-o", output)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert {one["text"] for one in found} == {"a", "b"}
    run("encode", "poison", "-o", tmp_path / "none.jsonl", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_parquet(run: Any, client: Client, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    output, source = tmp_path / "out.parquet", tmp_path / "inputs.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line, _ in INPUTS))
    run("encode", "-i", source, "-o", output, "--embedding", "--last-hidden-state")
    rows = sorted(parquet.read_table(output).to_pylist(), key=lambda row: row["index"])
    for row, (line, value) in zip(rows, INPUTS, strict=True):
        expected = client.encode(value, embeddings=True, last_hidden_state=True)
        for name in set(line) - {"id"}:
            assert row[name] == line[name]
        np.testing.assert_array_equal(np.array(row["embeddings.0"], np.float32), expected.embedding)
        states = np.array(row["last_hidden_state"], np.float32).reshape(row["last_hidden_state.shape"])
        np.testing.assert_array_equal(states, expected.last_hidden_state)


def test_parquet_without_pyarrow(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    failed = run("encode", "a", "-o", tmp_path / "out.parquet", code=1)
    assert "out.parquet needs pyarrow: pip install 'layertap[parquet]'" in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_progress_of_a_file_has_its_total(run: Any, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(map(str, range(53))))
    result = run("encode", "-i", source, "-o", tmp_path / "out.npz")
    assert "53/53" in result.stderr
    assert "/s" in result.stderr
    assert "left" in result.stderr


def test_info_is_not_folded_in_a_pipe(run: Any, fake: FakeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a-name-that-is-much-longer-than-a-line-" * 5
    fake.architecture = name
    assert name in run("info").stdout
    monkeypatch.setenv("COLUMNS", "80")
    assert name not in run("info").stdout


def test_health_and_wait(run: Any, fake: FakeEncoder) -> None:
    for status, code in ((1, 0), (2, 1)):
        with health_server(status) as address:
            shown = run("health", "--address", address, code=code).stdout
            assert shown == {1: "SERVING\n", 2: "NOT_SERVING\n"}[status]
    fake.num_unavailable = 5
    assert run("wait").stdout == "fake is ready\n"
    assert run("wait", "--model", "plain", "--timeout", "5").stdout == "plain is ready\n"
    assert "no model named" in run("wait", "--model", "nobody", code=1).stderr
    assert run("health", "--address", "127.0.0.1:1", code=1).stderr.startswith("Error: 127.0.0.1:1: ")


def test_the_health_of_a_server_without_the_model(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "health", lambda *_, **__: "SERVING")
    assert run("health", "--model", "plain").stdout == "SERVING\n"
    assert "no model named" in run("health", "--model", "nobody", code=1).stderr


def test_a_reader_that_has_seen_enough(address: str) -> None:
    code = "from layertap.cli import main; main()"
    texts = [f"text {number}" for number in range(300)]
    with subprocess.Popen(
        [sys.executable, "-c", code, "encode", "--json", "--address", address, *texts],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert (process.returncode, errors) == (1, b"")


def test_every_command_has_examples() -> None:
    for name, command in [("", commands), *commands.commands.items()]:
        if name == "serve":  # its help is that of the server
            continue
        shown = CliRunner().invoke(commands, [*([name] if name else []), "--help"]).stdout
        assert "Examples:\n" in shown, name
        assert re.search(r"^ +layertap ", shown, re.MULTILINE), name
        assert isinstance(command, click.Command)


@pytest.mark.parametrize("arguments", [["encode", "--json"], ["encode"], ["rerank", "q"], ["encode", "-o"]])
def test_an_interrupt_ends_with_130(
    address: str, fake: FakeEncoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    arrived = threading.Event()

    def hang(request: Any, context: Any) -> Any:
        over = threading.Event()
        if context.add_callback(over.set):
            arrived.set()
            over.wait(60)
        raise AssertionError("the caller is gone")

    monkeypatch.setattr(fake, "_results", hang)
    options = ["--address", address, "--model", "reranker"]
    if arguments[-1] == "-o":
        arguments = [*arguments, str(tmp_path / "out.npz")]
    # A job in the background may have been started with SIGINT ignored.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from layertap.cli import main; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "a text", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert arrived.wait(100)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=100)
    assert (process.returncode, out) == (130, ""), errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_second_interrupt_ends_at_once(
    address: str, fake: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = threading.Event()
    monkeypatch.setattr(
        fake, "_results", lambda request, context: arrived.set() or threading.Event().wait(60)
    )
    code = (
        "import os, signal, threading; from layertap import _client; from layertap.cli import main; "
        "print_first = lambda _: (os.write(1, b'closing'), threading.Event().wait()); "
        "_client.Client.close = print_first; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "encode", "a text", "--address", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert arrived.wait(100)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(7) == b"closing"
        until = time.monotonic() + 100
        while process.poll() is None:
            assert time.monotonic() < until
            process.send_signal(signal.SIGINT)  # those that follow at once count as the first one
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        errors = process.stderr.read()
    assert (process.returncode, errors) == (128 + signal.SIGTERM, b"Error: interrupted\n")


def test_a_file_is_completed_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_interrupts, "_END_S", 0.5)
    interrupts, never = _interrupts.Interrupts(), threading.Event()

    def command() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            list(interrupts.among(itertools.count()))
        except _interrupts.Interrupted:
            never.wait(1.0)  # longer than `_END_S`
        return "completed"

    assert interrupts.run(command) == "completed"


def test_an_interrupted_program_does_not_wait_for_a_locked_channel(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an interrupt that came while gRPC acquired the channel's lock."""
    is_over = threading.Event()
    client = Client(address)
    close = client._calls.close
    monkeypatch.setattr(client._calls, "close", lambda: is_over.wait(60) and close())
    with pytest.raises(KeyboardInterrupt), client:
        raise KeyboardInterrupt
    assert not is_over.is_set()
    is_over.set()

"""The `layertap` command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from layertap import Client
from layertap._commands import commands
from layertap._files import array_file

from . import fake_heads, fake_server
from .fake_server import FakeEncoder, token_ids


@pytest.fixture
def run(address: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LAYERTAP_ADDRESS", address)
    monkeypatch.delenv("LAYERTAP_TOKEN", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, code: int = 0, **options: Any) -> Result:
        result = CliRunner().invoke(commands, list(map(str, arguments)), **options)
        assert result.exit_code == code, result.output
        return result

    return run


def row(output: str, first: str) -> list[str]:
    return next(line.split() for line in output.splitlines() if line.split()[:1] == [first])


def test_info(run: Any) -> None:
    output = run("info").stdout
    for word in (
        "fake",
        "plain",
        "3 layers",
        "512 tokens",
        "4 MiB message",
        "normalized",
        "float32",
    ):
        assert word in output
    assert "plain" not in run("info", "--model", "fake").stdout
    assert "head" not in row(output, "model")


def test_info_of_heads(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = run("info", "--model", "classifier").stdout
    assert row(output, "model")[-1] == "head"
    for word in ("logits", "sequence_classification", "3 labels", "no", "maybe", "yes"):
        assert word in output
    assert "1 label\n" in re.sub(" +\n", "\n", run("info", "--model", "reranker").stdout)
    masked = run("info", "--model", "splade").stdout
    assert "masked_language" in masked
    assert "sparse" in masked
    assert "label" not in masked
    assert "contacts" in run("info", "--model", "protein").stdout
    labels = ["a" * 50, *map(str, range(9))]
    many = {**fake_heads.MODELS["tagger"], "labels": labels}
    monkeypatch.setattr(fake_heads, "MODELS", {"many": many})
    output = run("info", "--model", "many").stdout
    assert "10 labels" in output
    assert "a" * 23 + "…" in output
    assert "a" * 24 not in output
    assert [line.split()[-1] for line in output.splitlines() if line.strip()][-4:] == ["0", "1", "2", "…"]


def test_tokenize(run: Any) -> None:
    output = run("tokenize", "ab", "[b]").stdout
    assert row(output, "0") == ["0", "[CLS]", "1"]
    assert row(output, "1") == ["1", "t107", "107", "0:1"]
    assert "[b]" in output
    bare = run("tokenize", "ab", "--without-special-tokens").stdout
    assert row(bare, "0")[:2] == ["0", "t107"]
    assert "[CLS]" not in bare


def test_encode_shows_the_embedding_by_default(run: Any, client: Client) -> None:
    output = run("encode", "ab", "a").stdout
    assert "0: 4 tokens" in output
    assert "1: 3 tokens" in output
    shown = row(output, "embeddings.0")
    assert shown[1:3] == ["(4,)", "float32"]
    expected = client.encode("ab", embeddings=True).embedding
    np.testing.assert_allclose(np.array(shown[3:], float), expected, atol=1e-4)


def test_encode_options(run: Any) -> None:
    output = run(
        *(
            "encode",
            "abc",
            "--last-hidden-state",
            "--pooler",
            "--hidden-states",
            "0,-1",
            "--attentions",
            "all",
        ),
        *("--heads", "-1", "--queries", "0,1", "--pooling", "cls", "--layers", "-1,-2", "--encoding", "int8"),
        *("--tokens", "--dtype", "float16", "--truncation", "end", "--priority", "high", "--timeout", "30"),
    ).stdout
    assert row(output, "last_hidden_state")[1:4] == ["(5,", "4)", "float16"]
    assert row(output, "pooler_output")[1] == "(4,)"
    assert row(output, "hidden_states")[1:4] == ["(2,", "5,", "4)"]
    assert row(output, "attentions")[1:5] == ["(3,", "1,", "2,", "5)"]
    assert row(output, "embeddings.0")[1:3] == ["(8,)", "int8"]
    assert row(output, "embeddings.0.scale")[1:3] == ["()", "float32"]
    assert "t107" in output
    only = run("encode", "abc", "--hidden-states", "-1").stdout
    assert "embeddings" not in only
    assert "mean" not in run("encode", "a", "--attentions", "0", "--mean-heads", "--no-normalize").stdout


def test_options_of_positions_and_heads(run: Any) -> None:
    output = run(
        *("encode", "abc", "--last-hidden-state", "--hidden-states", "0,1,2", "--positions", "0,-1"),
        *("--attentions", "-1:1,0:0,0:1", "--queries", "0", "--keys", "1,2"),
        *("--pooling", "mean", "--pooling", "max", "--exclude-special-tokens"),
    ).stdout
    assert row(output, "last_hidden_state")[1:3] == ["(2,", "4)"]
    assert row(output, "hidden_states")[1:4] == ["(3,", "2,", "4)"]
    assert row(output, "attentions")[1:5] == ["(3,", "1,", "1,", "2)"]
    assert row(output, "embeddings.0")[1] == "(8,)"
    assert row(run("encode", "abc", "--pooling", "none").stdout, "embeddings.0")[1:3] == ["(5,", "4)"]
    plain, bare = (
        run("encode", "abc", "--no-normalize", *options).stdout for options in ((), ("--without-projection",))
    )
    assert row(plain, "embeddings.0") != row(bare, "embeddings.0")
    assert row(run("encode", "abc", "--hidden-states", "all", "--positions", "1").stdout, "hidden_states")[
        1:4
    ] == ["(4,", "1,", "4)"]
    assert "0: 9 tokens" in run("encode", "abc", "--prompt-text", "to: ").stdout


def test_options_of_heads(run: Any) -> None:
    output = run("encode", "abc", "--model", "classifier", "--logits").stdout
    assert row(output, "logits")[1:3] == ["(3,)", "float32"]
    assert "embeddings" not in output
    best = run(
        "encode", "abc", "--model", "tagger", "--logits", "--top-k", "2", "--positions", "1,2,3"
    ).stdout
    assert row(best, "logits")[1:3] == ["(3,", "2)"]
    assert row(best, "logit_ids")[1:4] == ["(3,", "2)", "int32"]
    shares = run("encode", "abc", "--model", "classifier", "--logits", "--activation", "softmax").stdout
    assert sum(map(float, row(shares, "logits")[3:])) == pytest.approx(1, abs=1e-3)
    sparse = run("encode", "abc", "--model", "splade", "--sparse", "--top-k", "4").stdout
    assert row(sparse, "sparse_ids")[1:3] == ["(4,)", "int32"]
    assert row(sparse, "sparse_weights")[1:3] == ["(4,)", "float32"]
    contacts = run("encode", "abc", "--model", "protein", "--contacts").stdout
    assert row(contacts, "contacts")[1:3] == ["(3,", "3)"]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_files_have_the_outputs_of_heads(run: Any, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out.{suffix}"
    options = ("--logits", "--top-k", "3", "--sparse", "--dtype", "float16")
    run("encode", "ab", "c", "--model", "splade", "-o", output, *options)
    arrays = load_file(output) if suffix == "safetensors" else dict(np.load(output))
    names = ("logits", "logit_ids", "sparse_ids", "sparse_weights")
    assert set(arrays) == {f"{index}.{name}" for index in range(2) for name in names}
    assert [arrays[f"1.{name}"].dtype for name in names] == [np.float16, np.int32, np.int32, np.float16]
    expected, _ = fake_heads.sparse("splade", token_ids("c"), 3)
    np.testing.assert_array_equal(arrays["1.sparse_ids"], expected)


def ranked(output: str) -> list[list[str]]:
    return [line.split("\t") for line in output.splitlines()]


def test_rerank(run: Any, tmp_path: Path, client: Client) -> None:
    texts = ["a", "bc", "zebra", "x\ty"]
    expected = client.rerank("q", texts, model="reranker")
    shown = ranked(run("rerank", "q", *texts[:3], "--model", "reranker").stdout)
    of_three = [one for one in expected if one.index < 3]
    assert shown == [[f"{one.score:.6g}", str(one.index), one.text] for one in of_three]
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(texts) + "\n")
    for arguments, given in ((("-i", source), None), (("-i", "-"), source.read_bytes())):
        best = run("rerank", "q", "--model", "reranker", "--top-k", "1", *arguments, input=given).stdout
        assert best == f"{expected[0].score:.6g}\t{expected[0].index}\t{expected[0].text}\n"
    scores = ranked(run("rerank", "q", "a", "--model", "reranker", "--activation", "sigmoid").stdout)
    assert 0 < float(scores[0][0]) < 1
    assert run("rerank", "q", "-i", "-", "--model", "reranker", input=b"").stdout == ""


def test_rerank_says_what_is_wrong(run: Any, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_bytes(b"a\nb\npoison\n")
    failed = run("rerank", "q", "-i", source, "--model", "reranker", code=1)
    assert (failed.stdout, failed.stderr.splitlines()) == (
        "",
        [f"Error: {source}:3: the request has a bad field", "  inputs[2].pair: is poison"],
    )
    source.write_bytes(b"a\nb\xff\nc\xff\n")
    failed = run("rerank", "q", "-i", source, "--model", "reranker", code=1)
    assert failed.stderr == f"Error: {source}:2: byte 1 of the line, 0xff, is not UTF-8\n"
    assert (
        "'classifier' has a head with 3 labels"
        in run("rerank", "q", "a", "--model", "classifier", code=1).stderr
    )


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("standard_input", [True, False])
def test_files(run: Any, tmp_path: Path, suffix: str, standard_input: bool) -> None:
    texts = ["ab", "", "ünïcode", *map(str, range(50))]
    source, output = tmp_path / "texts.txt", tmp_path / f"out.{suffix}"
    source.write_text("\n".join(texts) + "\n", encoding="utf-8")
    options = ("--last-hidden-state", "--hidden-states", "0", "--encoding", "int8", "--tokens")
    given = {"input": source.read_bytes()} if standard_input else {}
    result = run("encode", "-i", "-" if standard_input else source, "-o", output, *options, **given)
    assert "53" in result.stderr
    assert result.stdout == ""
    arrays = load_file(output) if suffix == "safetensors" else dict(np.load(output))
    names = ("last_hidden_state", "hidden_states", "embeddings.0", "embeddings.0.scale")
    tokens = ("ids", "type_ids", "starts", "ends", "special", "word_ids", "sequence_ids")
    assert set(arrays) == {
        f"{index}.{name}"
        for index in range(len(texts))
        for name in (*names, *(f"tokens.{field}" for field in tokens))
    }
    for index, text in enumerate(texts):
        ids = token_ids(text)
        np.testing.assert_array_equal(
            arrays[f"{index}.last_hidden_state"], fake_server.hidden_states(ids)[-1]
        )
        np.testing.assert_array_equal(arrays[f"{index}.hidden_states"], fake_server.hidden_states(ids)[[0]])
        np.testing.assert_array_equal(arrays[f"{index}.tokens.ids"], ids)
        assert arrays[f"{index}.embeddings.0"].dtype == np.int8
        assert arrays[f"{index}.embeddings.0.scale"].shape == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, source.name]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_holds_any_array(tmp_path: Path, suffix: str) -> None:
    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "bits": np.array([1, 255], np.uint8),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    path = tmp_path / f"out{suffix}"
    with array_file(path) as write:
        for name, array in arrays.items():
            write(name, array)
    read = load_file(path) if suffix == ".safetensors" else dict(np.load(path))
    assert list(read) == list(arrays) or suffix == ".safetensors"
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read[name], array)


def numbers_in(path: Path) -> set[int]:
    """The numbers of the texts that a file holds."""
    return {int(name.split(".")[0]) for name in np.load(path)}


def test_a_failure_before_anything_is_finished_leaves_no_file(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    result = run("encode", "poison", "-o", output, code=1)
    assert "inputs[0].text: is poison" in result.stderr
    assert "finished" not in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert (
        "must end in .npz, .safetensors, .parquet or .jsonl"
        in run("encode", "a", "-o", tmp_path / "out.csv", code=1).stderr
    )


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_text_that_fails_stops_the_command_and_loses_nothing(run: Any, tmp_path: Path, suffix: str) -> None:
    source, output = tmp_path / "texts.txt", tmp_path / f"out.{suffix}"
    source.write_text("\n".join(["a", "bc", *map(str, range(40)), "poison", "d"]) + "\n")
    result = run("encode", "-i", source, "-o", output, "--last-hidden-state", code=1)
    assert f"Error: {source}:43: the request has a bad field\n  inputs[42].text: is poison\n" in result.stderr
    arrays = load_file(output) if suffix == "safetensors" else dict(np.load(output))
    kept = {int(name.split(".")[0]) for name in arrays}
    assert kept >= set(range(42))
    assert 42 not in kept
    assert f"{output} has the {len(kept)} texts that were finished" in result.stderr
    np.testing.assert_array_equal(
        arrays["1.last_hidden_state"], fake_server.hidden_states(token_ids("bc"))[-1]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, source.name]


def test_texts_that_fail_are_left_out_where_asked(run: Any, tmp_path: Path) -> None:
    source, output = tmp_path / "texts.txt", tmp_path / "out.npz"
    source.write_bytes(b"a\npoison\nb\xffd\nbug\ne\n")
    result = run("encode", "-i", source, "-o", output, "--on-error", "skip", "--tokens", "--pooler")
    assert numbers_in(output) == {0, 4}
    lines = result.stderr.splitlines()
    for line, text in (
        (2, "the request has a bad field"),
        (3, "byte 1 of the line, 0xff, is not UTF-8"),
        (4, "inputs[3]: internal error 1f"),
    ):
        assert f"skipped: {source}:{line}: {text}" in lines
    shown = run("encode", "a", "poison", "e", "--on-error", "skip")
    assert "0: 3 tokens" in shown.stdout
    assert "2: 3 tokens" in shown.stdout
    assert shown.stderr == "skipped: the request has a bad field\n  inputs[1].text: is poison\n"
    stopped = run("encode", "a", "poison", "e", code=1)
    assert "0: 3 tokens" in stopped.stdout
    assert "2: " not in stopped.stdout


def test_bad_utf8_names_its_line(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    given = "\n".join(map(str, range(20))).encode() + b"\nab\xe4c\nlast\n"
    result = run("encode", "-i", "-", "-o", output, "--pooler", code=1, input=given)
    assert "Error: standard input:21: byte 2 of the line, 0xe4, is not UTF-8" in result.stderr
    assert numbers_in(output) >= set(range(20))


def test_a_mark_at_the_start_of_a_file_is_no_text(run: Any, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_bytes("a\r\nb\r\n".encode("utf-8-sig"))
    shown = run("encode", "-i", source).stdout
    assert "0: 3 tokens" in shown
    assert "1: 3 tokens" in shown


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])  # a process group and its leader may both be signalled
def test_an_interrupt_keeps_whole_texts(
    run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    suffix: str,
    times: int,
) -> None:
    output = tmp_path / f"out.{suffix}"
    before = signal.getsignal(signal.SIGINT)  # a job in the background may have been started with it ignored

    @contextmanager
    def interrupted_file(path: Path) -> Iterator[Any]:
        with array_file(path) as write:

            def write_and_interrupt(name: str, array: np.ndarray) -> None:
                if name == "2.last_hidden_state":
                    for _ in range(times):
                        os.kill(os.getpid(), number)
                write(name, array)

            yield write_and_interrupt

    monkeypatch.setattr("layertap._writers.array_file", interrupted_file)
    options = ("--last-hidden-state", "--pooler", "--tokens")
    result = run("encode", "a", "b", "c", "hang", "-o", output, *options, code=128 + number)
    assert "Error: interrupted\n" in result.stderr
    arrays = load_file(output) if suffix == "safetensors" else dict(np.load(output))
    by_text = {index: {name for name in arrays if name.startswith(f"{index}.")} for index in range(4)}
    assert {len(names) for names in by_text.values()} <= {0, 9}
    assert len(by_text[2]) == 9
    assert not by_text[3]
    assert signal.getsignal(signal.SIGINT) is before
    assert f"{output} has the " in result.stderr


def test_a_lost_server_loses_nothing(run: Any, fake: FakeEncoder, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    fake.lose_connection_at = "last"
    result = run("encode", "a", "b", "last", "-o", output, "--pooler", code=1)
    assert "Error: 127.0.0.1:" in result.stderr
    assert f"{output} has the 2 texts that were finished" in result.stderr
    assert numbers_in(output) == {0, 1}


def test_errors_are_one_readable_message(run: Any, fake: FakeEncoder) -> None:
    result = run("encode", "poison", code=1)
    assert result.stderr == "Error: the request has a bad field\n  inputs[0].text: is poison\n"
    assert "no model named 'nobody'" in run("info", "--model", "nobody", code=1).stderr
    unreachable = run("info", "--address", "127.0.0.1:1", code=1).stderr
    assert unreachable.startswith("Error: 127.0.0.1:1: ")
    assert "no-such-file" in run("info", "--ca", "no-such-file", code=1).stderr
    fake.token = "secret"
    assert "credentials" in run("info", code=1).stderr
    assert run("info", "--token", "secret").stderr == ""
    assert run("info", env={"LAYERTAP_TOKEN": "secret"}).stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode"], "give TEXTS, or -i FILE"),
        (["encode", "a", "-i", "-"], "give TEXTS, or -i FILE"),
        (["encode", "a", "--heads", "1"], "--heads, --queries, --keys and --mean-heads need --attentions"),
        (["encode", "a", "--keys", "1"], "--heads, --queries, --keys and --mean-heads need --attentions"),
        (["encode", "a", "--attentions", "0:1,2"], "'0:1,2' is not a list of LAYER:HEAD such as 2:3,5:0"),
        (["encode", "a", "--attentions", "0:x"], "'0:x' is not a list of LAYER:HEAD"),
        (["encode", "a", "--attentions", "0:1", "--heads", "1"], "takes neither --heads nor --mean-heads"),
        (["encode", "a", "--top-k", "3"], "--top-k needs --logits or --sparse"),
        (["encode", "a", "--sparse", "--top-k", "0"], "0 is not in the range x>=1"),
        (["encode", "a", "--activation", "softmax"], "--activation needs --logits"),
        (["encode", "a", "--positions", "0", "--pooler"], "--positions needs --last-hidden-state"),
        (
            ["encode", "a", "--prompt", "query", "--prompt-text", "q: "],
            "give --prompt or --prompt-text, not both",
        ),
        (["rerank", "q", "a", "--prompt", "query", "--prompt-text", "q: "], "give --prompt or --prompt-text"),
        (["rerank", "q"], "give TEXTS, or -i FILE"),
        (["rerank", "q", "a", "-i", "-"], "give TEXTS, or -i FILE"),
        (["rerank", "q", "a", "--activation", "softmax"], "'softmax'"),
        (["rerank", "q", "a", "--top-k", "0"], "0 is not in the range x>=1"),
        (["encode", "a", "--hidden-states", "first"], "'first' is not a list of numbers such as 0,-1"),
        (["encode", "a", "--pooling", "median"], "'median'"),
        (["info", "--certificate", "c.pem"], "give both --certificate and --key"),
        (["encode", "a", "--key", "k.pem"], "give both --certificate and --key"),
        (["encode", "a", "--on-error", "ignore"], "'ignore'"),
    ],
)
def test_usage_errors(run: Any, arguments: list[str], message: str) -> None:
    assert message in run(*arguments, code=2).stderr


def test_serve_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Any] = []
    monkeypatch.setattr(os, "execvp", lambda program, arguments: handed.extend([program, arguments]))
    result = CliRunner().invoke(commands, ["serve", "--model", "a=b", "--help", "-x"])
    assert result.exit_code == 0, result.output
    program, arguments = handed
    assert Path(program).name == "layertap-server"
    assert arguments == [program, "--model", "a=b", "--help", "-x"]


def test_serve_without_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(commands, ["serve"])
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: the server needs the extra 'server': pip install 'layertap[server]'\n",
    )


def test_without_the_extra() -> None:
    code = "import sys; sys.modules['click'] = None; from layertap.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "The layertap command needs the extra 'cli': pip install 'layertap[cli]'\n"


def test_the_installed_command(address: str) -> None:
    script = Path(sys.executable).with_name("layertap")
    command = [script, "encode", "--address", address, "-i", "-"]
    result = subprocess.run(command, input="ab\n", capture_output=True, text=True, check=True)
    assert "embeddings.0" in result.stdout
    assert json.dumps(result.stderr) == '""'

"""`layertap.save` and `layertap.load`: the same results again, from every format, and files that are none."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import layertap
from layertap import (
    Attentions,
    Client,
    Embedding,
    EncodeOptions,
    HiddenStates,
    LayertapError,
    Logits,
    Pair,
    Quantized,
    Result,
    Span,
    Sparse,
    TokenIds,
    Words,
)
from layertap._request_options import options_of
from layertap._requests import encode_request

has_pyarrow = importlib.util.find_spec("pyarrow") is not None
SUFFIXES = [
    "npz",
    "safetensors",
    "jsonl",
    pytest.param("parquet", marks=pytest.mark.skipif(not has_pyarrow, reason="pyarrow is not installed")),
]
INPUTS = [
    "ab",
    "ü\n",
    Pair("a", "bc"),
    TokenIds([1, 20, 2]),
    TokenIds([1, 20], [0, 1]),
    Words(["a", "bc"]),
    "",
]
EVERY_ENCODING = [
    Embedding(),
    Embedding(encoding="int8"),
    Embedding(encoding="binary"),
    Embedding(encoding="bfloat16"),
    Embedding(pooling="none", layers=[0, -1], encoding="int8"),
    Embedding(pooling=["mean", "max"], normalize=False),
]
REQUESTS: list[tuple[Any, EncodeOptions]] = [
    (
        INPUTS,
        {
            "last_hidden_state": True,
            "pooler_output": True,
            "hidden_states": HiddenStates([0, -1]),
            "attentions": Attentions([-1], query_positions=[0, 1]),
            "embeddings": EVERY_ENCODING,
            "tokens": True,
            "truncation": "end",
            "prompt_name": "query",
        },
    ),
    (
        ["abc", "x" * 20],
        {
            "last_hidden_state": True,
            "last_hidden_state_positions": [0, -1],
            "embeddings": Embedding(spans=[Span(0, 1), Span(0, 2, "word")], encoding="int8"),
            "attentions": Attentions(pairs=[(0, 1), (-1, 0)]),
            "dtype": "bfloat16",
            "priority": "low",
        },
    ),
    (["a", "bcd"], {"model": "tagger", "logits": Logits(positions=[0, 1], top_k=2), "dtype": "float16"}),
    (["a", "bcd"], {"model": "classifier", "logits": Logits(activation="softmax")}),
    (["a", "bcd", TokenIds([1])], {"model": "splade", "sparse": Sparse(top_k=3), "logits": True}),
    (["ac", "bcd", ""], {"model": "protein", "contacts": True}),
]


def assert_same(found: Result, expected: Result) -> None:
    """To the bit."""
    arrays, wanted = found.arrays(), expected.arrays()
    assert list(arrays) == list(wanted)
    for name, array in arrays.items():
        assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert array.tobytes() == wanted[name].tobytes(), name
        assert array.flags.aligned
    assert (found.token_count, found.truncated_tokens) == (expected.token_count, expected.truncated_tokens)
    assert found.timing == expected.timing
    assert (found.tokens is None) == (expected.tokens is None)
    if found.tokens is not None:
        assert found.tokens.tokens == expected.tokens.tokens
    assert [type(one) for one in found.embeddings] == [type(one) for one in expected.embeddings]
    if expected._asked is not None:
        assert found.selection == expected.selection


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_a_file_gives_back_the_same_results(client: Client, tmp_path: Path, suffix: str, number: int) -> None:
    inputs, options = REQUESTS[number]
    results, model = client.encode(inputs, **options), client.model(options.get("model", ""))
    path = tmp_path / f"out.{suffix}"
    layertap.save(path, results, inputs=inputs, model=model)
    assert list(tmp_path.iterdir()) == [path]
    saved = layertap.load(path)
    assert len(saved) == len(results)
    for found, expected in zip(saved, results, strict=True):
        assert_same(found, expected)
    assert list(saved.inputs) == inputs
    assert saved.model == model
    assert saved.numbers.tolist() == list(range(len(inputs)))
    assert saved.failures == {}
    again = client.encode(inputs, **saved.options)
    assert_same(dataclasses.replace(again[0], timing=results[0].timing), results[0])
    assert encode_request(**saved.options) == encode_request(**options)
    assert repr(saved) == f"SavedResults('{path}': {len(results)} results)"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_a_file(client: Client, tmp_path: Path, suffix: str) -> None:
    inputs, options = REQUESTS[0]
    outcomes = list(client.stream([*inputs, "poison"], **options, on_error="return"))
    layertap.save(tmp_path / "first.npz", outcomes[2:], inputs=[*inputs, "poison"], model=client.model())
    layertap.save(tmp_path / f"second.{suffix}", layertap.load(tmp_path / "first.npz"))
    saved = layertap.load(tmp_path / f"second.{suffix}")
    for found, (_, expected) in zip(saved, outcomes[2:-1], strict=True):
        assert isinstance(expected, Result)
        assert_same(found, expected)
    assert list(saved.inputs) == inputs[2:]
    assert saved.numbers.tolist() == [2, 3, 4, 5, 6]
    assert saved.model == client.model()
    assert list(saved.failures) == ([] if suffix == "jsonl" else [7])
    assert suffix == "jsonl" or "is poison" in saved.failures[7]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_a_sequence(client: Client, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    texts = ["a", "bcd", "ef"]
    layertap.save(path, client.stream(texts, embeddings=True), inputs=texts)
    saved = layertap.load(str(path))
    expected = client.encode(texts, embeddings=True)
    np.testing.assert_array_equal(saved[-1].embedding, expected[-1].embedding)
    assert [one.token_count for one in saved[1:]] == [5, 4]
    assert (saved.inputs[-1], saved.inputs[:2]) == ("ef", ["a", "bcd"])
    for wrong in (3, -4):
        with pytest.raises(IndexError):
            saved[wrong]
        with pytest.raises(IndexError):
            saved.inputs[wrong]
    with pytest.raises(TypeError):
        saved["a"]  # type: ignore[call-overload]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_array_of_all_results(client: Client, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    texts = ["a", "bcd", ""]
    results = client.encode(texts, embeddings=True, last_hidden_state=True, hidden_states=True)
    layertap.save(path, results)
    saved = layertap.load(path)
    np.testing.assert_array_equal(saved.stacked("embeddings.0"), client.embed(texts))
    rows, offsets = saved.concatenated("last_hidden_state")
    assert offsets.tolist() == [0, 3, 8, 10]
    np.testing.assert_array_equal(rows, np.concatenate([one.last_hidden_state for one in results]))
    vectors, offsets = saved.concatenated("embeddings.0")
    assert (vectors.shape, offsets.tolist()) == ((12,), [0, 4, 8, 12])
    with pytest.raises(ValueError, match=r"different shapes: .* concatenated\('last_hidden_state'\)"):
        saved.stacked("last_hidden_state")
    with pytest.raises(ValueError, match="no rows of one shape"):
        saved.concatenated("hidden_states")
    for method in (saved.stacked, saved.concatenated):
        with pytest.raises(
            KeyError, match=r"no 'embedding', but last_hidden_state, hidden_states, embeddings\.0"
        ):
            method("embedding")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_nothing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    layertap.save(path, [], inputs=[])
    saved = layertap.load(path)
    assert (len(saved), list(saved), list(saved.inputs), saved.options, saved.model) == (0, [], [], {}, None)
    with pytest.raises(KeyError, match="no results"):
        saved.stacked("embeddings.0")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numbers_that_are_not_finite(client: Client, tmp_path: Path, suffix: str, dtype: Any) -> None:
    result = client.encode("ab", last_hidden_state=True, embeddings=Embedding(encoding="int8"))
    array = np.array([[np.nan, -np.inf], [np.inf, 0.1], [-0.0, 6e-8]], dtype)
    scale: Any = np.array(0.0, np.float32)
    changed = dataclasses.replace(
        result, last_hidden_state=array, embeddings=(Quantized(result.embedding.values, scale),)
    )
    path = tmp_path / f"out.{suffix}"
    layertap.save(path, [changed])
    assert_same(layertap.load(path)[0], changed)


ARRAYS = st.one_of(
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda shape: np.ones(shape, np.float32)),
    st.tuples(st.integers(0, 4), st.just(2)).map(lambda shape: np.full(shape, 0.1, np.float16)),
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(arrays=st.lists(ARRAYS, min_size=1, max_size=4))
def test_arrays_of_any_shape(client: Client, tmp_path: Path, suffix: str, arrays: list[Any]) -> None:
    result = client.encode("ab", last_hidden_state=True)
    results = [
        dataclasses.replace(result, last_hidden_state=one, hidden_states=one[None].astype(arrays[0].dtype))
        for one in arrays
        if one.dtype == arrays[0].dtype
    ]
    results = [dataclasses.replace(one, _asked=None) for one in results]
    path = tmp_path / f"out.{suffix}"
    layertap.save(path, results)
    for found, expected in zip(layertap.load(path), results, strict=True):
        assert_same(found, expected)


def test_twenty_thousand_vectors_are_a_handful_of_arrays(client: Client, tmp_path: Path) -> None:
    result = client.encode("ab", embeddings=True, tokens=True)
    num_results = 20_000
    path = tmp_path / "out.npz"
    layertap.save(path, (result for _ in range(num_results)), inputs=["ab"] * num_results)
    with np.load(path) as arrays:
        assert len(arrays.files) < 20
        assert arrays["embeddings.0"].shape == (num_results, 4)
        assert arrays["inputs"].tobytes() == b'{"text":"ab"}\n' * num_results
        note = json.loads(arrays["layertap"].tobytes())
    assert note["format"] == 1
    assert note["request"]["outputs"] == {"embeddings": [{}], "tokens": True}
    saved = layertap.load(path)
    assert_same(saved[num_results - 1], result)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_results_are_not_kept_in_memory(client: Client, tmp_path: Path, suffix: str) -> None:
    result = client.encode("ab", hidden_states=True)
    num_bytes = 1 << 20
    path = tmp_path / f"out.{suffix}"

    def results() -> Iterator[Result]:
        for number in range(64):
            states = np.full((1, 1 + number % 2, num_bytes // 4), number, np.float32)
            yield dataclasses.replace(result, hidden_states=states)

    tracemalloc.start()
    try:
        layertap.save(path, results())
        saved = layertap.load(path)
        for number, one in enumerate(saved):
            assert one.hidden_states[0, 0, 0] == number
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 96 * num_bytes
    assert peak < 32 * num_bytes
    assert list(tmp_path.iterdir()) == [path]


def test_other_libraries_read_the_arrays(client: Client, tmp_path: Path) -> None:
    texts = ["a", "bcd"]
    results = client.encode(texts, embeddings=True, last_hidden_state=True, tokens=True)
    for suffix in ("npz", "safetensors"):
        layertap.save(tmp_path / f"out.{suffix}", results, inputs=texts)
    arrays = dict(np.load(tmp_path / "out.npz"))
    del arrays["layertap"]
    read = load_file(tmp_path / "out.safetensors")
    assert set(read) == set(arrays)
    for name, array in read.items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_error_keeps_what_came_before(client: Client, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    with pytest.raises(LayertapError, match="poison"):
        layertap.save(path, client.stream(["a", "b", "poison"], embeddings=True), inputs=["a", "b", "poison"])
    saved = layertap.load(path)
    assert list(saved.inputs) == ["a", "b"]
    before = path.read_bytes()
    with pytest.raises(LayertapError, match="poison"):
        layertap.save(path, client.stream(["poison"], embeddings=True))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_cannot_be_written_leaves_nothing(
    client: Client, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = client.encode("a", embeddings=True)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    broken = {"jsonl": "json_line", "parquet": "_column"}.get(suffix, "write_arrays")
    monkeypatch.setattr(f"layertap._writers.{broken}", fails)
    with pytest.raises(OSError, match="No space"):
        layertap.save(tmp_path / f"out.{suffix}", [result])
    assert list(tmp_path.iterdir()) == []


def test_results_of_several_requests(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    first = client.encode("a", embeddings=True)
    other = client.encode("a", embeddings=Embedding(pooling="cls"))
    half = client.encode("a", embeddings=True, dtype="float16")
    more = client.encode("a", embeddings=True, pooler_output=True)
    for second, problem in (
        (other, "result 1 is from a request with other options"),
        (half, r"result 1 differs from the first one in embeddings\.0"),
        (more, "result 1 differs from the first one in pooler_output"),
    ):
        with pytest.raises(ValueError, match=problem):
            layertap.save(path, [first, second])
        assert len(layertap.load(path)) == 1
    again = client.encode("b", embeddings=True)
    layertap.save(path, [first, again], inputs=["a", "b"])
    assert len(layertap.load(path)) == 2


def test_lines_of_several_files(client: Client, tmp_path: Path) -> None:
    text = ""
    for number, options in enumerate(({"embeddings": True}, {"embeddings": True}, {"hidden_states": [1]})):
        layertap.save(tmp_path / "one.jsonl", client.encode(["a"], **options), inputs=["a"])  # type: ignore[call-overload]
        text += (tmp_path / "one.jsonl").read_text()
        (tmp_path / f"{number}.jsonl").write_text(text)
    assert len(list(layertap.load(tmp_path / "1.jsonl"))) == 2
    with pytest.raises(ValueError, match="line 3 is of a request with other options than line 1"):
        list(layertap.load(tmp_path / "2.jsonl"))


def test_wrong_arguments(client: Client, tmp_path: Path) -> None:
    result = client.encode("a", embeddings=True)
    path = tmp_path / "out.npz"
    for wrong, kind, problem in (
        (
            lambda: layertap.save(path, result),
            TypeError,
            r"it is one result: give a list, such as \[result\]",
        ),  # type: ignore[arg-type]
        (lambda: layertap.save(path, 7), TypeError, "results=7: give a list of results"),  # type: ignore[arg-type]
        (lambda: layertap.save(path, ["a"]), TypeError, r"results\[0\]='a': give a Result"),  # type: ignore[list-item]
        (lambda: layertap.save(path, [(-1, result)]), ValueError, r"results\[0\]\[0\]=-1"),
        (lambda: layertap.save(path, [result], inputs="a"), TypeError, "inputs='a': give a list"),
        (lambda: layertap.save(path, [result], inputs=[]), ValueError, "1 results and 0 inputs"),
        (lambda: layertap.save(path, [result], inputs=["a", "b"]), ValueError, "1 results and 2 inputs"),
        (
            lambda: layertap.save(path, [(2, result)], inputs=["a"]),
            ValueError,
            "1 inputs, and a result of input 2",
        ),
        (lambda: layertap.save(path, [result], inputs=[None]), TypeError, r"inputs\[0\] is a NoneType"),  # type: ignore[list-item]
        (lambda: layertap.save(path, [result], inputs=["\udcff"]), ValueError, "lone surrogate"),
        (lambda: layertap.save(tmp_path / "out.csv", [result]), ValueError, "must end in .npz"),
    ):
        with pytest.raises(kind, match=problem):
            wrong()
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="1 results and 2 inputs"):
        layertap.save(path, iter([result]), inputs=["a", "b"])
    for suffix in ("npz", "safetensors", "parquet", "jsonl"):
        with pytest.raises((FileNotFoundError, ModuleNotFoundError)):
            layertap.load(tmp_path / f"none.{suffix}")


def test_files_of_others(client: Client, tmp_path: Path) -> None:
    results = [client.encode("a", embeddings=True)]
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    np.savez_compressed(tmp_path / "small.npz", a=np.ones(3))
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "older.jsonl").write_text('{"index":0,"text":"a"}\n')
    (tmp_path / "other.csv").write_text("a,b")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name, problem in (
        ("other.npz", "was not written by layertap.save"),
        ("other.csv", r"must end in \.npz"),
        ("small.npz", "is compressed"),
        ("objects.npz", "header of another kind"),
        ("other.jsonl", "line 1 was not written by layertap.save"),
        ("older.jsonl", "older `layertap encode`"),
        ("empty.npz", "is damaged, or not whole"),
        ("empty.safetensors", "is damaged, or not whole"),
    ):
        with pytest.raises(ValueError, match=problem) as raised:
            layertap.load(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
    for suffix in ("npz", "safetensors", *(["parquet"] if has_pyarrow else []), "jsonl"):
        path = tmp_path / f"newer.{suffix}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("layertap._file_notes.FORMAT", 2)
            layertap.save(path, results)
        with pytest.raises(
            ValueError, match=r"format 2 of a newer layertap, .*pip install --upgrade layertap"
        ):
            layertap.load(path)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from .fake_server import FakeEncoder, serving

    folder = tmp_path_factory.mktemp("whole")
    inputs, options = REQUESTS[0]
    with serving(FakeEncoder()) as address, Client(address) as client:
        results, model = client.encode(inputs, **options), client.model()
    found = {}
    for suffix in ("npz", "safetensors", "jsonl", *(["parquet"] if has_pyarrow else [])):
        layertap.save(folder / f"a.{suffix}", results, inputs=inputs, model=model)
        found[suffix] = (folder / f"a.{suffix}").read_bytes()
    return found


@contextmanager
def suppress_shapes() -> Iterator[None]:
    """Suppresses the errors of a whole file, whose arrays have no common shape."""
    try:
        yield
    except ValueError as error:
        if "different shapes" not in str(error) and "rows of one shape" not in str(error):
            raise


def read_all(path: Path) -> None:
    saved = layertap.load(path)
    for result in saved:
        repr(result)
    repr((list(saved.inputs), saved.model, saved.options, saved.failures))
    for name in saved[0].arrays() if len(saved) else ():
        for method in (saved.stacked, saved.concatenated):
            with suppress_shapes():
                method(name)


EXAMPLES = {"npz": 300, "safetensors": 300, "jsonl": 300, "parquet": 60}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_are_cut_off(whole_files: dict[str, bytes], tmp_path: Path, suffix: str) -> None:
    path, whole = tmp_path / f"a.{suffix}", whole_files[suffix]
    for share in range(0, 100, 2):
        cut = whole[: len(whole) * share // 100]
        if suffix == "jsonl" and (not cut or cut.endswith(b"\n")):
            continue  # these are whole files
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=rf"a\.{suffix} "):
            layertap.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_give_errors_and_nothing_else(
    whole_files: dict[str, bytes], tmp_path: Path, suffix: str
) -> None:
    path, whole = tmp_path / f"a.{suffix}", whole_files[suffix]
    # What a file says about itself is at one of its ends; there most changes matter.
    places = st.one_of(
        st.integers(0, min(2000, len(whole) - 1)),
        st.integers(max(0, len(whole) - 4000), len(whole) - 1),
        st.integers(0, len(whole) - 1),
    )
    changes = st.lists(st.tuples(places, st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)
    messages: list[str] = []

    @settings(max_examples=EXAMPLES[suffix], deadline=None, database=None)
    @given(changes=changes)
    def damage(changes: list[tuple[int, bytes]]) -> None:
        changed = bytearray(whole)
        for place, data in changes:
            changed[place : place + len(data)] = data
        path.write_bytes(changed)
        try:
            read_all(path)
        except ValueError as error:
            messages.append(str(error))

    path.write_bytes(whole)
    read_all(path)
    damage()
    assert all(str(path) in message for message in messages)
    assert len(messages) > EXAMPLES[suffix] // 10


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=300))
def test_garbage(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    try:
        read_all(path)
    except ValueError:
        return
    assert suffix == "jsonl"
    assert not data


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("embeddings.0.scale", np.ones((2, 3), np.float32)),
        ("last_hidden_state.shape", np.array([[1 << 40, 1 << 40], [0, 0]])),
        ("last_hidden_state.shape", np.array([[-1, -12], [0, 0]])),
        ("timing", np.zeros((2, 5), np.int64)),
        ("surprise", np.ones((2, 3), np.float32)),
        ("tokens.ids", np.ones((2, 3), np.int64)),
        ("inputs", np.ones(5, np.float32)),
        ("layertap", np.frombuffer(b"[" * 100_000, np.uint8)),
        ("layertap", np.frombuffer(b'{"format": 1, "model": {"name": 5}}', np.uint8)),
        ("layertap", np.frombuffer(b'{"format": 1, "request": {"outputs": {"tokens": 7}}}', np.uint8)),
    ],
)
def test_arrays_that_do_not_belong_together(client: Client, tmp_path: Path, name: str, array: Any) -> None:
    path = tmp_path / "a.npz"
    layertap.save(path, client.encode(["a", "bcd"], last_hidden_state=True, embeddings=True, tokens=True))
    out = io.BytesIO()
    np.lib.format.write_array(out, array)
    with zipfile.ZipFile(path) as before:
        members = {one: before.read(one) for one in before.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in {**members, f"{name}.npy": out.getvalue()}.items():
            archive.writestr(member, data)
    with pytest.raises(ValueError, match=r"a\.npz is damaged, or not whole"):
        read_all(path)


POSITIONS = st.lists(st.integers(-5, 5), max_size=3)


@settings(max_examples=50, deadline=None)
@given(
    states=st.none() | st.builds(HiddenStates, POSITIONS, POSITIONS),
    maps=st.none()
    | st.builds(Attentions, POSITIONS, POSITIONS, st.booleans(), POSITIONS, POSITIONS)
    | st.builds(Attentions, pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1)),
    embeddings=st.lists(
        st.builds(
            Embedding,
            pooling=st.sampled_from([None, "mean", "none", ["mean", "cls"]]),
            layers=POSITIONS,
            layer_merge=st.sampled_from([None, "sum"]),
            normalize=st.sampled_from([None, True, False]),
            dimensions=st.integers(0, 9),
            encoding=st.sampled_from([None, "int8"]),
            spans=st.lists(
                st.builds(Span, st.integers(0, 3), st.integers(4, 9), st.sampled_from(["token", "word"]))
            ),
            exclude_special_tokens=st.booleans(),
            without_projection=st.booleans(),
        ),
        max_size=2,
    ),
    logits=st.none() | st.builds(Logits, POSITIONS, st.integers(0, 3), st.sampled_from([None, "softmax"])),
    sparse=st.none() | st.builds(Sparse, st.integers(0, 3)),
    flags=st.dictionaries(
        st.sampled_from(["last_hidden_state", "pooler_output", "tokens", "contacts"]), st.booleans()
    ),
    others=st.fixed_dictionaries(
        {},
        optional={
            "model": st.text(max_size=3),
            "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
            "truncation": st.sampled_from([None, "end", "start"]),
            "max_tokens": st.integers(0, 9),
            "prompt": st.text(max_size=3),
            "priority": st.sampled_from([None, "low", "high"]),
        },
    ),
)
def test_the_options_of_a_request(
    states: Any, maps: Any, embeddings: Any, logits: Any, sparse: Any, flags: Any, others: Any
) -> None:
    request = encode_request(
        hidden_states=states,
        attentions=maps,
        embeddings=embeddings,
        logits=logits,
        sparse=sparse,
        **flags,
        **others,
    )
    assert encode_request(**options_of(request)) == request

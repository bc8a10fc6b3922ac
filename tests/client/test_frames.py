"""`layertap.to_pandas` and `Tokens.to_pandas`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import layertap
from layertap import Client, Embedding, Pair, TokenIds, Words

needs_pandas = pytest.mark.skipif(
    importlib.util.find_spec("pandas") is None, reason="pandas is not installed"
)


@needs_pandas
def test_a_row_for_each_result(client: Client) -> None:
    texts = ["a", "bcd"]
    results = client.encode(texts, embeddings=True, last_hidden_state=True, tokens=True)
    frame: Any = layertap.to_pandas(results, texts)
    assert list(frame.columns) == [
        *("text", "token_count", "truncated_tokens", "last_hidden_state", "embeddings.0", "tokens")
    ]
    assert frame.index.tolist() == [0, 1]
    assert frame.index.name == "index"
    assert frame["text"].tolist() == texts
    assert frame["token_count"].tolist() == [3, 5]
    for row, result in zip(frame.itertuples(), results, strict=True):
        np.testing.assert_array_equal(row.last_hidden_state, result.last_hidden_state)
    np.testing.assert_array_equal(np.stack(frame["embeddings.0"]), client.embed(texts))
    assert frame["tokens"][1] == results[1].tokens.tokens


@needs_pandas
def test_a_column_for_each_number(client: Client) -> None:
    texts = ["a", "bcd"]
    options: Any = {"embeddings": [Embedding(), Embedding(encoding="int8")], "last_hidden_state": True}
    results = client.encode(texts, **options, pooler_output=True)
    frame: Any = layertap.to_pandas(iter(results), expand=True)
    vectors = frame[[f"embeddings.0.{place}" for place in range(4)]].to_numpy()
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, client.embed(texts))
    expected = np.stack([one.embeddings[1].dequantize() for one in results])
    np.testing.assert_array_equal(frame.filter(regex=r"^embeddings\.1\.").to_numpy(), expected)
    assert {"pooler_output.0", "pooler_output.3", "last_hidden_state"} < set(frame.columns)
    assert not {"text", "embeddings.0", "embeddings.1", "pooler_output"} & set(frame.columns)


@needs_pandas
def test_inputs_of_all_kinds_and_failures(client: Client, tmp_path: Path) -> None:
    inputs = ["a", Pair("a", "bc"), "poison", TokenIds([1, 20, 2]), Words(["a", "bc"])]
    outcomes = list(client.stream(inputs, embeddings=True, on_error="return"))
    for expand in (False, True):
        frame: Any = layertap.to_pandas(outcomes[1:], inputs, expand=expand)
        assert frame.index.tolist() == [1, 2, 3, 4]
        assert frame["pair"][1] == ("a", "bc")
        assert frame["ids"][3].tolist() == [1, 20, 2]
        assert frame["words"][4] == ("a", "bc")
        assert "is poison" in frame["error"][2]
        assert frame["error"].isna().tolist() == [True, False, True, True]
        assert frame["embeddings.0"].isna().tolist() == [False, True, False, False]
    layertap.save(tmp_path / "out.npz", outcomes, inputs=inputs)
    saved: Any = layertap.to_pandas(layertap.load(tmp_path / "out.npz"))
    assert saved.index.tolist() == [0, 1, 3, 4, 2]
    assert saved["text"][0] == "a"
    assert "is poison" in saved["error"][2]


@needs_pandas
def test_nothing_and_wrong_arguments(client: Client) -> None:
    assert layertap.to_pandas([]).shape == (0, 0)
    result = client.encode("a", embeddings=True)
    with pytest.raises(TypeError, match="give a list, such as"):
        layertap.to_pandas(result)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 results and 2 inputs"):
        layertap.to_pandas([result], ["a", "b"])


@needs_pandas
def test_a_row_for_each_token(client: Client) -> None:
    tokens = client.tokenize("ab")
    frame: Any = tokens.to_pandas()
    assert frame["token"].tolist() == ["[CLS]", "t107", "t108", "[SEP]"]
    assert frame["id"].tolist() == tokens.ids.tolist()
    assert frame["start"].tolist() == tokens.starts.tolist()
    assert frame["special"].tolist() == [True, False, False, True]
    assert frame["special"].dtype == bool
    assert list(frame.columns) == [
        *("token", "id", "type_id", "start", "end", "special", "word_id", "sequence_id")
    ]


def test_without_pandas(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    result = client.encode("a", embeddings=True, tokens=True)
    for make in (lambda: layertap.to_pandas([result]), result.tokens.to_pandas):
        with pytest.raises(ImportError, match=r"pip install 'layertap\[pandas\]'"):
            make()

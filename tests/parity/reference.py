"""The truth that parity tests compare with: transformers in process, eager, float32, one text at a time."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import AutoTokenizer, BatchEncoding

import layertap
from families import FAMILIES, MAX_TOKENS, Family

Array: TypeAlias = np.ndarray[Any, Any]
Input: TypeAlias = str | layertap.Pair | layertap.TokenIds | layertap.Words


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What one input gives: T tokens, L layers, A heads, H hidden."""

    encoding: BatchEncoding | None  # of one; None for token ids
    ids: Array  # (T,)
    type_ids: Array  # (T,)
    last_hidden_state: Array  # (T, H)
    pooler_output: Array | None  # (H,)
    hidden_states: Array  # (L+1, T, H)
    attentions: Array  # (L, A, T, T)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


@dataclass(slots=True, eq=False, repr=False)
class Reference:
    """One model as transformers runs it, whose answers are kept for the session."""

    name: str
    family: Family
    folder: Path
    tokenizer: Any = field(init=False)
    model: Any = field(init=False)
    _answers: dict[tuple[bytes, bytes], Expected] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = self.family.model_class.from_pretrained(self.folder, attn_implementation="eager").eval()

    def __repr__(self) -> str:
        return self.name

    @property
    def takes_type_ids(self) -> bool:
        return "token_type_ids" in inspect.signature(self.model.forward).parameters

    def tokenize(self, item: Input, side: str = "right") -> BatchEncoding | None:
        """A batch of one by the family's own tokenizer, cut to the model's limit; None for token ids."""
        if isinstance(item, layertap.TokenIds):
            return None
        self.tokenizer.truncation_side = side
        match item:
            case layertap.Pair(first, second):
                batch: list[Any] = [(first, second)]
            case layertap.Words(words):
                batch = [list(words)]
            case _:
                batch = [item]
        split = isinstance(item, layertap.Words)
        return self.tokenizer(batch, is_split_into_words=split, truncation=True, max_length=MAX_TOKENS)

    def encode(self, item: Input, side: str = "right") -> Expected:
        encoding = self.tokenize(item, side)
        if isinstance(item, layertap.TokenIds):
            ids, type_ids = item.ids, item.type_ids
        else:
            ids, type_ids = encoding["input_ids"][0], encoding.get("token_type_ids", [None])[0]
        ids = np.asarray(ids)
        type_ids = np.zeros_like(ids) if type_ids is None else np.asarray(type_ids)
        key = (ids.tobytes(), type_ids.tobytes())
        if key not in self._answers:
            self._answers[key] = self._run(ids, type_ids)
        return replace(self._answers[key], encoding=encoding)

    def _run(self, ids: Array, type_ids: Array) -> Expected:
        inputs = {"input_ids": torch.from_numpy(ids)[None]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if self.takes_type_ids:
            inputs["token_type_ids"] = torch.from_numpy(type_ids)[None]
        with torch.no_grad():
            output = self.model(**inputs, output_hidden_states=True, output_attentions=True)
        pooled = output.get("pooler_output")
        return Expected(
            encoding=None,
            ids=ids,
            type_ids=type_ids,
            last_hidden_state=output.last_hidden_state[0].numpy(),
            pooler_output=None if pooled is None else pooled[0].numpy(),
            hidden_states=torch.cat(output.hidden_states).numpy(),
            attentions=torch.cat(output.attentions).numpy(),
        )


def make_references(folders: Mapping[str, Path]) -> dict[str, Reference]:
    return {name: Reference(name, FAMILIES[name], folder) for name, folder in folders.items()}


# --------------------------------------------------------------------- what was asked, in numpy


def select_attentions(maps: Array, asked: bool | Sequence[int] | layertap.Attentions) -> Array:
    """(L, A, T, T) to (layers, heads or 1, queries, T)."""
    if not isinstance(asked, layertap.Attentions):
        return maps if asked is True else maps[list(asked)]
    if asked.layers:
        maps = maps[list(asked.layers)]
    if asked.heads:
        maps = maps[:, list(asked.heads)]
    if asked.mean_over_heads:
        maps = maps.mean(axis=1, keepdims=True)
    if asked.query_positions:
        maps = maps[:, :, list(asked.query_positions)]
    return maps


def token_range(expected: Expected, span: layertap.Span) -> tuple[int, int]:
    """The tokens that a span covers: in characters, those that begin in it, white space before a word aside."""
    if span.unit == "token":
        return span.start, span.end
    assert expected.encoding is not None
    encoding = expected.encoding.encodings[0]
    inside = []
    for position, (start, end) in enumerate(encoding.offsets):
        # These tokenizers write the space before a word as the first character of its token.
        spaces = len(token := encoding.tokens[position]) - len(token.lstrip("Ġ▁"))
        begin = start + spaces if end - start == len(token) > spaces else start
        if encoding.sequence_ids[position] is not None and span.start <= begin < span.end:
            inside.append(position)
    return inside[0], inside[-1] + 1


def embed(expected: Expected, spec: layertap.Embedding) -> Array:
    """(D,), or (spans, D), in float32: pooled, cut and normalized as `spec` says."""
    layers = [expected.hidden_states[layer] for layer in spec.layers or (-1,)]
    if spec.layer_merge == "mean":
        hidden = np.mean(layers, axis=0)
    elif spec.layer_merge == "sum":
        hidden = np.sum(layers, axis=0)
    else:
        hidden = np.concatenate(layers, axis=-1)
    ranges = [token_range(expected, span) for span in spec.spans] or [(0, expected.num_tokens)]
    vectors = np.stack([_pool(expected, hidden[start:end], spec.pooling or "mean") for start, end in ranges])
    if spec.dimensions:
        vectors = vectors[:, : spec.dimensions]
    if spec.normalize:
        vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors if spec.spans else vectors[0]


def _pool(expected: Expected, rows: Array, pooling: str) -> Array:
    match pooling:
        case "mean":
            return rows.mean(axis=0)
        case "cls":
            return rows[0]
        case "max":
            return rows.max(axis=0)
        case "last_token":
            return rows[-1]
        case "mean_max":
            return np.concatenate([rows.mean(axis=0), rows.max(axis=0)])
        case "pooler":
            assert expected.pooler_output is not None
            return expected.pooler_output
    raise AssertionError(f"unknown pooling {pooling}")


# -------------------------------------------------------------------------------- comparing

ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of rounding to the nearest."""


def assert_close(actual: Any, expected: Array, name: str, dtype: str = "float32", atol: float = 2e-5) -> None:
    """float32 within the project's promise; a narrower type within its own rounding on top."""
    assert isinstance(actual, np.ndarray), name
    assert actual.dtype == (np.float16 if dtype == "float16" else np.float32), name
    assert actual.shape == expected.shape, name
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(actual).view(np.uint32)
        assert not (bits & 0xFFFF).any(), f"{name} is not bfloat16"
    rtol = 1e-4 + ROUNDING[dtype]
    np.testing.assert_allclose(actual.astype(np.float32), expected, rtol=rtol, atol=atol, err_msg=name)


def assert_embedding(actual: Any, expected: Array, name: str, encoding: str) -> None:
    if encoding == "int8":
        assert isinstance(actual, layertap.Quantized), name
        assert actual.values.dtype == np.int8
        assert actual.values.shape == expected.shape, name
        largest = np.abs(expected).max(axis=-1)
        np.testing.assert_allclose(actual.scale, largest / 127, rtol=1e-3, atol=1e-6, err_msg=name)
        step = np.asarray(actual.scale)[..., None]
        assert (
            np.abs(actual.dequantize() - expected) <= 0.5 * step + 1e-4 * np.abs(expected) + 2e-5
        ).all(), name
    elif encoding == "binary":
        width = expected.shape[-1]
        assert actual.dtype == np.uint8, name
        assert actual.shape == (*expected.shape[:-1], -(-width // 8)), name
        bits = np.unpackbits(actual, axis=-1, count=width).astype(bool)
        sure = np.abs(expected) > 1e-4  # closer to zero, the sign depends on rounding
        assert (bits == (expected > 0))[sure].all(), name
    else:
        assert_close(actual, expected, name, encoding)


def assert_result(result: layertap.Result, expected: Expected, options: Mapping[str, Any]) -> None:
    """`result` holds what `options` asked for, with the values of `expected`, and nothing else."""
    dtype = options.get("dtype", "float32")
    assert result.token_count == expected.num_tokens

    def compare(name: str, wanted: Array | None, atol: float = 2e-5) -> None:
        actual = getattr(result, name)
        if wanted is None:
            assert actual is None, f"{name} was not asked for"
        else:
            assert_close(actual, wanted, name, dtype, atol)

    asked: Any = options.get("hidden_states")
    hidden_states = expected.hidden_states if asked is True else asked and expected.hidden_states[list(asked)]
    maps = options.get("attentions")
    compare("last_hidden_state", expected.last_hidden_state if options.get("last_hidden_state") else None)
    compare("pooler_output", expected.pooler_output if options.get("pooler_output") else None)
    compare("hidden_states", hidden_states)
    compare("attentions", select_attentions(expected.attentions, maps) if maps else None, atol=2e-6)

    specs = as_specs(options.get("embeddings"))
    assert len(result.embeddings) == len(specs)
    for number, (actual, spec) in enumerate(zip(result.embeddings, specs, strict=True)):
        assert_embedding(
            actual, embed(expected, spec), f"embeddings[{number}]: {spec}", spec.encoding or dtype
        )

    if options.get("tokens"):
        assert result.tokens is not None
        np.testing.assert_array_equal(result.tokens.ids, expected.ids)
        if expected.encoding is None or "token_type_ids" in expected.encoding:
            np.testing.assert_array_equal(result.tokens.type_ids, expected.type_ids)
    else:
        assert result.tokens is None


def as_specs(asked: Any) -> list[layertap.Embedding]:
    if not asked:
        return []
    if asked is True:
        return [layertap.Embedding()]
    return [asked] if isinstance(asked, layertap.Embedding) else list(asked)

"""Selections as the contract has them, drawn by hypothesis, and what each gives, in numpy.

`strategies.py` draws what the SDK can ask for; here the messages themselves are drawn, so that nothing between a
caller and the server has to know an output before it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from reference import Array, Expected, Input, Reference, assert_close, assert_embedding

import layertap
from families import HIDDEN_SIZE, NUM_HEADS, NUM_LAYERS
from layertap.v1 import encoder_pb2 as pb

NONE, POOLER = pb.POOLING_NONE, pb.POOLING_POOLER
# Those that can be concatenated.
REDUCING = [pb.POOLING_MEAN, pb.POOLING_CLS, pb.POOLING_MAX, pb.POOLING_LAST_TOKEN, pb.POOLING_MEAN_MAX]
REDUCING += [pb.POOLING_WEIGHTED_MEAN, pb.POOLING_MEAN_SQRT_LEN]
DTYPES = {0: "float32", 1: "float32", 2: "float16", 3: "bfloat16"}
ENCODINGS = {0: "", 1: "float32", 2: "float16", 3: "bfloat16", 4: "int8", 5: "binary"}


def input_message(item: Input) -> pb.Input:
    match item:
        case layertap.Pair(first, second):
            return pb.Input(pair=pb.TextPair(first=first, second=second))
        case layertap.TokenIds(ids, type_ids):
            types = [] if type_ids is None else [int(one) for one in type_ids]
            return pb.Input(token_ids=pb.TokenIds(ids=[int(one) for one in ids], type_ids=types))
        case layertap.Words(words):
            return pb.Input(words=pb.Words(words=words))
        case _:
            return pb.Input(text=str(item))


# ------------------------------------------------------------------------------- in numpy


def special_tokens(reference: Reference, item: Input, expected: Expected) -> Array:
    """(T,) whether each token is a special one; of ready ids, those of the special tokens."""
    if isinstance(item, layertap.TokenIds):
        return np.isin(expected.ids, reference.tokenizer.all_special_ids)
    if expected.encoding is not None and expected.encoding.encodings:
        return np.asarray(expected.encoding.encodings[0].special_tokens_mask, bool)
    batch = [(item.first, item.second)] if isinstance(item, layertap.Pair) else [item]
    tokenized = reference.tokenizer(batch, return_special_tokens_mask=True)
    return np.asarray(tokenized["special_tokens_mask"][0], bool)


def word_numbers(expected: Expected) -> Array | None:
    """(T,) the word of each token, -1 for none; None where they are not known."""
    if expected.encoding is None or not expected.encoding.encodings:
        return None
    words = expected.encoding.encodings[0].word_ids
    return np.array([-1 if word is None else word for word in words])


def ranges_of(spec: pb.EmbeddingSpec, expected: Expected) -> list[tuple[int, int]]:
    ranges = []
    for span in spec.spans:
        if span.unit == pb.Span.UNIT_TOKEN:
            ranges.append((span.start, span.end))
            continue
        assert span.unit == pb.Span.UNIT_WORD
        words = word_numbers(expected)
        [inside] = np.nonzero((words >= span.start) & (words < span.end))
        ranges.append((inside[0], inside[-1] + 1))
    return ranges or [(0, expected.num_tokens)]


def pooled(rows: Array, places: Array, pooling: int, pooler_output: Array | None) -> Array:
    """The vector of some rows, whose numbers in their text are `places` (from 0)."""
    numbers = places + 1.0
    match pooling:
        case pb.POOLING_MEAN:
            return rows.mean(0)
        case pb.POOLING_CLS:
            return rows[0]
        case pb.POOLING_MAX:
            return rows.max(0)
        case pb.POOLING_LAST_TOKEN:
            return rows[-1]
        case pb.POOLING_MEAN_MAX:
            return np.concatenate([rows.mean(0), rows.max(0)])
        case pb.POOLING_WEIGHTED_MEAN:
            return (rows * numbers[:, None]).sum(0) / numbers.sum()
        case pb.POOLING_MEAN_SQRT_LEN:
            return rows.sum(0) / np.sqrt(len(rows))
    assert pooling == POOLER
    assert pooler_output is not None
    return pooler_output


def embed(spec: pb.EmbeddingSpec, expected: Expected, special: Array) -> Array:
    """(D,), (spans, D) or (tokens, D), in float32."""
    layers = [expected.hidden_states[layer] for layer in spec.layers or (-1,)]
    merge = {pb.LAYER_MERGE_MEAN: np.mean, pb.LAYER_MERGE_SUM: np.sum}.get(spec.layer_merge)
    hidden = np.concatenate(layers, -1) if merge is None else merge(layers, axis=0)
    vectors = []
    for first, last in ranges_of(spec, expected):
        places = np.arange(first, last)
        if spec.exclude_special_tokens:
            places = places[~special[places]]
        if spec.pooling == NONE or list(spec.poolings) == [NONE]:
            vectors.extend(hidden[places])
            continue
        poolings = list(spec.poolings) or [spec.pooling or pb.POOLING_MEAN]
        parts = [pooled(hidden[places], places, one, expected.pooler_output) for one in poolings]
        vectors.append(np.concatenate(parts))
    found = np.stack(vectors)
    if spec.dimensions:
        found = found[:, : spec.dimensions]
    if spec.normalize:
        # A token that ESM masks begins as zeros, and stays so.
        found = found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
    is_one = not spec.spans and spec.pooling != NONE and list(spec.poolings) != [NONE]
    return found[0] if is_one else found


def rows_of(states: Array, positions: Sequence[int]) -> Array:
    """The rows at some positions, in the last dimension but one; all where none are named."""
    return states[..., list(positions), :] if positions else states


def maps_of(asked: pb.AttentionSelection, expected: Expected) -> Array:
    """(layers, heads or 1, rows, columns), or (pairs, 1, rows, columns)."""
    maps = expected.attentions
    if asked.pairs:
        maps = np.stack([maps[one.layer, one.head] for one in asked.pairs])[:, None]
    else:
        maps = maps[list(asked.layers)] if asked.layers else maps
        maps = maps[:, list(asked.heads)] if asked.heads else maps
        maps = maps.mean(1, keepdims=True) if asked.mean_over_heads else maps
    maps = rows_of(maps, asked.query_positions)
    return maps[..., list(asked.key_positions)] if asked.key_positions else maps


# ------------------------------------------------------------------------------ comparing


def array_of(tensor: pb.Tensor) -> Array:
    """A tensor of a reply; bfloat16 as float32."""
    kinds: dict[int, Any] = {1: "<f4", 2: "<f2", 3: "<u2", 4: "i1", 5: "u1", 6: "<i4"}
    values = np.frombuffer(tensor.data, kinds[tensor.dtype]).reshape(tuple(tensor.shape))
    return (values.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == 3 else values


def assert_reply(result: pb.EncodeResult, reference: Reference, item: Input, asked: pb.EncodeRequest) -> None:
    """The result holds what was asked of this input, with the values of the reference, and nothing else."""
    expected, outputs, dtype = reference.encode(item), asked.outputs, DTYPES[asked.wire_dtype]
    wanted: dict[str, Array] = {}
    if outputs.last_hidden_state:
        wanted["last_hidden_state"] = rows_of(expected.last_hidden_state, outputs.last_hidden_state_positions)
    if outputs.pooler_output:
        assert expected.pooler_output is not None
        wanted["pooler_output"] = expected.pooler_output
    if outputs.HasField("hidden_states"):
        layers = list(outputs.hidden_states.layers) or slice(None)
        wanted["hidden_states"] = rows_of(expected.hidden_states[layers], outputs.hidden_states.positions)
    if outputs.HasField("attentions"):
        wanted["attentions"] = maps_of(outputs.attentions, expected)
    for name in ("last_hidden_state", "pooler_output", "hidden_states", "attentions"):
        assert result.HasField(name) == (name in wanted), name
    for name, values in wanted.items():
        atol = 2e-6 if name == "attentions" else 2e-5
        assert_close(array_of(getattr(result, name)), values, name, dtype, atol)
    special = special_tokens(reference, item, expected)
    assert len(result.embeddings) == len(outputs.embeddings)
    for tensor, spec in zip(result.embeddings, outputs.embeddings, strict=True):
        encoding = ENCODINGS[spec.encoding] or dtype
        actual: Any = array_of(tensor)
        if encoding == "int8":
            scale = np.array(tensor.scale, np.float32)
            actual = layertap.Quantized(actual, scale if actual.ndim == 2 else scale[0])
        assert_embedding(actual, embed(spec, expected, special), f"{spec}", encoding)


# ---------------------------------------------------------------------------------- drawn


@st.composite
def embedding_specs(draw: st.DrawFn, reference: Reference, items: list[Input]) -> pb.EmbeddingSpec:
    """A spec that can be answered for each of the inputs."""
    answers = [reference.encode(item) for item in items]
    specials = [special_tokens(reference, item, answer) for item, answer in zip(items, answers, strict=True)]
    num_tokens = min(answer.num_tokens for answer in answers)
    spec = pb.EmbeddingSpec(
        layer_merge=draw(st.sampled_from(list(pb.LayerMerge.values()))),
        dimensions=draw(st.sampled_from([0, 0, 7, HIDDEN_SIZE])),
        encoding=draw(st.sampled_from(list(ENCODINGS))),
    )
    normalize = draw(st.sampled_from([None, False, True]))
    if normalize is not None:
        spec.normalize = normalize
    kind = draw(st.sampled_from(["one", "none", "several"] + ["pooler"] * reference.family.has_pooler))
    if kind == "pooler":
        spec.pooling = POOLER
        return spec
    if kind == "several":
        spec.poolings.extend(draw(st.lists(st.sampled_from(REDUCING), min_size=1, max_size=4)))
    elif kind == "none" and draw(st.booleans()):
        spec.poolings.append(NONE)
    else:
        spec.pooling = NONE if kind == "none" else draw(st.sampled_from(REDUCING))
    spec.layers.extend(draw(st.lists(st.integers(-NUM_LAYERS - 1, NUM_LAYERS), max_size=4)))
    common = [position for position in range(num_tokens) if not any(one[position] for one in specials)]
    if kind != "none":
        for _ in range(draw(st.integers(0, 3))):
            first = draw(st.integers(0, num_tokens - 1))
            last = draw(st.integers(first + 1, num_tokens))
            spec.spans.add(start=first, end=last, unit=pb.Span.UNIT_TOKEN)
        numbers = [word_numbers(answer) for answer in answers]
        if all(found is not None and found.max() >= 0 for found in numbers) and not any(
            isinstance(item, layertap.Pair | layertap.TokenIds) for item in items
        ):
            num_words = min(int(found.max()) + 1 for found in numbers if found is not None)
            for _ in range(draw(st.integers(0, 2))):
                first = draw(st.integers(0, num_words - 1))
                last = draw(st.integers(first + 1, num_words))
                if all(((found >= first) & (found < last)).any() for found in numbers):
                    spec.spans.add(start=first, end=last, unit=pb.Span.UNIT_WORD)
    # Without special tokens something must be left of each range.
    is_answerable = all(
        any(first <= position < last for position in common)
        for answer in answers
        for first, last in ranges_of(spec, answer)
    )
    if is_answerable:
        spec.exclude_special_tokens = draw(st.booleans())
    return spec


@st.composite
def encode_requests(draw: st.DrawFn, reference: Reference, items: list[Input]) -> pb.EncodeRequest:
    """A request for these inputs: any mix of outputs that is not empty."""
    num_tokens = min(reference.encode(item).num_tokens for item in items)
    positions = st.lists(st.integers(-num_tokens, num_tokens - 1), max_size=4)
    outputs = pb.OutputSelection()
    kinds = ["last", "states", "maps", "pairs", "vectors"] + ["pooler"] * reference.family.has_pooler
    wanted = draw(st.sets(st.sampled_from(kinds), min_size=1, max_size=4))
    if "last" in wanted:
        outputs.last_hidden_state = True
        outputs.last_hidden_state_positions.extend(draw(positions))
    if "pooler" in wanted:
        outputs.pooler_output = True
    if "states" in wanted:
        layers = draw(st.lists(st.integers(-NUM_LAYERS - 1, NUM_LAYERS), max_size=4))
        outputs.hidden_states.CopyFrom(pb.HiddenStateSelection(layers=layers, positions=draw(positions)))
    layer, head = st.integers(-NUM_LAYERS, NUM_LAYERS - 1), st.integers(-NUM_HEADS, NUM_HEADS - 1)
    if "pairs" in wanted:
        for pair in draw(st.lists(st.tuples(layer, head), min_size=1, max_size=5)):
            outputs.attentions.pairs.add(layer=pair[0], head=pair[1])
    elif "maps" in wanted:
        outputs.attentions.SetInParent()
        outputs.attentions.layers.extend(draw(st.lists(layer, max_size=3)))
        outputs.attentions.heads.extend(draw(st.lists(head, max_size=3)))
        outputs.attentions.mean_over_heads = draw(st.booleans())
    if outputs.HasField("attentions"):
        outputs.attentions.query_positions.extend(draw(positions))
        outputs.attentions.key_positions.extend(draw(positions))
    if "vectors" in wanted:
        outputs.embeddings.extend(draw(st.lists(embedding_specs(reference, items), min_size=1, max_size=4)))
    return pb.EncodeRequest(
        model=reference.name,
        inputs=[input_message(item) for item in items],
        outputs=outputs,
        wire_dtype=draw(st.sampled_from(list(DTYPES))),
        truncation=pb.TRUNCATION_END,
    )

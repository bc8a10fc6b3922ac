"""What callers may ask, drawn by hypothesis: inputs of every kind, and any mix of outputs."""

from typing import Any, TypeAlias

from hypothesis import strategies as st
from reference import Input, Reference

import layertap
from families import FAMILIES, HIDDEN_SIZE, MAX_TOKENS, NUM_HEADS, NUM_LAYERS, sentences

RESIDUES = "LAGVSERTIDPKQNFYMHWC"
DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])

Request: TypeAlias = tuple[list[Input], layertap.EncodeOptions]


@st.composite
def texts(draw: st.DrawFn, name: str, max_words: int = 40) -> str:
    """Words of real text (residues for ESM), here and there a mask token; sometimes empty."""
    if FAMILIES[name].model_type == "esm":
        words = list(draw(st.text(RESIDUES, max_size=max_words)))
        joint = ""
    else:
        sentence = draw(st.sampled_from(sentences())).split()
        words = sentence[: draw(st.integers(0, max_words))]
        joint = " "
    for position in draw(st.lists(st.integers(1, max(1, len(words))), max_size=2)):
        if words:  # for a text of only mask tokens, ESM itself divides by zero
            words.insert(position, FAMILIES[name].mask)
    return joint.join(words)


@st.composite
def token_ids(draw: st.DrawFn, reference: Reference) -> layertap.TokenIds:
    """Any ids, special ones and padding among them; type ids where the model tells them apart."""
    ids = draw(st.lists(st.integers(0, len(reference.tokenizer) - 1), min_size=1, max_size=MAX_TOKENS))
    if not reference.family.uses_type_ids or draw(st.booleans()):
        # The last id keeps ESM from a text of masks alone.
        return layertap.TokenIds([*ids[:-1], 5])
    types = draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    return layertap.TokenIds([*ids[:-1], 5], types)


def inputs(reference: Reference) -> st.SearchStrategy[Input]:
    name = reference.name
    short = texts(name, max_words=10)
    kinds: list[st.SearchStrategy[Any]] = [texts(name), texts(name), token_ids(reference)]
    kinds.append(st.builds(layertap.Pair, short, short))
    if reference.tokenizer.is_fast:
        kinds.append(st.builds(layertap.Words, short.map(str.split).filter(bool)))
    return st.one_of(kinds)


@st.composite
def embeddings(draw: st.DrawFn, reference: Reference) -> layertap.Embedding:
    poolings = [None, "mean", "cls", "max", "last_token", "mean_max"]
    pooling: Any = draw(st.sampled_from(poolings + ["pooler"] * reference.family.has_pooler))
    layer = st.integers(-NUM_LAYERS - 1, NUM_LAYERS)
    layers = [] if pooling == "pooler" else draw(st.lists(layer, max_size=3))
    merge: Any = draw(st.sampled_from([None, "concat", "mean", "sum"])) if len(layers) > 1 else None
    return layertap.Embedding(
        pooling=pooling,
        layers=layers,
        layer_merge=merge,
        normalize=draw(st.sampled_from([None, False, True])),
        dimensions=draw(st.sampled_from([0, 0, 7, HIDDEN_SIZE // 2, HIDDEN_SIZE])),
        encoding=draw(st.sampled_from([None, "float32", "float16", "bfloat16", "int8", "binary"])),
    )


@st.composite
def attentions(draw: st.DrawFn, reference: Reference, num_tokens: int) -> layertap.Attentions:
    """Of inputs that have at least `num_tokens` tokens."""
    num_layers = NUM_LAYERS
    return layertap.Attentions(
        layers=draw(st.lists(st.integers(-num_layers, num_layers - 1), max_size=3)),
        heads=draw(st.lists(st.integers(-NUM_HEADS, NUM_HEADS - 1), max_size=3)),
        mean_over_heads=draw(st.booleans()),
        query_positions=draw(st.lists(st.integers(-num_tokens, num_tokens - 1), max_size=3)),
    )


@st.composite
def requests(draw: st.DrawFn, reference: Reference, max_inputs: int = 3) -> Request:
    """One call: a few inputs, and a mix of outputs that is not empty."""
    items = draw(st.lists(inputs(reference), min_size=1, max_size=max_inputs))
    num_tokens = min(reference.encode(item).num_tokens for item in items)
    layer = st.integers(-NUM_LAYERS - 1, NUM_LAYERS)
    options: layertap.EncodeOptions = {"model": reference.name, "truncation": "end", "dtype": draw(DTYPES)}
    wanted = draw(
        st.sets(
            st.sampled_from(
                ["last_hidden_state", "hidden_states", "attentions", "embeddings", "tokens"]
                + ["pooler_output"] * reference.family.has_pooler
            ),
            min_size=1,
            max_size=4,
        )
    )
    if "last_hidden_state" in wanted:
        options["last_hidden_state"] = True
    if "pooler_output" in wanted:
        options["pooler_output"] = True
    if "tokens" in wanted:
        options["tokens"] = True
    if "hidden_states" in wanted:
        options["hidden_states"] = draw(st.one_of(st.just(True), st.lists(layer, min_size=1, max_size=3)))
    if "attentions" in wanted:
        options["attentions"] = draw(st.one_of(st.just(True), attentions(reference, num_tokens)))
    if "embeddings" in wanted:
        options["embeddings"] = draw(st.lists(embeddings(reference), min_size=1, max_size=3))
    return items, options

"""Benchmark: what single outputs cost, as ratios to larger outputs and to batches without them.

The models have the shapes of real ones and random weights: a BERT-base and a MiniLM with masked-language heads
that also give sparse vectors (SPLADE), and a small ESM with a contact head. Each ratio is the median over rounds in
which both sides run one after the other. Nothing of the gRPC server is measured.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, EsmConfig, EsmForMaskedLM

from bench.report import Row, save, show_machine
from layertap.v1 import encoder_pb2 as pb
from layertap_server.api.planning import Resolver
from layertap_server.api.validation import parse_selection
from layertap_server.engine import Engine, load_model
from layertap_server.engine.memory import HeldBytes
from layertap_server.engine.model import LoadedModel
from layertap_server.plan import Work
from layertap_server.tokenization.inputs import Encoded, TokenIds, TokenTable

VOCAB_SIZE = 30522
SPLADE_FILES = {
    "modules.json": [
        {
            "idx": 0,
            "name": "0",
            "path": "",
            "type": "sentence_transformers.sparse_encoder.models.MLMTransformer",
        },
        {
            "idx": 1,
            "name": "1",
            "path": "1_SpladePooling",
            "type": "sentence_transformers.sparse_encoder.models.SpladePooling",
        },
    ],
    "1_SpladePooling/config.json": {
        "pooling_strategy": "max",
        "activation_function": "relu",
        "word_embedding_dimension": VOCAB_SIZE,
    },
    "config_sentence_transformers.json": {"model_type": "SparseEncoder", "similarity_fn_name": "dot"},
    "sentence_bert_config.json": {"max_seq_length": 512},
}
MEAN = pb.OutputSelection(embeddings=[{"pooling": pb.POOLING_MEAN}])
# The largest part of a batch's time that one text's further output may add for the others.
MOST_ADDED = 1.05


def build_splade(folder: Path, config: BertConfig) -> Path:
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    for name, content in SPLADE_FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def build_esm(folder: Path) -> Path:
    """The shape of esm2_t6_8M."""
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=33,
        hidden_size=320,
        num_hidden_layers=6,
        num_attention_heads=20,
        intermediate_size=1280,
        max_position_embeddings=1026,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        pad_token_id=1,
        mask_token_id=32,
    )
    EsmForMaskedLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: str) -> LoadedModel:
    return load_model(
        folder.name, str(folder), device="cpu", dtype=dtype, trust_remote_code=False, max_input_tokens=0
    )


def work_of(loaded: LoadedModel, outputs: pb.OutputSelection, num_tokens: int, seed: int = 0) -> Work:
    ids = np.random.default_rng(seed).integers(5, loaded.facts.vocab_size - 5, num_tokens)
    resolver = Resolver(parse_selection(pb.EncodeRequest(outputs=outputs), loaded.facts), loaded.facts)
    encoded = Encoded(ids, np.zeros_like(ids), 0, False, 0, lambda: TokenTable([], [], [], [], [], []))
    return resolver.resolve(TokenIds(ids, None), encoded, 0)


def ratio_of(engine: Engine, one: Sequence[Work], other: Sequence[Work], rounds: int) -> float:
    """The time of one batch in relation to that of another."""

    def seconds(works: Sequence[Work]) -> float:
        begun = time.perf_counter()
        engine.run(works)
        return time.perf_counter() - begun

    seconds(one), seconds(other)
    return statistics.median(seconds(one) / seconds(other) for _ in range(rounds))


def compared(
    loaded: LoadedModel, name: str, one: pb.OutputSelection, all_: pb.OutputSelection, size: int, rounds: int
) -> list[Row]:
    """A small output against a large one: the time of a pass over one text, and the bytes of the reply."""
    engine = Engine(loaded)
    works = [work_of(loaded, outputs, size) for outputs in (one, all_)]
    times = ratio_of(engine, works[:1], works[1:], rounds)
    num_bytes = works[0].result_bytes / works[1].result_bytes
    large = f"of {works[1].result_bytes / 1e6:.1f} MB"
    return [
        Row(f"{name}: time of the pass", times, "at most 1.05", times <= MOST_ADDED),
        Row(f"{name}: bytes of the reply ({large})", num_bytes),
    ]


def in_a_batch(
    loaded: LoadedModel,
    name: str,
    outputs: pb.OutputSelection,
    rounds: int,
    size: int = 128,
    number: int = 32,
) -> Row:
    """A batch in which one text wants this too, against the batch in which all want a mean."""
    both = pb.OutputSelection()
    both.CopyFrom(MEAN)
    both.MergeFrom(outputs)
    plain = [work_of(loaded, MEAN, size, seed) for seed in range(number)]
    mixed = [work_of(loaded, both, size, 0), *plain[1:]]
    ratio = ratio_of(Engine(loaded), mixed, plain, rounds)
    return Row(f"one of {number} wants {name}: time of the batch", ratio, "at most 1.05", ratio <= MOST_ADDED)


def peak_bytes(engine: Engine, works: Sequence[Work]) -> int:
    with HeldBytes() as counted:
        engine.run(works)
    return counted.peak


def sparse_memory(loaded: LoadedModel) -> Row:
    engine = Engine(loaded)
    plain, sparse = (
        [work_of(loaded, outputs, 128, seed) for seed in range(32)]
        for outputs in (MEAN, pb.OutputSelection(sparse={}))
    )
    peak_bytes(engine, plain)
    added = (peak_bytes(engine, sparse) - peak_bytes(engine, plain)) / 2**20
    what = f"sparse vectors of 32 × 128 tokens, V = {VOCAB_SIZE}: MiB above the pass"
    return Row(what, added, "at most 64", added <= 64)


ONE_ROW = pb.OutputSelection(attentions={"pairs": [{"layer": -1, "head": 0}], "query_positions": [0]})
TWO_ROWS = pb.OutputSelection(hidden_states={"positions": [0, -1]})


def large_rows(loaded: LoadedModel, rounds: int) -> Iterator[Row]:
    everything = pb.OutputSelection(attentions={})
    all_rows = pb.OutputSelection(hidden_states={})
    all_logits = pb.OutputSelection(logits={})
    one_mask = pb.OutputSelection(logits={"positions": [7], "top_k": 1})
    yield from compared(loaded, "one row of one head's map / all maps", ONE_ROW, everything, 512, rounds)
    yield from compared(loaded, "two rows / all rows of all hidden states", TWO_ROWS, all_rows, 512, rounds)
    yield from compared(loaded, "the best word of one mask / all logits", one_mask, all_logits, 512, rounds)


def batch_rows(loaded: LoadedModel, rounds: int) -> Iterator[Row]:
    wanted: dict[str, pb.OutputSelection] = {
        "two rows of all hidden states": TWO_ROWS,
        "one row of one head's map": ONE_ROW,
        "a column of a map": pb.OutputSelection(attentions={"layers": [-1], "key_positions": [0]}),
        "token vectors": pb.OutputSelection(embeddings=[{"pooling": pb.POOLING_NONE, "encoding": 4}]),
        "three poolings": pb.OutputSelection(embeddings=[{"poolings": [1, 8, 9]}]),
        "the best 5 words of one mask": pb.OutputSelection(logits={"positions": [7], "top_k": 5}),
        "a sparse vector": pb.OutputSelection(sparse={"top_k": 128}),
    }
    for name, outputs in wanted.items():
        yield in_a_batch(loaded, name, outputs, rounds)
    yield sparse_memory(loaded)


def contact_rows(loaded: LoadedModel, rounds: int) -> Iterator[Row]:
    everything, contacts = pb.OutputSelection(attentions={}), pb.OutputSelection(contacts=True)
    for row in compared(loaded, "contacts / all maps of a protein", contacts, everything, 256, rounds):
        yield replace(row, wanted="")  # they are computed from all maps
    yield in_a_batch(loaded, "contacts", contacts, rounds)


@click.command(context_settings={"show_default": True})
@click.option("--dtype", default="float32", help="The type that the layers compute in.")
@click.option("--rounds", default=5, help="Rounds of each comparison.")
@click.option("--only", type=click.Choice(["large", "batch", "contacts"]), help="A part of it.")
def main(dtype: str, rounds: int, only: str | None) -> None:
    """Measure single outputs against larger ones, and what they cost the other texts of a batch."""
    show_machine()
    rows: list[Row] = []
    mini = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    parts: dict[str, tuple[Callable[[Path], Path], Callable[[LoadedModel, int], Iterator[Row]]]] = {
        "large": (lambda folder: build_splade(folder, BertConfig(vocab_size=VOCAB_SIZE)), large_rows),
        "batch": (lambda folder: build_splade(folder, mini), batch_rows),
        "contacts": (build_esm, contact_rows),
    }
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for name, (build, measure) in parts.items():
            if only in (None, name):
                for row in measure(load(build(Path(scratch, name)), dtype), rounds):
                    row.show()
                    rows.append(row)
    save(rows, Path("build", "bench", "outputs.json"))


if __name__ == "__main__":
    main()

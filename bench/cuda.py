"""Benchmark: the engine on a CUDA device, as ratios within one run. Without a device, it only says so.

The model is a 12-layer BERT of the usual shape with random weights, which cost the same as trained ones. Its
texts have the lengths of natural texts, and random ids.
"""

import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from itertools import cycle
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoModel, BertConfig, BertModel

from bench.corpus import read_texts
from bench.engine import BATCH_SIZE, REPORTS, embedding_plan, flops_of, padded, work_of
from layertap_server.engine import Engine, LoadedModel, load_model
from layertap_server.engine.cpu.pooling import pool_natively
from layertap_server.engine.cuda.attention import run_rows
from layertap_server.engine.cuda.engine import CudaEngine
from layertap_server.engine.loading.reference import probe_ids
from layertap_server.engine.packed import run_packed
from layertap_server.enums import DType
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import OutputPlan, Work

# The batches of one round, each of about this many tokens. The largest keep any device busy.
NUM_BATCHES = 16
SIZES = (1024, 4096, 8192, 16_384)
BATCH_TOKENS = SIZES[-1]
SHORT_TEXT = 12
# The size of a square matrix product that is large enough to reach the device's rate.
PRODUCT = 8192
Batch = Sequence[Work]


def natural_batches(facts: ModelFacts, plan_of: Callable[[int], OutputPlan], num_tokens: int) -> list[Batch]:
    """Texts of natural lengths, in batches of at most this many tokens, as the scheduler forms them."""
    lengths = cycle(
        min(len(text.split()) * 4 // 3 + 2, facts.max_tokens)  # about four tokens to three words
        for text in read_texts()
    )
    batches: list[Batch] = []
    batch: list[Work] = []
    left = num_tokens
    while len(batches) < NUM_BATCHES:
        length = next(lengths)
        if length > left:
            batches.append(batch)
            batch, left = [], num_tokens
        batch.append(work_of(probe_ids(length, facts.vocab_size, len(batch)), plan_of(length), facts))
        left -= length
    return batches


def run_in_turn(engine: Engine, batches: Sequence[Batch]) -> None:
    for batch in batches:
        engine.run(batch)


def run_ahead(engine: CudaEngine, batches: Sequence[Batch]) -> None:
    """Runs batches, each launched before the result of the previous one is waited for."""
    launched = deque([engine.launch(batches[0])])
    for batch in batches[1:]:
        launched.append(engine.launch(batch))
        launched.popleft().wait()
    launched.pop().wait()


def error_of(engine: Engine, model: Any, works: Batch) -> float:
    """The relative Frobenius error of the last hidden states against transformers in float32, the mean of
    some texts."""
    plan = OutputPlan(DType.FLOAT32, last_hidden_state=True)
    works = [work_of(work.input_ids, plan, engine.facts) for work in works[:BATCH_SIZE]]
    errors = []
    for work, (tensor,) in zip(works, engine.run(works), strict=True):
        ids = torch.from_numpy(work.input_ids)[None].to(model.device)
        with torch.inference_mode():
            expected = model(input_ids=ids).last_hidden_state[0].cpu().numpy()
        errors.append(float(np.linalg.norm(tensor.data - expected) / np.linalg.norm(expected)))
    return statistics.mean(errors)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of one large matrix product in bfloat16, as a measure of the device."""
    left, right = (torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        left @ right
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * PRODUCT**3 / statistics.median(seconds)


def measure(loaded: LoadedModel, model: Any, rounds: int) -> dict[str, float]:
    """The lines of the report. `model` is the transformers model with the same weights, in float32."""
    plain, by_rows, engine = Engine(loaded, run_packed), Engine(loaded, run_rows), CudaEngine(loaded)
    in_steps = copy(engine)
    in_steps._pool = pool_natively  # which leaves pooling to torch on CUDA
    facts = engine.facts
    click.echo(f"attention: {facts.attention}")
    all_states = OutputPlan(DType.FLOAT32, hidden_states=tuple(range(facts.num_layers + 1)))
    model = model.to(loaded.device).eval()
    by_size = {size: natural_batches(facts, lambda n: embedding_plan(facts, n), size) for size in SIZES}
    vectors = by_size[BATCH_TOKENS]
    states = natural_batches(facts, lambda length: all_states, BATCH_TOKENS // 8)
    short = [work_of(probe_ids(SHORT_TEXT, facts.vocab_size, 0), embedding_plan(facts, SHORT_TEXT), facts)]

    error = error_of(engine, model, vectors[0])
    model = model.to(torch.bfloat16)
    ways: dict[str, Callable[[], object]] = {
        "vectors ahead": lambda: run_ahead(engine, vectors),
        **{str(size): partial(run_ahead, engine, batches) for size, batches in by_size.items()},
        "padded": lambda: padded(model, [work.input_ids for batch in vectors[:2] for work in batch]),
        "padded, short": lambda: [padded(model, [short[0].input_ids]) for _ in range(NUM_BATCHES)],
        "vectors in turn": lambda: run_in_turn(engine, vectors),
        "states ahead": lambda: run_ahead(engine, states),
        "states in turn": lambda: run_in_turn(engine, states),
        "short": lambda: run_in_turn(engine, [short] * NUM_BATCHES),
        "short, pooled in steps": lambda: run_in_turn(in_steps, [short] * NUM_BATCHES),
        "short, no graphs": lambda: run_in_turn(by_rows, [short] * NUM_BATCHES),
        "vectors plain": lambda: run_in_turn(plain, vectors),
    }
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begun)

    def ratio(slower: str, faster: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True))

    def share(size: int) -> float:
        texts = [work.input_ids for batch in by_size[size] for work in batch]
        return flops_of(model, texts, facts) / statistics.median(seconds[str(size)]) / rate

    rate = matmul_rate(loaded.device)
    num_texts = sum(map(len, vectors))
    return {
        "bf16 matmul rate, TFLOP/s": rate / 1e12,
        **{f"share of it, batches of {size} tokens (wanted 0.5)": share(size) for size in SIZES},
        "relative error of hidden states beside float32": error,
        "times transformers, padded 32 in arrival order": ratio("padded", "vectors ahead")
        * (num_texts / sum(map(len, vectors[:2]))),
        "one short text: times transformers": ratio("padded, short", "short"),
        "vectors: launched ahead, times in turn": ratio("vectors in turn", "vectors ahead"),
        "all hidden states: launched ahead, times in turn": ratio("states in turn", "states ahead"),
        "one short text: graph, times no graph": ratio("short, no graphs", "short"),
        "one short text: pooled in one kernel, times in steps": ratio("short, pooled in steps", "short"),
        "one short text, ms": 1e3 * statistics.median(seconds["short"]) / NUM_BATCHES,
        "natural lengths: attention by rows, times runs of equal length": ratio(
            "vectors plain", "vectors in turn"
        ),
        "texts/s": num_texts / statistics.median(seconds["vectors ahead"]),
    }


@click.command()
@click.option(
    "--model", default="", help="A hub name or a folder. [default: a 12-layer BERT, random weights]"
)
@click.option("--rounds", default=5, show_default=True, help="Rounds, after a warm-up round.")
def main(model: str, rounds: int) -> None:
    """Measure the engine on a CUDA device: share of its matmul rate, graphs, overlap."""
    if not torch.cuda.is_available():
        click.echo("torch finds no CUDA device: nothing was measured")
        return
    with tempfile.TemporaryDirectory() as folder:
        if not model:
            torch.manual_seed(0)
            BertModel(BertConfig()).save_pretrained(folder)
        source = model or folder
        loaded = load_model(
            "bench", source, device="cuda", dtype="bfloat16", trust_remote_code=False, max_input_tokens=0
        )
        results = measure(loaded, AutoModel.from_pretrained(source, dtype=torch.float32), rounds)
    device = torch.cuda.get_device_name(loaded.device)
    click.echo(f"{model or '12-layer BERT, random weights'}, bfloat16, {device}, torch {torch.__version__}")
    for line, value in results.items():
        click.echo(f"{line:<58}{value:12.4g}")
    REPORTS.mkdir(parents=True, exist_ok=True)
    report = REPORTS / f"cuda-{device.replace(' ', '-')}.json"
    report.write_text(
        json.dumps({"device": device, "torch": torch.__version__, **results}, indent=1), "utf-8"
    )


if __name__ == "__main__":
    main()

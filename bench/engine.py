"""Benchmark: the packed engine without a server, as ratios to other ways to run the same model on the CPU.

All ways get the same token ids. They are interleaved in each round, so that other work on the machine affects
all alike; ratios are medians over the rounds. The matmul ceiling is the fastest kind of matrix product that
torch offers: in each round, the kind with the best median call, and its median.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel

from bench.corpus import Corpus, corpus_option
from bench.inprocess import Served
from bench.onnx_peer import OnnxRuntime
from layertap_server.config import Config
from layertap_server.engine import engine_for, load_model
from layertap_server.engine.threads import use_threads
from layertap_server.enums import DType, Encoding, LayerMerge, Pooling
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import AttentionPlan, EmbeddingPlan
from layertap_server.plan import OutputPlan, Work
from layertap_server.tokenization.inputs import Text, Truncation
from layertap_server.tokenization.tokenizer_loading import load_tokenizer
from layertap_server.tokenization.worker import Tokenization

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "bench"
BATCH_SIZE = 32
# The largest batch that a core runs by itself: what the server chooses for these models.
MAX_BATCH_TOKENS = 512
PRODUCT_CALLS = 12
QUARTER = """
import time
while True:
    end = time.process_time() + 1e-3
    while time.process_time() < end:
        pass
    time.sleep(3e-3)
"""
Ids = npt.NDArray[np.int64]
Way = Callable[[], object]


@dataclass(slots=True)
class Bench:
    """One model in one dtype, the ways to run it, and their times in seconds."""

    source: str
    dtype: str
    rounds: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, ways: dict[str, Way]) -> None:
        """Runs each way once as a warm-up, then all ways in turn."""
        for way in ways.values():
            way()
        for _ in range(self.rounds):
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                self.seconds.setdefault(name, []).append(time.perf_counter() - begun)

    def ratio(self, slower: str, faster: str) -> float:
        return statistics.median(
            a / b for a, b in zip(self.seconds[slower], self.seconds[faster], strict=True)
        )


def embedding_plan(facts: ModelFacts, num_tokens: int) -> OutputPlan:
    mean = EmbeddingPlan(
        pooling=Pooling.MEAN,
        layers=(facts.num_layers,),
        layer_merge=LayerMerge.CONCAT,
        normalize=True,
        dimensions=facts.hidden_size,
        encoding=Encoding.FLOAT32,
        segments=((0, num_tokens),),
        has_spans=False,
    )
    return OutputPlan(DType.FLOAT32, embeddings=(mean,))


def work_of(ids: Ids, plan: OutputPlan, facts: ModelFacts) -> Work:
    return Work(ids, None, plan, plan.specs(len(ids), facts.hidden_size))


def even_batches(works: Sequence[Work], max_tokens: int, multiple_of: int) -> list[list[Work]]:
    """Works in arrival order, in batches of about equal size and at most this many tokens. If cores run
    batches by themselves, the number of batches is a multiple of the number of cores."""
    total = sum(work.num_tokens for work in works)
    num_batches = multiple_of * math.ceil(total / (multiple_of * max_tokens))
    batches: list[list[Work]] = [[] for _ in range(num_batches)]
    before = 0
    for work in works:
        batches[(before + work.num_tokens // 2) * num_batches // total].append(work)
        before += work.num_tokens
    return batches


@contextmanager
def quarter_of_a_core() -> Iterator[None]:
    """Runs a process that uses one millisecond in four of a core, as an event loop under load does."""
    with subprocess.Popen([sys.executable, "-c", QUARTER]) as process:
        try:
            yield
        finally:
            process.kill()


def padded(model: Any, texts: Sequence[Ids]) -> None:
    """transformers with padded batches of 32 and mean pooling, on the model's device. The vectors are on the
    host."""
    rest = iter(texts)
    while batch := list(islice(rest, BATCH_SIZE)):
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, one in enumerate(batch):
            ids[row, : len(one)] = torch.from_numpy(one)
            mask[row, : len(one)] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.inference_mode():
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            torch.nn.functional.normalize(pooled.float()).cpu()


def product_of(dtype: torch.dtype, hidden_size: int) -> tuple[Callable[[], float], float]:
    """The fastest kind of large matrix product in torch: the seconds of its median call, and its operations.

    The median is used, as for the pass that it is compared with: the fastest of many calls would be from a
    moment in which nothing else ran on the machine.
    """
    rows, width = 2048, 4 * hidden_size
    left, weight = torch.randn(rows, hidden_size).to(dtype), torch.randn(width, hidden_size).to(dtype)
    products: list[Way] = [lambda: torch.nn.functional.linear(left, weight)]
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], ""))

    @torch.inference_mode()
    def median_of_best() -> float:
        seconds: list[list[float]] = [[] for _ in products]
        for _ in range(PRODUCT_CALLS):
            for product, times in zip(products, seconds, strict=True):
                begun = time.perf_counter()
                product()
                times.append(time.perf_counter() - begun)
        return min(map(statistics.median, seconds))

    return median_of_best, 2.0 * rows * width * hidden_size


def flops_of(model: Any, texts: Sequence[Ids], facts: ModelFacts) -> float:
    """The floating-point operations of linear layers and attention, in all layers."""
    linear = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "embeddings" not in name and "pooler" not in name
    )
    attention = 2 * facts.hidden_size * facts.num_layers
    return float(sum(2 * len(ids) * (linear + attention * len(ids)) for ids in texts))


def measure(bench: Bench, texts: Sequence[str], num_threads: int) -> dict[str, float]:
    use_threads(num_threads)
    torch_dtype = getattr(torch, bench.dtype)
    engine = engine_for(
        load_model(
            "bench",
            bench.source,
            device="cpu",
            dtype=bench.dtype,
            trust_remote_code=False,
            max_input_tokens=0,
        )
    )
    facts = engine.facts
    tokenization = Tokenization(load_tokenizer(bench.source), max_tokens=facts.max_tokens)
    [encoded] = tokenization.encode_many([([Text(text) for text in texts], Truncation.END)])
    assert not isinstance(encoded, Exception)
    ids = [one.input_ids for one in encoded]
    model = AutoModel.from_pretrained(bench.source, dtype=torch_dtype).eval()
    exact = AutoModel.from_pretrained(bench.source, dtype=torch.float32, attn_implementation="eager").eval()
    onnx = OnnxRuntime(exact, torch.get_num_threads())
    works = [work_of(one, embedding_plan(facts, len(one)), facts) for one in ids]

    num_cores, served = engine.num_cores, Served(engine)

    def apart(works: Sequence[Work]) -> Way:
        batches = even_batches(works, MAX_BATCH_TOKENS, num_cores)
        return lambda: list(served.run(batches))

    def shared() -> None:
        for batch in even_batches(works, MAX_BATCH_TOKENS * num_cores, 1):
            engine.run(batch)

    best_product, product_flops = product_of(torch_dtype, facts.hidden_size)
    product_s: list[float] = []
    bench.run(
        {
            "packed": apart(works),
            "product": lambda: product_s.append(best_product()),
            "padded": lambda: padded(model, ids),
            "sorted": lambda: padded(model, sorted(ids, key=len)),
            "onnx": lambda: [onnx(one[None]) for one in ids],
            "alone": lambda: [engine.run([work]) for work in works],
        }
    )
    bench.run({"shared": shared, "apart": apart(works)})
    with quarter_of_a_core():
        bench.run({"shared, disturbed": shared, "apart, disturbed": apart(works)})
    some = ids[:BATCH_SIZE]
    layers, heads = tuple(range(facts.num_layers)), tuple(range(facts.num_attention_heads))

    def batch_of(plans: Sequence[OutputPlan]) -> Way:
        return apart([work_of(one, plan, facts) for one, plan in zip(some, plans, strict=True)])

    vector = [embedding_plan(facts, len(one)) for one in some]
    maps = OutputPlan(DType.FLOAT32, attentions=AttentionPlan(layers, heads, False, None))
    third = facts.num_layers // 3
    bench.run(
        {
            "batch": batch_of(vector),
            "one text's maps": batch_of([maps, *vector[1:]]),
            "all maps": batch_of([maps] * len(some)),
            "depth L": batch_of([OutputPlan(DType.FLOAT32, hidden_states=(facts.num_layers,))] * len(some)),
            "depth L/3": batch_of([OutputPlan(DType.FLOAT32, hidden_states=(third,))] * len(some)),
            "all hidden states": batch_of(
                [OutputPlan(DType.FLOAT32, hidden_states=tuple(range(facts.num_layers + 1)))] * len(some)
            ),
        }
    )
    rate = flops_of(exact, ids, facts) / statistics.median(bench.seconds["packed"])
    share = rate / product_flops * statistics.median(product_s)
    return {
        "texts/s": len(ids) / statistics.median(bench.seconds["packed"]),
        "times transformers, padded 32 in arrival order": bench.ratio("padded", "packed"),
        "times transformers, padded 32 sorted by length": bench.ratio("sorted", "packed"),
        "times ONNX Runtime, float32, one text at a time": bench.ratio("onnx", "packed"),
        "one text in flight: times ONNX Runtime, float32": bench.ratio("onnx", "alone"),
        "share of the matmul ceiling": share,
        "cores apart from each other: times sharing passes": bench.ratio("shared", "apart"),
        "  the same beside what takes a quarter of a core": bench.ratio(
            "shared, disturbed", "apart, disturbed"
        ),
        "one of 32 texts wants all maps: time": bench.ratio("one text's maps", "batch"),
        "all of 32 texts want all maps: time": bench.ratio("all maps", "batch"),
        "depth L/3: times as fast as depth L": bench.ratio("depth L", "depth L/3"),
        "all hidden states: time against the last": bench.ratio("all hidden states", "depth L"),
    }


@click.command()
@click.option(
    "--model", default="", help="A BERT: a hub name or a folder. [default: the server's default model]"
)
@corpus_option
@click.option("--texts", "num_texts", default=256, show_default=True, help="Texts in each round.")
@click.option("--rounds", default=5, show_default=True, help="Rounds, after a warm-up round.")
@click.option("--dtypes", default="float32,bfloat16", show_default=True, help="Types to compute in.")
@click.option("--threads", default=0, help="Threads of torch and of ONNX Runtime. [default: one per core]")
def main(model: str, corpus: Corpus, num_texts: int, rounds: int, dtypes: str, threads: int) -> None:
    """Compare the packed engine with transformers and ONNX Runtime, in one process."""
    warnings.filterwarnings("ignore")  # warnings of the ONNX exporter
    [source] = Config(model=(model,) if model else ()).models().values()
    texts = corpus.texts[:num_texts]
    results = {dtype: measure(Bench(source, dtype, rounds), texts, threads) for dtype in dtypes.split(",")}
    click.echo(f"{source}, {len(texts)} texts ({corpus.name}), load before {os.getloadavg()[0]:.1f}")
    click.echo("{:<52}".format("") + "".join(f"{dtype:>12}" for dtype in results))
    for line in next(iter(results.values())):
        click.echo(f"{line:<52}" + "".join(f"{result[line]:12.2f}" for result in results.values()))
    REPORTS.mkdir(parents=True, exist_ok=True)
    report = REPORTS / f"engine-{Path(source).name}-{corpus.name}.json"
    report.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

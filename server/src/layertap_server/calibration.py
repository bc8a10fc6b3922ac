"""Warm-up: what a batch costs on this machine, and the smallest that makes good use of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from layertap_server.cost import CostModel
from layertap_server.plan import (
    DType,
    EmbeddingPlan,
    Encoding,
    LayerMerge,
    ModelFacts,
    OutputPlan,
    Pooling,
    Work,
)
from layertap_server.scheduler import Runs

# A larger batch only adds to everybody's latency.
GOOD_SHARE = 0.95
# Tokens of the curve's batches. It ends early where throughput has stopped growing, or time is up.
SMALLEST, LARGEST = 64, 16384
# The curve goes this far however long it takes: a shorter one would say nothing.
LEAST = 256
# Of each text: some 30 tokens is natural.
TEXT_TOKENS = 32
# Batches before the curve, for the cost of a single text: tokens.
SINGLES = (8, 24)
CALIBRATION_S = 2.0


def warm_up_work(facts: ModelFacts, num_tokens: int, *, every_layer: bool = False) -> Work:
    """A text of so many tokens, or of as many as the model takes, that wants one vector or all hidden states."""
    num_tokens = min(num_tokens, facts.max_tokens)
    ids = np.full(num_tokens, min(5, facts.vocab_size - 1), np.int64)
    vector = EmbeddingPlan(
        pooling=Pooling.CLS,
        layers=(facts.num_layers,),
        layer_merge=LayerMerge.CONCAT,
        normalize=False,
        dimensions=facts.hidden_size,
        encoding=Encoding.FLOAT32,
        segments=((0, num_tokens),),
        has_spans=False,
    )
    layers = tuple(range(facts.num_layers + 1)) if every_layer else None
    plan = OutputPlan(DType.FLOAT32, hidden_states=layers, embeddings=(vector,))
    return Work(ids, None, plan, plan.specs(num_tokens, facts.hidden_size))


def calibrate(
    engine: Runs,
    facts: ModelFacts,
    cost: CostModel,
    largest: int = LARGEST,
    clock_ns: Callable[[], int] = time.monotonic_ns,
) -> int:
    """Teaches the cost model, and gives the smallest token budget, up to `largest`, that reaches
    `GOOD_SHARE` of the best throughput measured.

    Each batch runs three times, since the first time round pays for memory and code, and the faster of
    the others counts. About `CALIBRATION_S` in all, where the model is not too slow for that.
    """

    def measure(works: list[Work]) -> int:
        elapsed_ns = []
        for _ in range(3):
            begun_ns = clock_ns()
            engine.run(works)
            elapsed_ns.append(max(clock_ns() - begun_ns, 1))
        fastest_ns = min(elapsed_ns[1:])
        num_bytes = sum(work.result_bytes for work in works)
        cost.observe(sum(work.num_tokens for work in works), fastest_ns, num_bytes=num_bytes)
        return fastest_ns

    end_ns = clock_ns() + CALIBRATION_S * 1e9
    for num_tokens in SINGLES:
        measure([warm_up_work(facts, num_tokens)])
    measure([warm_up_work(facts, TEXT_TOKENS, every_layer=True)] * 4)
    text = warm_up_work(facts, TEXT_TOKENS)
    throughput: dict[int, float] = {}
    num_tokens, best = SMALLEST, 0.0
    while num_tokens <= max(largest, SMALLEST):
        elapsed_ns = measure([text] * max(num_tokens // text.num_tokens, 1))
        throughput[num_tokens] = num_tokens / elapsed_ns
        has_stopped_growing = len(throughput) > 3 and throughput[num_tokens] < 1.02 * best
        best = max(throughput.values())
        # The next takes twice as long, three times.
        is_time_up = num_tokens >= LEAST and clock_ns() + 6 * elapsed_ns > end_ns
        if has_stopped_growing or is_time_up:
            break
        num_tokens *= 2
    return next(size for size, rate in throughput.items() if rate >= GOOD_SHARE * best)

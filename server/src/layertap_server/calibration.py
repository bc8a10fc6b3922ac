"""Warm-up: what a batch costs on this machine, and the smallest that makes good use of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from layertap_server.cost import CostModel
from layertap_server.passes import Runs
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
# Of a full batch whose texts the cores take apart from each other, beside one that they share, while nothing
# else runs. Beside an event loop under load, a shared one loses about so much.
MAX_SLOWDOWN = 1.25


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

    The sizes are gone through again and again, for `CALIBRATION_S` in all where the model is not too
    slow for that, and of each the fastest counts: what else the machine does for a moment makes no
    size look worse than the others. The first time round pays for memory and code.

    An engine that has `min_tokens` lets cores take the texts of a batch of so many tokens apart from each
    other. Twice as many are the smallest budget then: beside an event loop under load, smaller batches lose
    more than they do here. Below half of the budget cores share a pass, which is faster with little to do.
    """

    def measure(works: list[Work]) -> int:
        begun_ns = clock_ns()
        engine.run(works)
        return max(clock_ns() - begun_ns, 1)

    def teach(works: list[Work], elapsed_ns: int) -> None:
        num_bytes = sum(work.result_bytes for work in works)
        cost.observe(sum(work.num_tokens for work in works), elapsed_ns, num_bytes=num_bytes)

    text = warm_up_work(facts, TEXT_TOKENS)

    def batch_of(num_tokens: int) -> list[Work]:
        return [text] * max(num_tokens // text.num_tokens, 1)

    def curve(smallest: int) -> dict[int, int]:
        """Nanoseconds by size."""
        fastest: dict[int, int] = {}
        end_ns = clock_ns() + CALIBRATION_S * 1e9
        num_tokens, best = min(smallest, max(largest, SMALLEST)), 0.0
        while num_tokens <= max(largest, SMALLEST):
            measure(batch_of(num_tokens))
            elapsed_ns = fastest[num_tokens] = measure(batch_of(num_tokens))
            has_stopped_growing = len(fastest) > 3 and num_tokens / elapsed_ns < 1.02 * best
            best = max(best, num_tokens / elapsed_ns)
            # The next takes twice as long, twice; and a further round is to come.
            is_time_up = num_tokens >= LEAST and clock_ns() + 6 * elapsed_ns > end_ns
            if has_stopped_growing or is_time_up:
                break
            num_tokens *= 2
        is_first = True
        while is_first or clock_ns() + sum(fastest.values()) < end_ns:
            fastest = {size: min(elapsed_ns, measure(batch_of(size))) for size, elapsed_ns in fastest.items()}
            is_first = False
        return fastest

    parts = hasattr(engine, "min_tokens")
    smallest = max(2 * int(engine.min_tokens), SMALLEST) if parts else SMALLEST  # type: ignore[attr-defined]

    def part_from(num_tokens: float) -> None:
        if parts:
            engine.min_tokens = num_tokens  # type: ignore[attr-defined]

    part_from(math.inf)
    for few in (
        *([warm_up_work(facts, num_tokens)] for num_tokens in SINGLES),
        [warm_up_work(facts, TEXT_TOKENS, every_layer=True)] * 4,
    ):
        measure(few)
        teach(few, min(measure(few), measure(few)))
    part_from(0)
    fastest = curve(smallest)
    budget = smallest_good(fastest)
    if parts:
        part_from(math.inf)
        shared_ns = min(measure(batch_of(budget)) for _ in range(3))
        if fastest[budget] > MAX_SLOWDOWN * shared_ns:
            fastest = curve(SMALLEST)
            budget = smallest_good(fastest)
        else:
            part_from(budget // 2)
    for size, elapsed_ns in fastest.items():
        teach(batch_of(size), elapsed_ns)
    cost.pace = 1.0
    return budget


def smallest_good(fastest: dict[int, int]) -> int:
    """Of sizes, by the nanoseconds that they take."""
    best = max(size / elapsed_ns for size, elapsed_ns in fastest.items())
    return next(size for size, elapsed_ns in fastest.items() if size / elapsed_ns >= GOOD_SHARE * best)

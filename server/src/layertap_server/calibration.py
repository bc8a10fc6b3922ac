"""Warm-up: what a batch costs on this machine, and the smallest that makes good use of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from layertap_server.cost import CostModel
from layertap_server.plan import DType, ModelFacts, OutputPlan, Work
from layertap_server.scheduler import Runs

# A larger batch only adds to everybody's latency.
GOOD_SHARE = 0.95
# Tokens of the curve's batches. It ends early where throughput has stopped growing.
SMALLEST, LARGEST = 64, 16384
# Of each text: some 30 tokens is natural.
TEXT_TOKENS = 32
# Batches before the curve, for the cost of a single text: tokens.
SINGLES = (8, 24)
CALIBRATION_S = 2.0


def calibrate(
    engine: Runs, facts: ModelFacts, cost: CostModel, clock_ns: Callable[[], int] = time.monotonic_ns
) -> int:
    """Teaches the cost model, and gives the smallest token budget that reaches `GOOD_SHARE` of the best
    throughput measured.

    Batches of doubling size run twice, since the first time round pays for memory and code; about
    `CALIBRATION_S` in all.
    """
    plan = OutputPlan(DType.FLOAT32, last_hidden_state=True)

    def run(num_tokens: int) -> int:
        lengths = [min(TEXT_TOKENS, facts.max_tokens, num_tokens)] * (num_tokens // TEXT_TOKENS or 1)
        works = [
            Work(np.full(n, min(5, facts.vocab_size - 1)), None, plan, plan.specs(n, facts.hidden_size))
            for n in lengths
        ]
        begun_ns = clock_ns()
        engine.run(works)
        return clock_ns() - begun_ns

    end_ns = clock_ns() + CALIBRATION_S * 1e9
    for num_tokens in SINGLES:
        run(num_tokens)
        cost.observe(min(num_tokens, facts.max_tokens), run(num_tokens))
    throughput: dict[int, float] = {}
    num_tokens = SMALLEST
    while num_tokens <= LARGEST:
        best = max(throughput.values(), default=0.0)
        run(num_tokens)
        elapsed_ns = min(run(num_tokens), run(num_tokens))
        cost.observe(num_tokens, elapsed_ns)
        throughput[num_tokens] = num_tokens / max(elapsed_ns, 1)
        has_stopped_growing = len(throughput) > 3 and throughput[num_tokens] < best
        # The next takes twice as long, three times.
        if has_stopped_growing or clock_ns() + 6 * elapsed_ns > end_ns:
            break
        num_tokens *= 2
    best = max(throughput.values())
    return next(size for size, rate in throughput.items() if rate >= GOOD_SHARE * best)

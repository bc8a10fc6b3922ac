"""What a batch costs in time, learnt from the batches that ran."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from layertap_server.plan import OutputCost

# Weight of the past against one new batch: some thirty-five batches back counts for a third.
DECAY = 0.97
# A batch that took this many times its prediction was disturbed, and teaches less.
MAX_SURPRISE = 2.5
# Solving takes a tenth of a millisecond, and little changes from one batch to the next; at first it does.
SOLVE_EVERY = 8
NUM_EAGER = 64
# The slowdown is that of the last passes, so long back: a third of its weight is older.
SLOWDOWN_NS = 300e6
# One pass alone may not say more.
MAX_SLOWDOWN_STEP = 4.0
# The share of requests that take longer than predicted, margin included.
MAX_LATE = 0.004
MARGIN_STEP = 0.002
MAX_MARGIN = 1.6
# How firmly each coefficient stays where it is, in parts of what the data say. Batches all of one
# size tell nothing of how their time divides: then the tokens' share moves, and the others stay.
INERTIA = np.diag([1e-2, 1e-4, 1e-2])

# Of an element of an attention map that is computed, and of a hidden state that is pooled: until they are measured.
USUAL_MAP_NS, USUAL_POOLED_NS = 2.0, 0.3
# The same of an operation however small: some calls from Python.
USUAL_STEP_NS = 10_000.0
# Within these times of them a measurement is believed: it is of a few milliseconds, which anything may disturb.
LEAST_MEASURED, MOST_MEASURED = 0.25, 50.0

# No copy is slower. Where all replies are alike, bytes count the texts, and would be blamed for them.
MAX_BYTE_NS = 2.0


def believed(measured: float, usual: float) -> float:
    return min(max(measured, LEAST_MEASURED * usual), MOST_MEASURED * usual)


@dataclass(slots=True)
class CostModel:
    """time = slowdown · (fixed + per_token · tokens · depth + per_byte · result bytes + outputs), none of them negative.

    `depth` is the part of the model that runs, 0 to 1. The coefficients: least squares of the relative
    error, the past exponentially forgotten, solved anew every few batches. The slowdown is what the
    machine makes of them at present: other work on its cores slows every batch down, and at once.

    `outputs` is what the batch's outputs take beside the layers, by the operations that they are (`output_ns`). What
    one of these takes is measured once, at load; so batches that consist of them teach the rest little.
    """

    fixed_ns: float = 0.0
    per_token_ns: float = 0.0
    per_byte_ns: float = 0.0
    per_map_element_ns: float = USUAL_MAP_NS
    per_pooled_element_ns: float = USUAL_POOLED_NS
    per_step_ns: float = USUAL_STEP_NS
    # Times that batches take now of what the coefficients say.
    slowdown: float = 1.0
    # Mean of |measured - predicted| / measured, the past forgotten in the same way.
    error: float = 0.0
    _num_batches: int = field(default=0, repr=False, compare=False)
    _products: list[list[float]] = field(
        default_factory=lambda: [[0.0] * 3 for _ in range(3)], repr=False, compare=False
    )
    _sums: list[float] = field(default_factory=lambda: [0.0] * 3, repr=False, compare=False)

    def output_ns(self, cost: OutputCost) -> float:
        """Nanoseconds, at the usual pace, of what an input's outputs take beside the layers and its bytes."""
        return (
            self.per_map_element_ns * cost.map_elements
            + self.per_pooled_element_ns * cost.pooled_elements
            + self.per_step_ns * cost.num_steps
        )

    def learn_outputs(self, *, step_ns: float, pooled_ns: float) -> None:
        """Nanoseconds of a step, and of an element that is pooled, as measured."""
        self.per_step_ns = believed(step_ns, USUAL_STEP_NS)
        self.per_pooled_element_ns = believed(pooled_ns, USUAL_POOLED_NS)

    def learn_maps(self, *, map_ns: float) -> None:
        """Nanoseconds of an element of a map, as measured."""
        self.per_map_element_ns = believed(map_ns, USUAL_MAP_NS)

    def predict(
        self, num_tokens: float, *, depth: float = 1.0, num_bytes: int = 0, output_ns: float = 0.0
    ) -> float:
        """Nanoseconds of one batch; before the first observation, of no more than its outputs."""
        return self.slowdown * (self._usual_ns(num_tokens, depth, num_bytes) + output_ns)

    def predict_backlog(self, size: float, max_batch_tokens: int) -> float:
        """Nanoseconds of full batches until so many tokens at full depth are done."""
        num_batches = math.ceil(size / max_batch_tokens)
        return self.slowdown * (num_batches * self.fixed_ns + size * self.per_token_ns)

    def size(self, num_tokens: int, *, depth: float, num_bytes: int, output_ns: float = 0.0) -> float:
        """The tokens at full depth that would take as long, once a batch runs at all."""
        other_ns = num_bytes * self.per_byte_ns + output_ns
        return num_tokens * depth + (other_ns / self.per_token_ns if self.per_token_ns else 0.0)

    def observe(
        self,
        num_tokens: int,
        elapsed_ns: int,
        *,
        depth: float = 1.0,
        num_bytes: int = 0,
        output_ns: float = 0.0,
    ) -> None:
        rest = self._usual_ns(num_tokens, depth, num_bytes)
        usual = rest + output_ns if rest else 0.0
        # The part of the time that the coefficients are to explain.
        share = rest / usual if usual else 1.0
        ns = max(float(elapsed_ns), 1.0)
        if usual > 0:
            surprise = min(abs(ns - self.slowdown * usual) / ns, MAX_SURPRISE)
            self.error = DECAY * self.error + (1 - DECAY) * surprise
            seen = min(max(ns / usual, self.slowdown / MAX_SLOWDOWN_STEP), self.slowdown * MAX_SLOWDOWN_STEP)
            self.slowdown += (1 - math.exp(-usual / SLOWDOWN_NS)) * (seen - self.slowdown)
            ns = min(ns, MAX_SURPRISE * usual)
        # In parts of the prediction: a small batch's error counts as much as a large one's. (In parts
        # of the measured time, the estimate would lean to the fast ones.)
        scale = usual or ns
        ns *= share
        row = (1.0 / scale, num_tokens * depth / scale, num_bytes / scale)
        # Plain numbers: of so few, arrays take ten times as long, and that for each batch.
        for i, one in enumerate(row):
            self._sums[i] = DECAY * self._sums[i] + one * ns / scale
            for j, other in enumerate(row):
                self._products[i][j] = DECAY * self._products[i][j] + one * other
        self._num_batches += 1
        if self._num_batches < NUM_EAGER or self._num_batches % SOLVE_EVERY == 0:
            self._solve()

    def _usual_ns(self, num_tokens: float, depth: float, num_bytes: int) -> float:
        return self.fixed_ns + self.per_token_ns * num_tokens * depth + self.per_byte_ns * num_bytes

    def _solve(self) -> None:
        """Coefficients that would be negative are 0, and the rest solved without them."""
        all_products, sums = np.array(self._products), np.array(self._sums)
        scale = np.sqrt(np.diag(all_products))
        before = np.array([self.fixed_ns, self.per_token_ns, self.per_byte_ns])
        used = np.flatnonzero(scale)
        while used.size:
            grid = np.ix_(used, used)
            products = all_products[grid] / np.outer(scale[used], scale[used])
            inertia = INERTIA[grid]
            wanted = sums[used] / scale[used] + inertia @ (before * scale)[used]
            found = np.linalg.solve(products + inertia, wanted)
            if (found >= 0).all():
                break
            used = np.delete(used, int(found.argmin()))
        solved = np.zeros(3)
        if used.size:
            solved[used] = found / scale[used]
        # What the bytes may not bear, the tokens do.
        mean_tokens, mean_bytes = self._products[0][1:]
        excess = max(float(solved[2]) - MAX_BYTE_NS, 0.0)
        self.fixed_ns = float(solved[0])
        self.per_token_ns = float(solved[1]) + (excess * mean_bytes / mean_tokens if excess else 0.0)
        self.per_byte_ns = float(solved[2]) - excess


@dataclass(slots=True)
class Margin:
    """What a predicted time is multiplied by so that few requests take longer.

    A quantile followed step by step (Robbins and Monro, 1951): it rises with each request that took
    longer, and sinks so much more slowly with each that did not that in the long run `MAX_LATE` do.
    """

    factor: float = MAX_MARGIN  # until more is known

    def observe(self, is_late: bool) -> None:
        moved = self.factor + MARGIN_STEP * (is_late - MAX_LATE)
        self.factor = min(max(moved, 1.0), MAX_MARGIN)

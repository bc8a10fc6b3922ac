"""Predicts the time of a batch, learnt from the batches that ran."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from layertap_server.plan import OutputCost

# Factor on the weight of all earlier batches with each new one: a batch thirty-five batches back counts for a
# third.
DECAY = 0.97
# A batch that took more than this many times its prediction (without the slowdown) was disturbed by something
# else: the fit takes it to have lasted this many times the prediction. Also the upper bound of one batch's
# relative error.
MAX_SURPRISE = 2.5
# Solving takes a tenth of a millisecond, and the coefficients change little from one batch to the next. So it
# is done only every few batches; but after each of the first ones, which change them much.
SOLVE_EVERY = 8
NUM_EAGER = 64
# Time constant of the slowdown's moving average, in undisturbed time of passes: about a third (1/e) of its
# weight is older than this.
SLOWDOWN_NS = 300e6
# One pass counts as at most this many times slower, or faster, than the present slowdown.
MAX_SLOWDOWN_STEP = 4.0
# The share of requests that may take longer than predicted, with the margin, in the long run.
MAX_LATE = 0.004
MARGIN_STEP = 0.002
MAX_MARGIN = 1.6
# How strongly each coefficient (fixed, per token, per byte) is held at its present value, relative to the
# weight of the data. If all batches have one size, the data do not tell how their time is divided among the
# coefficients: then the token coefficient changes, and the others stay.
INERTIA = np.diag([1e-2, 1e-4, 1e-2])

# The fixed time is never taken to be less than this share of what the calibration found. A series of unusual
# requests could otherwise teach that it is 0, and a small batch would then take many times its prediction.
LEAST_FIXED_SHARE = 0.5

# Nanoseconds for an element of an attention map that is computed, and for an element of a hidden state that
# is pooled, until they are measured.
USUAL_MAP_NS, USUAL_POOLED_NS = 2.0, 0.3
# Nanoseconds for one operation of any size: some calls from Python.
USUAL_STEP_NS = 10_000.0
# Measured values are limited to the range between these multiples of the usual ones: a measurement lasts only
# a few milliseconds, and anything else on the machine may disturb it.
LEAST_MEASURED, MOST_MEASURED = 0.25, 50.0

# Upper bound of the time per result byte: no copy is slower. Where all replies have the same size, the bytes
# are proportional to the number of texts, and the fit would attribute the time of the texts to the bytes.
MAX_BYTE_NS = 2.0


def believed(measured: float, usual: float) -> float:
    return min(max(measured, LEAST_MEASURED * usual), MOST_MEASURED * usual)


@dataclass(slots=True)
class CostModel:
    """time = slowdown · (fixed + per_token · tokens · depth + per_byte · result bytes + outputs). No term is
    negative.

    `depth` is the part of the model that runs, 0 to 1. The coefficients minimize the squared relative error,
    with exponentially decreasing weight of the past, and are solved again every few batches. The slowdown is
    the present ratio of measured to predicted time. It is separate from the coefficients because other work
    on the machine's cores slows all batches down by a similar factor, and immediately.

    `outputs` is the time of the batch's outputs in addition to the layers, computed from the numbers of their
    operations (`output_ns`). The time of each kind of operation is measured once, at load. So batches whose
    time is mostly that of outputs have little influence on the other coefficients, and on the slowdown.
    """

    fixed_ns: float = 0.0
    per_token_ns: float = 0.0
    per_byte_ns: float = 0.0
    per_map_element_ns: float = USUAL_MAP_NS
    per_pooled_element_ns: float = USUAL_POOLED_NS
    per_step_ns: float = USUAL_STEP_NS
    # Present ratio of a batch's time to what the coefficients predict.
    slowdown: float = 1.0
    # Mean of |measured - predicted| / measured, with the same decreasing weight of the past.
    error: float = 0.0
    _least_fixed_ns: float = field(default=0.0, repr=False, compare=False)
    _num_batches: int = field(default=0, repr=False, compare=False)
    _products: list[list[float]] = field(
        default_factory=lambda: [[0.0] * 3 for _ in range(3)], repr=False, compare=False
    )
    _sums: list[float] = field(default_factory=lambda: [0.0] * 3, repr=False, compare=False)

    def output_ns(self, cost: OutputCost) -> float:
        """Nanoseconds, without the slowdown, of an input's outputs in addition to the layers and the result
        bytes."""
        return (
            self.per_map_element_ns * cost.map_elements
            + self.per_pooled_element_ns * cost.pooled_elements
            + self.per_step_ns * cost.num_steps
        )

    def learn_outputs(self, *, step_ns: float, pooled_ns: float) -> None:
        """Sets the measured nanoseconds of a step, and of an element that is pooled."""
        self.per_step_ns = believed(step_ns, USUAL_STEP_NS)
        self.per_pooled_element_ns = believed(pooled_ns, USUAL_POOLED_NS)

    def learn_maps(self, *, map_ns: float) -> None:
        """Sets the measured nanoseconds of an element of an attention map."""
        self.per_map_element_ns = believed(map_ns, USUAL_MAP_NS)

    def end_calibration(self) -> None:
        """Called when the batches that were measured at load are learnt: nothing else ran during them."""
        self.slowdown = 1.0
        self._least_fixed_ns = LEAST_FIXED_SHARE * self.fixed_ns

    def predict(
        self, num_tokens: float, *, depth: float = 1.0, num_bytes: int = 0, output_ns: float = 0.0
    ) -> float:
        """Nanoseconds of one batch; before the first observation, only those of its outputs."""
        return self.slowdown * (self._usual_ns(num_tokens, depth, num_bytes) + output_ns)

    def predict_backlog(self, size: float, max_batch_tokens: int) -> float:
        """Nanoseconds until `size` tokens at full depth are done, in full batches."""
        num_batches = math.ceil(size / max_batch_tokens)
        return self.slowdown * (num_batches * self.fixed_ns + size * self.per_token_ns)

    def size(self, num_tokens: int, *, depth: float, num_bytes: int, output_ns: float = 0.0) -> float:
        """The number of tokens at full depth that would take as long in a batch, its fixed time not
        counted."""
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
        # The part of the time that the coefficients have to explain; the outputs explain the rest.
        share = rest / usual if usual else 1.0
        ns = max(float(elapsed_ns), 1.0)
        if usual > 0:
            surprise = min(abs(ns - self.slowdown * usual) / ns, MAX_SURPRISE)
            self.error = DECAY * self.error + (1 - DECAY) * surprise
            seen = min(max(ns / usual, self.slowdown / MAX_SLOWDOWN_STEP), self.slowdown * MAX_SLOWDOWN_STEP)
            # Predictions of outputs err by far more than those of layers, and say less of the machine.
            self.slowdown += (1 - math.exp(-share * rest / SLOWDOWN_NS)) * (seen - self.slowdown)
            ns = min(ns, MAX_SURPRISE * usual)
        # Errors are taken relative to the prediction, so that a small batch's error counts as much as a large
        # one's. (Relative to the measured time, the estimate would be biased towards the fast batches.)
        scale = usual or ns
        ns *= share
        row = (1.0 / scale, num_tokens * depth / scale, num_bytes / scale)
        # Python floats: for so few numbers, numpy takes ten times as long, and this runs for each batch.
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
        """Solves for the coefficients. One that would be negative is set to 0, and the rest are solved
        without it."""
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
        # Time per byte above `MAX_BYTE_NS` is attributed to the tokens.
        mean_tokens, mean_bytes = self._products[0][1:]
        excess = max(float(solved[2]) - MAX_BYTE_NS, 0.0)
        self.fixed_ns = max(float(solved[0]), self._least_fixed_ns)
        self.per_token_ns = float(solved[1]) + (excess * mean_bytes / mean_tokens if excess else 0.0)
        self.per_byte_ns = float(solved[2]) - excess


@dataclass(slots=True)
class Margin:
    """The factor on a predicted time with which few requests take longer than predicted.

    It follows a quantile by stochastic approximation (Robbins and Monro, 1951): it rises with each request
    that took longer, and falls by much less with each that did not, so that in the long run the share
    `MAX_LATE` takes longer.
    """

    factor: float = MAX_MARGIN  # until more is known

    def observe(self, is_late: bool) -> None:
        moved = self.factor + MARGIN_STEP * (is_late - MAX_LATE)
        self.factor = min(max(moved, 1.0), MAX_MARGIN)

"""Warm-up: measures the time of batches on this machine, and finds the smallest with good throughput."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from layertap_server.enums import DType, Encoding, LayerMerge, Pooling
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import AttentionPlan, EmbeddingPlan
from layertap_server.plan import Int64Array, OutputPlan, Work
from layertap_server.scheduling.cost_model import CostModel
from layertap_server.scheduling.output_cost import output_cost
from layertap_server.scheduling.running_batch import Engine, MultiCoreEngine

# A batch is large enough if it reaches this share of the best throughput: a larger one mostly adds latency.
GOOD_SHARE = 0.95
# Tokens of the batches of the curve. It ends before `LARGEST` when throughput has stopped growing, or the
# time is up.
SMALLEST, LARGEST = 64, 16384
# The time may not end the curve before this many tokens: a shorter one would be of no use.
LEAST = 256
# Tokens of each text in these batches: a sentence has some 30.
TEXT_TOKENS = 32
# For the time of outputs in addition to the layers: the tokens of a text, the tokens of a text with attention
# maps, the number of kinds of vectors, and the number of runs, of which the fastest counts.
OUTPUT_TOKENS, MAP_TOKENS, OUTPUT_KINDS, OUTPUT_RUNS = 64, 128, 16, 3
# Tokens of the single texts that are measured before the curve.
SINGLES = (8, 24)
CALIBRATION_S = 2.0
# Tokens of the smallest batch that is measured with one batch for each core. Each core then reads all the
# weights, and in a small batch it mostly waits for these.
SMALLEST_APART = 256
# The cores take batches separately if a full batch on each takes at most this many times as long as one
# shared batch of as many tokens in all, measured while nothing else runs. A shared batch becomes slower by
# about this factor when an event loop under load runs at the same time.
MAX_SLOWDOWN = 1.25


def warm_up_work(facts: ModelFacts, num_tokens: int, *, every_layer: bool = False) -> Work:
    """A text of `num_tokens` tokens (at most as many as the model takes) that asks for one vector, and with
    `every_layer` also for all hidden states."""
    num_tokens = min(num_tokens, facts.max_tokens)
    ids = np.full(num_tokens, min(5, facts.vocab_size - 1), np.int64)
    vector = EmbeddingPlan(
        pooling=Pooling.CLS,
        layers=(facts.last_index,),
        layer_merge=LayerMerge.CONCAT,
        normalize=False,
        dimensions=facts.hidden_size,
        encoding=Encoding.FLOAT32,
        segments=((0, num_tokens),),
        has_spans=False,
    )
    layers = tuple(range(facts.num_layers + 1)) if every_layer else None
    return work_of(facts, ids, OutputPlan(DType.FLOAT32, hidden_states=layers, embeddings=(vector,)))


def work_of(facts: ModelFacts, ids: Int64Array, plan: OutputPlan) -> Work:
    num_tokens = len(ids)
    specs = plan.specs(num_tokens, facts.hidden_size)
    return Work(ids, None, plan, specs, output_cost(plan, num_tokens, facts))


class OutputWorks(NamedTuple):
    """Texts that differ in how many operations of one kind their outputs need, and in little else."""

    nothing: Work
    many_steps: Work
    many_pooled: Work
    # The maps of one head, and those of all heads.
    one_map: Work
    all_maps: Work


def output_works(facts: ModelFacts) -> OutputWorks:
    num_tokens = min(OUTPUT_TOKENS, facts.max_tokens)
    spans = tuple(
        (first, last)
        for first in range(num_tokens)
        for last in range(first + max(num_tokens // 2, 1), num_tokens + 1)
    )

    def text(num_tokens: int, **wanted: Any) -> Work:
        ids = np.full(min(num_tokens, facts.max_tokens), min(5, facts.vocab_size - 1), np.int64)
        return work_of(facts, ids, OutputPlan(DType.FLOAT32, **wanted))

    def vector(dimensions: int, segments: tuple[tuple[int, int], ...]) -> EmbeddingPlan:
        return EmbeddingPlan(
            pooling=Pooling.MEAN,
            layers=(0,),
            layer_merge=LayerMerge.CONCAT,
            normalize=True,
            dimensions=dimensions,
            encoding=Encoding.FLOAT32,
            segments=segments,
            has_spans=True,
        )

    def maps(num_heads: int) -> AttentionPlan:
        return AttentionPlan((0,), tuple(range(num_heads)), False, None)

    kinds = tuple([vector(1 + number, ((0, 1),)) for number in range(min(OUTPUT_KINDS, facts.hidden_size))])
    return OutputWorks(
        nothing=text(num_tokens, hidden_states=(0,)),
        many_steps=text(num_tokens, hidden_states=(0,), embeddings=kinds),
        many_pooled=text(num_tokens, hidden_states=(0,), embeddings=(vector(facts.hidden_size, spans),)),
        one_map=text(MAP_TOKENS, attentions=maps(1)),
        all_maps=text(MAP_TOKENS, attentions=maps(facts.num_attention_heads)),
    )


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The smallest token budget of a batch with good throughput, and the number of cores that each take such
    batches of their own (1: all cores share every batch)."""

    batch_tokens: int
    num_cores: int


def calibrate(
    engine: Engine,
    facts: ModelFacts,
    cost: CostModel,
    largest: int = LARGEST,
    clock_ns: Callable[[], int] = time.monotonic_ns,
) -> Calibrated:
    """Teaches the cost model, and returns the smallest budget, up to `largest`, that reaches `GOOD_SHARE` of
    the best measured throughput.

    If the engine's cores can take batches separately, the curve is measured with one batch on each core at
    the same time, since full batches run like that. The smallest size on the curve is larger then: when an
    event loop under load runs at the same time, small batches become slower than they are here.
    """
    num_cores: int = getattr(engine, "num_cores", 1)
    shared = Measuring(engine, facts, cost, clock_ns, 1)
    shared.teach_outputs()
    shared.teach_few()
    if num_cores > 1:
        with Measuring(cast("MultiCoreEngine", engine), facts, cost, clock_ns, num_cores) as apart:
            curve = apart.curve(SMALLEST_APART, largest)
            budget = smallest_good(curve)
            shared_ns = min(shared.measure(shared.batch_of(num_cores * budget)) for _ in range(3))
            if curve[budget] <= MAX_SLOWDOWN * shared_ns:
                apart.teach(curve)
                return Calibrated(budget, num_cores)
    curve = shared.curve(SMALLEST, largest)
    shared.teach(curve)
    return Calibrated(smallest_good(curve), 1)


class Measuring:
    """Measures an engine: one batch at a time on all its cores, or one batch on each core at the same
    time."""

    def __init__(
        self,
        engine: Engine,
        facts: ModelFacts,
        cost: CostModel,
        clock_ns: Callable[[], int],
        num_cores: int,
    ) -> None:
        self._engine, self._facts, self._cost, self._clock_ns = engine, facts, cost, clock_ns
        self._num_cores = num_cores
        self._threads = (
            ThreadPoolExecutor(num_cores, initializer=cast("MultiCoreEngine", engine).use_one_core)
            if num_cores > 1
            else None
        )
        self._text = warm_up_work(facts, TEXT_TOKENS)

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._threads is not None:
            self._threads.shutdown()

    def batch_of(self, num_tokens: int) -> list[Work]:
        return [self._text] * max(num_tokens // self._text.num_tokens, 1)

    def measure(self, works: Sequence[Work]) -> int:
        """Nanoseconds until all cores together have computed this batch, or until each core has computed
        one."""
        begun_ns = self._clock_ns()
        if self._threads is None:
            self._engine.run(works)
        else:
            list(self._threads.map(self._engine.run, [works] * self._num_cores))
        return max(self._clock_ns() - begun_ns, 1)

    def teach_few(self) -> None:
        """Teaches the cost model the time of a single text and of the result bytes, by the smallest batches,
        which all cores share."""
        for works in (
            *([warm_up_work(self._facts, num_tokens)] for num_tokens in SINGLES),
            [warm_up_work(self._facts, TEXT_TOKENS, every_layer=True)] * 4,
        ):
            self.measure(works)
            self._observe(works, min(self.measure(works), self.measure(works)))

    def teach_outputs(self) -> None:
        """Teaches the cost model the times of the operations of outputs, in addition to the layers."""
        works = output_works(self._facts)

        def ns(more: Work, less: Work) -> int:
            """The difference in time between `more` and `less`, each the fastest of `OUTPUT_RUNS` runs."""
            return min(self.measure([more]) for _ in range(OUTPUT_RUNS)) - min(
                self.measure([less]) for _ in range(OUTPUT_RUNS)
            )

        self._cost.learn_outputs(
            step_ns=ns(works.many_steps, works.nothing) / works.many_steps.cost.num_steps,
            pooled_ns=ns(works.many_pooled, works.nothing) / works.many_pooled.cost.pooled_elements,
        )
        map_elements = works.all_maps.cost.map_elements - works.one_map.cost.map_elements
        if self._facts.has_attentions and map_elements:
            self._cost.learn_maps(map_ns=ns(works.all_maps, works.one_map) / map_elements)

    def curve(self, smallest: int, largest: int) -> dict[int, int]:
        """Nanoseconds of a batch, by its tokens.

        All sizes are measured in rounds, at least two and as many as `CALIBRATION_S` in all allows, and the
        fastest run of each size counts. So a short disturbance by other work on the machine does not make one
        size look worse than the others. The very first run of each size is not counted: it allocates memory
        and loads code.
        """
        fastest: dict[int, int] = {}
        end_ns = self._clock_ns() + CALIBRATION_S * 1e9
        largest = max(largest, SMALLEST)
        num_tokens, best = min(smallest, largest), 0.0
        while num_tokens <= largest:
            self.measure(self.batch_of(num_tokens))
            elapsed_ns = fastest[num_tokens] = self.measure(self.batch_of(num_tokens))
            has_stopped_growing = len(fastest) > 3 and num_tokens / elapsed_ns < 1.02 * best
            best = max(best, num_tokens / elapsed_ns)
            # The next size takes twice as long: twice now, and once in the next round.
            is_time_up = num_tokens >= LEAST and self._clock_ns() + 6 * elapsed_ns > end_ns
            if has_stopped_growing or is_time_up:
                break
            num_tokens *= 2
        is_first = True
        while is_first or self._clock_ns() + sum(fastest.values()) < end_ns:
            for size, elapsed_ns in fastest.items():
                fastest[size] = min(elapsed_ns, self.measure(self.batch_of(size)))
            is_first = False
        return fastest

    def teach(self, curve: dict[int, int]) -> None:
        for num_tokens, elapsed_ns in curve.items():
            self._observe(self.batch_of(num_tokens), elapsed_ns)
        self._cost.end_calibration()

    def _observe(self, works: Sequence[Work], elapsed_ns: int) -> None:
        """Teaches the cost model a batch, in time of the whole engine: where each core computed such a batch
        at the same time, one batch took only its part of that time."""
        num_bytes = sum(work.result_bytes for work in works)
        num_tokens = sum(work.num_tokens for work in works)
        output_ns = sum(self._cost.output_ns(work.cost) for work in works)
        engine_ns = elapsed_ns // self._num_cores
        self._cost.observe(num_tokens, engine_ns, num_bytes=num_bytes, output_ns=output_ns)


def smallest_good(fastest: dict[int, int]) -> int:
    """The smallest size that reaches `GOOD_SHARE` of the best throughput; `fastest` is the nanoseconds by
    size."""
    best = max(size / elapsed_ns for size, elapsed_ns in fastest.items())
    return next(size for size, elapsed_ns in fastest.items() if size / elapsed_ns >= GOOD_SHARE * best)

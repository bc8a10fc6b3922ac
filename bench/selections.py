"""Benchmark: the measured time of arbitrary selections against the time predicted before they run.

The selections are random, and most are unusual: indices repeated thousands of times, all layers merged for
hundreds of vectors, hundreds of spans. Each runs by itself, as the server would run it. The result is the
largest ratio of measured to predicted time: a request that takes many times its predicted time would delay
others.
"""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import click
import numpy as np

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors
from layertap_server.api.input_validation import parse_inputs
from layertap_server.api.planning import Resolver
from layertap_server.api.validation import MAX_EMBEDDINGS, MAX_SPANS, check_num_vectors, parse_selection
from layertap_server.config import Config
from layertap_server.engine import engine_for, load_model
from layertap_server.engine.threads import use_one_thread
from layertap_server.enums import HeadKind
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import Work
from layertap_server.scheduling.admission import Admission
from layertap_server.scheduling.calibration import calibrate
from layertap_server.scheduling.cost_model import CostModel
from layertap_server.scheduling.engine_loop import EngineLoop
from layertap_server.scheduling.fair_queue import FairQueue, Priority
from layertap_server.scheduling.scheduler import Scheduler
from layertap_server.tokenization.inputs import Encoded, Input, TokenIds, TokenTable

NUM_SELECTIONS = 300
# The tokens of a request, so that it takes about a second.
MAX_TOKENS = 4096
# The most repetitions of an index, so that a selection has at most 64 KiB in a message.
REPEATS = (1, 1, 1, 2, 30, 1000, 8000, 60000)


def random_indices(chance: random.Random, size: int, most: int) -> list[int]:
    """Random indices of 0…size-1 or their negative forms: a few, one repeated many times, or all."""
    times = min(chance.choice(REPEATS), most)
    if chance.random() < 0.3:
        return [chance.randrange(size)] * times
    some = [
        chance.randrange(-size, size) if chance.random() < 0.1 else chance.randrange(size) for _ in range(8)
    ]
    repeated = chance.choice((list(range(size)), some))
    return (repeated * (times // len(repeated) + 1))[: max(times, min(len(repeated), most))]


def random_embeddings(
    chance: random.Random, facts: ModelFacts, num_tokens: int, most: int
) -> list[pb.EmbeddingSpec]:
    num_specs = min(chance.choice((1, 1, 2, 16, MAX_EMBEDDINGS)), most)
    num_spans = chance.choice((0, 0, 0, 3, MAX_SPANS)) // num_specs
    specs = []
    for number in range(num_specs):
        layers = random_indices(chance, facts.num_layers + 1, most // num_specs)
        spec = pb.EmbeddingSpec(
            pooling=chance.choice([1, 1, 2, 3, 4, 5, 8, 9]),
            layers=layers if chance.random() < 0.8 else [],
            layer_merge=chance.choice([0, 1, 2, 3]),
            normalize=chance.random() < 0.5,
            dimensions=chance.choice([0, 0, 1, number + 1]),
            encoding=chance.choice([0, 1, 2, 3, 4, 5]),
        )
        if chance.random() < 0.1:
            spec.pooling = 0
            spec.poolings.extend(chance.choices([1, 2, 3, 4, 5, 8, 9], k=chance.choice([1, 2, 16])))
        elif chance.random() < 0.2:
            spec.pooling = pb.POOLING_NONE
        for _ in range(num_spans if spec.pooling != pb.POOLING_NONE else 0):
            first = chance.choice([0, 0, chance.randrange(num_tokens)])
            last = chance.choice([num_tokens, chance.randrange(first, num_tokens) + 1])
            spec.spans.add(start=first, end=last, unit=pb.Span.UNIT_TOKEN)
        specs.append(spec)
    return specs


def random_head_outputs(
    chance: random.Random, facts: ModelFacts, outputs: pb.OutputSelection, num_tokens: int, most: int
) -> None:
    """Selects what the model's heads give, if it has any, or single rows."""
    if facts.head is HeadKind.NONE:
        outputs.last_hidden_state = True
        outputs.last_hidden_state_positions.extend(random_indices(chance, num_tokens, most))
        return
    outputs.logits.activation = chance.choice([0, 1, 2, 3])
    outputs.logits.top_k = chance.choice([0, 1, min(5, facts.num_labels)])
    if facts.head.scores_tokens and chance.random() < 0.7:
        outputs.logits.positions.extend(random_indices(chance, num_tokens, min(most, 1000)))
    if facts.has_sparse and chance.random() < 0.5:
        outputs.sparse.top_k = chance.choice([0, 100])


def random_request(
    chance: random.Random, facts: ModelFacts, *, max_tokens: int = MAX_TOKENS, most: int = 60000
) -> pb.EncodeRequest:
    """A request with inputs of one length, and a selection whose lists have at most `most` entries
    together."""
    num_tokens = min(chance.choice([1, 2, 16, 64, 128, 250, facts.max_tokens]), facts.max_tokens)
    num_inputs = max(min(chance.choice([1, 1, 1, 8, 512]), max_tokens // num_tokens), 1)
    outputs = pb.OutputSelection()
    kinds = chance.sample(["states", "maps", "maps", "vectors", "vectors", "head"], chance.choice([1, 1, 2]))
    most //= len(kinds)
    if "states" in kinds:
        outputs.hidden_states.layers.extend(random_indices(chance, facts.num_layers + 1, most // 2))
        if chance.random() < 0.3:
            outputs.hidden_states.positions.extend(random_indices(chance, num_tokens, most // 2))
    if "maps" in kinds and facts.has_attentions:
        maps = outputs.attentions
        maps.SetInParent()
        if chance.random() < 0.2:
            layers = random_indices(chance, facts.num_layers, most // 6)
            heads = random_indices(chance, facts.num_attention_heads, most // 6)
            for layer, head in zip(layers, cycle(heads), strict=False):
                maps.pairs.add(layer=layer, head=head)
        else:
            maps.mean_over_heads = chance.random() < 0.6
            if chance.random() < 0.7:
                maps.layers.extend(random_indices(chance, facts.num_layers, most // 4))
            if chance.random() < 0.7:
                maps.heads.extend(random_indices(chance, facts.num_attention_heads, most // 4))
        if chance.random() < 0.5:
            maps.query_positions.extend(random_indices(chance, num_tokens, most // 4))
        if chance.random() < 0.3:
            maps.key_positions.extend(random_indices(chance, num_tokens, most // 4))
    if "head" in kinds:
        random_head_outputs(chance, facts, outputs, num_tokens, most)
    if "vectors" in kinds or not outputs.ByteSize():
        outputs.embeddings.extend(random_embeddings(chance, facts, num_tokens, most))
    one = pb.Input(token_ids=pb.TokenIds(ids=[5 + i % 20 for i in range(num_tokens)]))
    return pb.EncodeRequest(
        inputs=[one] * num_inputs, outputs=outputs, wire_dtype=chance.choice([0, 1, 2, 3])
    )


def described(request: pb.EncodeRequest) -> str:
    """The selection in one line of text."""
    outputs, parts = request.outputs, []
    if outputs.HasField("hidden_states"):
        states = outputs.hidden_states
        parts.append(f"{len(states.layers)} states of {len(states.positions)} rows")
    if outputs.HasField("attentions"):
        maps = outputs.attentions
        mean = ", mean" if maps.mean_over_heads else ""
        sizes = (len(maps.layers), len(maps.heads), len(maps.pairs), len(maps.query_positions))
        parts.append("maps of {} layers, {} heads, {} pairs, {} rows".format(*sizes) + mean)
        parts.append(f"{len(maps.key_positions)} columns")
    if outputs.embeddings:
        spans = sum(len(spec.spans) for spec in outputs.embeddings)
        layers = sum(len(spec.layers) for spec in outputs.embeddings)
        first = outputs.embeddings[0]
        merge, pooling = pb.LayerMerge.Name(first.layer_merge), pb.Pooling.Name(first.pooling)
        parts.append(
            f"{len(outputs.embeddings)} vectors of {layers} layers and {spans} spans ({merge}, {pooling})"
        )
    if outputs.HasField("logits"):
        parts.append(f"top {outputs.logits.top_k} logits of {len(outputs.logits.positions)} rows")
    if outputs.HasField("sparse"):
        parts.append(f"top {outputs.sparse.top_k} of a sparse vector")
    if outputs.last_hidden_state:
        parts.append(f"{len(outputs.last_hidden_state_positions)} rows")
    num_tokens = len(request.inputs[0].token_ids.ids)
    return f"{len(request.inputs)} × {num_tokens} tokens: " + "; ".join(parts)


def works_of(request: pb.EncodeRequest, facts: ModelFacts) -> list[Work]:
    """The inputs' works, as the server would plan them. Raises a `RequestError`."""
    resolver = Resolver(parse_selection(request, facts), facts)
    check_num_vectors(resolver.selection, len(request.inputs))
    inputs: list[Input] = asyncio.run(parse_inputs(request, request.inputs, facts))
    works = []
    for number, one in enumerate(inputs):
        assert isinstance(one, TokenIds)
        types = np.zeros_like(one.ids) if one.type_ids is None else one.type_ids
        works.append(resolver.resolve(one, Encoded(one.ids, types, 0, False, 0, no_table), number))
    return works


def no_table() -> TokenTable:
    raise ValueError("token ids have no table")


@dataclass(frozen=True, slots=True)
class Measured:
    request: pb.EncodeRequest
    predicted_s: float
    measured_s: float
    result_bytes: int

    @property
    def ratio(self) -> float:
        return self.measured_s / self.predicted_s


def run(
    scheduler: Scheduler, request: pb.EncodeRequest, works: Sequence[Work], clock_ns: Callable[[], int]
) -> Measured:
    """Runs one request alone, in as many batches as it needs."""
    loop = EngineLoop(scheduler)
    ticket = scheduler.submit(works, Priority.NORMAL, None)
    predicted_ns = measured_ns = 0.0
    while (formed := scheduler.form()) is not None:
        predicted_ns += formed.predicted_ns
        begun_ns = clock_ns()
        loop.finish(formed)
        measured_ns += clock_ns() - begun_ns
    scheduler.deliver_settled()  # until then it refers to the ticket's results
    if ticket.error is not None:
        raise ticket.error
    return Measured(request, predicted_ns / 1e9, measured_ns / 1e9, sum(work.result_bytes for work in works))


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@click.command(context_settings={"show_default": True})
@click.option("--model", default="", help="A hub name or a folder. [default: the server's default model]")
@click.option("--dtype", default="float32", help="The type that the layers compute in.")
@click.option("--number", default=NUM_SELECTIONS, help="Selections to measure.")
@click.option("--seed", default=0)
@click.option("--max-result-mib", default=256, help="Skip selections with larger results.")
@click.option(
    "--busy", is_flag=True, help="The machine has other work: measure one thread's CPU time instead."
)
@click.option("--show", default=8, help="Number of the worst selections to list.")
def main(model: str, dtype: str, number: int, seed: int, max_result_mib: int, busy: bool, show: int) -> None:
    """Measure random selections, and print the largest ratio of measured to predicted time."""
    clock_ns = time.process_time_ns if busy else time.perf_counter_ns
    if busy:
        use_one_thread()
    source = model or next(iter(Config().models().values()))
    loaded = load_model(
        "model", source, device="cpu", dtype=dtype, trust_remote_code=False, max_input_tokens=0
    )
    engine, cost, chance = engine_for(loaded), CostModel(), random.Random(seed)
    calibrated = calibrate(engine, loaded.facts, cost, clock_ns=clock_ns)
    scheduler = Scheduler(
        engine,
        lambda _: None,
        Admission(FairQueue(), 10 * MAX_TOKENS, cost),
        calibrated.batch_tokens,
        num_layers=loaded.facts.num_layers,
        clock_ns=clock_ns,
    )
    idle_mib, largest, measured, num_refused = peak_mib(), 0, [], 0
    while len(measured) < number:
        request = random_request(chance, loaded.facts)
        try:
            works = works_of(request, loaded.facts)
        except errors.RequestError:
            num_refused += 1
            continue
        if sum(work.result_bytes for work in works) > max_result_mib * 2**20:
            continue
        measured.append(run(scheduler, request, works, clock_ns))
        largest = max(largest, measured[-1].result_bytes)
    measured.sort(key=lambda one: -one.ratio)
    click.echo(f"{number} selections, {num_refused} refused; batches of {calibrated.batch_tokens} tokens")
    click.echo(
        f"a token {cost.per_token_ns / 1e3:.1f} µs, an element of a map {cost.per_map_element_ns:.2f} ns, one that is "
        f"pooled {cost.per_pooled_element_ns:.2f} ns"
    )
    for one in measured[:show]:
        click.echo(f"{one.ratio:6.2f}  {one.measured_s * 1e3:8.1f} ms  {described(one.request)}")
    median = measured[len(measured) // 2].ratio
    click.echo(f"measured / predicted: worst {measured[0].ratio:.2f}, median {median:.2f}")
    click.echo(
        f"peak memory {peak_mib()} MiB, {idle_mib} MiB before; the largest result {largest / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()

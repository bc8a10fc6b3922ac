"""Benchmark: whether a text's results depend on its batch, and the cost of making them independent of it.

Each text runs alone, alone again, at several places of a batch, and in batches with other texts. Counts the
texts whose results differ in any bit from those alone, and prints the largest difference.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from bench.corpus import read_texts
from layertap_server.config import Config
from layertap_server.engine import Engine, load_model
from layertap_server.engine.threads import use_threads
from layertap_server.enums import DType
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import AttentionPlan
from layertap_server.plan import OutputPlan, Outputs, Work
from layertap_server.tokenization.inputs import Text, Truncation
from layertap_server.tokenization.tokenizer_loading import load_tokenizer
from layertap_server.tokenization.worker import Tokenization

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "bench"
NUM_WATCHED = 24
COMPANY = 31


def works_of(source: str, facts: ModelFacts, num_texts: int) -> list[Work]:
    """Natural texts, each with its last hidden state and a map of the last layer as outputs."""
    tokenization = Tokenization(load_tokenizer(source), max_tokens=facts.max_tokens)
    texts = [Text(text) for text in read_texts()[:num_texts]]
    [encoded] = tokenization.encode_many([(texts, Truncation.END)])
    assert not isinstance(encoded, Exception)
    maps = AttentionPlan((facts.num_layers - 1,), (0,), False, None) if facts.has_attentions else None
    plan = OutputPlan(DType.FLOAT32, last_hidden_state=True, attentions=maps)
    return [
        Work(one.input_ids, None, plan, plan.specs(len(one.input_ids), facts.hidden_size)) for one in encoded
    ]


def companies(engine: Engine, works: list[Work]) -> Iterator[tuple[str, Callable[[Work], list[Outputs]]]]:
    """Runs each text in several kinds of batches; the results of each kind, by its name."""
    chance = np.random.default_rng(0)

    def among(one: Work, *places: int) -> list[Outputs]:
        others = [works[i] for i in chance.choice(len(works), COMPANY, replace=False)]
        return [engine.run([*others[:place], one, *others[place:]])[place] for place in places]

    yield "alone, again", lambda one: engine.run([one])
    yield "16 copies of it", lambda one: engine.run([one] * 16)
    yield f"at three places among {COMPANY} texts", lambda one: among(one, 0, COMPANY // 2, COMPANY)
    yield f"among other {COMPANY} texts", lambda one: among(one, 0)


def compare(engine: Engine, works: list[Work]) -> dict[str, tuple[int, float]]:
    """(number of texts whose bits differ, largest difference) for each kind of batch."""
    found = {}
    for name, answers_of in companies(engine, works):
        num_differing, largest = 0, 0.0
        for one in works[:NUM_WATCHED]:
            [alone] = engine.run([one])
            differences = [
                float(np.abs(tensor.data - expected.data).max())
                for answer in answers_of(one)
                for tensor, expected in zip(answer, alone, strict=True)
            ]
            num_differing += any(differences)
            largest = max(largest, *differences)
        found[name] = (num_differing, largest)
    return found


def price_of_alone(engine: Engine, alone: Engine, works: list[Work], rounds: int = 5) -> float:
    """The time of a batch in which each text has a pass of its own, relative to that of a shared pass."""
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for one in (alone, engine):
            begun = time.perf_counter()
            one.run(works[: COMPANY + 1])
            seconds.append(time.perf_counter() - begun)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


@click.command()
@click.option("--model", default="", help="A hub name or a folder. [default: the server's default model]")
@click.option("--dtypes", default="float32,bfloat16", show_default=True, help="Types to compute in.")
def main(model: str, dtypes: str) -> None:
    """Print whether results depend on the batch, to the bit, and the cost of one pass for each text."""
    use_threads(0)
    [source] = Config(model=(model,) if model else ()).models().values()
    report = {}
    for dtype in dtypes.split(","):
        loaded = load_model(
            "bench", source, device="cpu", dtype=dtype, trust_remote_code=False, max_input_tokens=0
        )
        engine, alone = Engine(loaded), Engine(replace(loaded, one_text_per_pass=True))
        works = works_of(source, loaded.facts, 300)
        found, price = compare(engine, works), price_of_alone(engine, alone, works)
        report[dtype] = {"differing, largest difference": found, "price of passes alone": price}
        click.echo(f"{source}, {dtype}, {loaded.facts.attention}")
        for name, (num_differing, largest) in found.items():
            click.echo(
                f"  {name:<34}{num_differing:>4} of {NUM_WATCHED} texts differ, by {largest:.1e} at most"
            )
        click.echo(f"  {f'{COMPANY + 1} texts, each in a pass of its own':<40}{price:.2f} times the time")
    REPORTS.mkdir(parents=True, exist_ok=True)
    path = REPORTS / f"determinism-{Path(source).name}.json"
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Benchmark: the error of results in 16 bits against transformers with eager attention in float32, on natural
text.

Each text runs alone in both. The relative Frobenius error is computed for each whole tensor, as in the
accuracy that the server guarantees: a hidden state of one layer, the maps of one layer, a pooled vector.
Prints the largest error of all texts, and the error that 99.9 % of the texts do not exceed.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from transformers import AutoModel

from bench.corpus import Corpus, corpus_option
from layertap_server.config import Config
from layertap_server.engine import Engine, load_model
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


def work_of(facts: ModelFacts, ids: np.ndarray, types: np.ndarray | None) -> Work:
    """All outputs with a guaranteed accuracy: hidden states, maps, the pooler output and the mean."""
    mean = EmbeddingPlan(
        Pooling.MEAN,
        (facts.last_index,),
        LayerMerge.CONCAT,
        normalize=True,
        dimensions=facts.hidden_size,
        encoding=Encoding.FLOAT32,
        segments=((0, len(ids)),),
        has_spans=False,
    )
    maps = AttentionPlan(tuple(range(facts.num_layers)), tuple(range(facts.num_attention_heads)), False, None)
    plan = OutputPlan(
        DType.FLOAT32,
        pooler_output=facts.has_pooler,
        hidden_states=tuple(range(facts.num_layers + 1)),
        attentions=maps if facts.has_attentions else None,
        embeddings=(mean,),
    )
    return Work(ids, types, plan, plan.specs(len(ids), facts.hidden_size))


def errors_of(engine: Engine, model: torch.nn.Module, work: Work) -> Iterator[tuple[str, float]]:
    """(name of the tensor, relative error) for each tensor of one text."""

    def error(got: np.ndarray, expected: torch.Tensor) -> float:
        exact = expected.double().numpy()
        return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))

    [answer] = engine.run([work])
    got = [tensor.data for tensor in answer]
    inputs = {"input_ids": torch.tensor(work.input_ids)[None]}
    if work.token_type_ids is not None:
        inputs["token_type_ids"] = torch.tensor(work.token_type_ids)[None]
    with torch.inference_mode():
        expected = model(**inputs, output_hidden_states=True, output_attentions=engine.facts.has_attentions)
    if engine.facts.has_pooler:
        yield "pooler output", error(got.pop(0), expected.pooler_output[0])
    for index, state in enumerate(expected.hidden_states):
        yield f"hidden state {index}", error(got[0][index], state[0])
    for layer, maps in enumerate(expected.attentions or ()):
        yield f"maps of layer {layer}", error(got[1][layer], maps[0])
    mean = torch.nn.functional.normalize(expected.last_hidden_state[0].mean(0), dim=0)
    yield "mean, normalized", error(got[-1], mean)


def measure(source: str, dtype: str, texts: list[str]) -> dict[str, list[float]]:
    """The errors of each tensor, one for each text."""
    loaded = load_model(
        "bench", source, device="cpu", dtype=dtype, trust_remote_code=False, max_input_tokens=0
    )
    engine = Engine(loaded)
    model = AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    tokenization = Tokenization(load_tokenizer(source), max_tokens=loaded.facts.max_tokens)
    [encoded] = tokenization.encode_many([([Text(text) for text in texts], Truncation.END)])
    assert not isinstance(encoded, Exception)
    found: dict[str, list[float]] = {}
    for one in encoded:
        types = one.type_ids if loaded.facts.type_vocab_size else None
        for name, error in errors_of(engine, model, work_of(loaded.facts, one.input_ids, types)):
            found.setdefault(name, []).append(error)
    return found


@click.command()
@click.option("--model", default="", help="A hub name or a folder. [default: the server's default model]")
@corpus_option
@click.option("--num-texts", default=300, show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
def main(model: str, corpus: Corpus, num_texts: int, dtype: str) -> None:
    """Print the relative error of each tensor against transformers in float32, on natural text."""
    use_threads(0)
    [source] = Config(model=(model,) if model else ()).models().values()
    found = measure(source, dtype, corpus.texts[:num_texts])
    click.echo(f"{source}, {dtype}, {num_texts} texts of {corpus.name}")
    click.echo(f"  {'relative error':<20}{'worst':>10}{'99.9 %':>10}{'median':>10}")
    report = {}
    for name, errors in found.items():
        worst, most, median = max(errors), *np.quantile(errors, (0.999, 0.5))
        report[name] = {"worst": worst, "99.9 %": most, "median": median}
        click.echo(f"  {name:<20}{worst:>10.5f}{most:>10.5f}{median:>10.5f}")
    REPORTS.mkdir(parents=True, exist_ok=True)
    path = REPORTS / f"accuracy-{Path(source).name}-{dtype}.json"
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

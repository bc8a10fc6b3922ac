"""The last step of loading: compares the ready model, in its final type and run by the engine that serves
requests, with the model's own eager float32 results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from layertap_server.engine.engine import Engine
from layertap_server.engine.loading.checkpoint import one_line
from layertap_server.engine.loading.heads import ScoredText
from layertap_server.engine.loading.reference import Reference
from layertap_server.engine.model import LoadedModel
from layertap_server.engine.transfer import Array
from layertap_server.enums import DType, Encoding, LayerMerge, OutputField, Pooling
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import AttentionPlan, EmbeddingPlan, LogitsPlan
from layertap_server.plan import OutputPlan, Outputs, Work

# Largest relative Frobenius error of a tensor, by the type that the model computes in.
AGREEMENT = {DType.FLOAT32: 1e-4, DType.BFLOAT16: 3e-2, DType.FLOAT16: 3e-2}
# The same of attention maps: a softmax turns an absolute error of a score into a relative error of that size.
MAP_AGREEMENT = {DType.FLOAT32: 1e-4, DType.BFLOAT16: 1e-1, DType.FLOAT16: 1e-1}
# The same of a head's scores: they may be small differences of large values.
HEAD_AGREEMENT = {DType.FLOAT32: 1e-4, DType.BFLOAT16: 1e-1, DType.FLOAT16: 1e-1}
# Absolute root mean square error that is allowed in addition, of hidden states and of maps.
SLACK, MAP_SLACK = 2e-5, 2e-6
# From this many tokens, only the maps of the first and the last layer are compared: those of all layers would
# take longer than everything else.
LONG_MAP_TOKENS = 64
# Number of short texts in the batch of single outputs, which runs on one core.
FEW_TEXTS = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """How a ready model's results differ from those of the model itself."""

    what: str
    # In 16 bits, the result has NaN or infinity. Another way to run the model in 16 bits would not help.
    is_overflow: bool = False

    def __str__(self) -> str:
        return self.what


def verify(loaded: LoadedModel, references: Sequence[Reference]) -> Difference | None:
    """The first difference found; None if there is none. An exception in a pass counts as a difference."""
    try:
        return next(differences(Engine(loaded), references), None)
    except Exception as error:  # the device, its driver or its compiler may raise anything
        return Difference(f"it fails: {one_line(error)}")


def differences(engine: Engine, references: Sequence[Reference]) -> Iterator[Difference]:
    """Compares batches like those of requests: texts of very different lengths
    in one batch, all outputs as well as single outputs. Single outputs run on
    one core where the engine has such batches; the rest on all cores."""
    facts = engine.facts
    short = [one for one in references if one.num_tokens < LONG_MAP_TOKENS]
    yield from compare(engine, short, [everything(facts, one) for one in short])
    # Single outputs are tested too, because the outputs determine where a pass ends and what it leaves out.
    few = short[:FEW_TEXTS]
    plans = [last_alone(facts) if number % 2 else one_vector(facts) for number in range(len(few))]
    if engine.num_cores > 1:
        with ThreadPoolExecutor(1, initializer=engine.use_one_core) as one_core:
            yield from one_core.submit(lambda: list(compare(engine, few, plans))).result()
    else:
        yield from compare(engine, few, plans)
    for one in references[len(short) :]:
        if one.last_hidden_state is None and not facts.packed:
            continue  # padded, embeddings are computed by the library, and its masks would be (T, T)
        yield from compare(engine, [one], [everything(facts, one)])


def everything(facts: ModelFacts, text: Reference) -> OutputPlan:
    """A plan for all outputs that the reference has: all hidden states and maps, of a long text only the maps
    of the first and the last layer; only the embeddings if the reference has nothing else."""
    if text.last_hidden_state is None:
        return OutputPlan(DType.FLOAT32, hidden_states=(0,))
    layers = tuple(range(facts.num_layers))
    is_long = text.num_tokens >= LONG_MAP_TOKENS
    maps = (
        AttentionPlan(
            layers=(layers[0], layers[-1]) if is_long else layers,
            heads=tuple(range(facts.num_attention_heads)),
            mean_over_heads=False,
            query_positions=None,
        )
        if facts.has_attentions and text.maps is not None
        else None
    )
    return OutputPlan(
        DType.FLOAT32,
        last_hidden_state=True,
        pooler_output=facts.has_pooler,
        hidden_states=tuple(range(facts.num_layers + 1)),
        attentions=maps,
    )


def last_alone(facts: ModelFacts) -> OutputPlan:
    return OutputPlan(DType.FLOAT32, last_hidden_state=True)


def one_vector(facts: ModelFacts) -> OutputPlan:
    """A plan for one vector, which is the first row of the last hidden state: (H,)."""
    vector = EmbeddingPlan(
        pooling=Pooling.CLS,
        layers=(facts.last_index,),
        layer_merge=LayerMerge.CONCAT,
        normalize=False,
        dimensions=facts.hidden_size,
        encoding=Encoding.FLOAT32,
        segments=((0, 1),),
        has_spans=False,
    )
    return OutputPlan(DType.FLOAT32, embeddings=(vector,))


def compare(engine: Engine, texts: Sequence[Reference], plans: Sequence[OutputPlan]) -> Iterator[Difference]:
    """Runs one batch and compares its results with the references."""
    facts = engine.facts
    works = [
        Work(text.input_ids, text.token_type_ids, plan, plan.specs(text.num_tokens, facts.hidden_size))
        for text, plan in zip(texts, plans, strict=True)
    ]
    for text, work, outputs in zip(texts, works, engine.run(works), strict=True):
        yield from compare_text(facts, text, work, outputs)


def compare_text(facts: ModelFacts, text: Reference, work: Work, outputs: Outputs) -> Iterator[Difference]:
    for spec, output in zip(work.specs, outputs, strict=True):
        expected = expected_of(text, spec.field, work.plan).cpu().numpy()
        actual = np.asarray(output.data, np.float32)
        are_maps = spec.field is OutputField.ATTENTIONS
        tolerance = (MAP_AGREEMENT if are_maps else AGREEMENT)[facts.compute_dtype]
        slack = MAP_SLACK if are_maps else SLACK
        if spec.field in (OutputField.HIDDEN_STATES, OutputField.ATTENTIONS):
            parts = enumerate(zip(actual, expected, strict=True))
            numbers = (
                work.plan.attentions.layers if are_maps and work.plan.attentions else work.plan.hidden_states
            )
            named = [(f"{NAMES[spec.field]} {(numbers or ())[slot]}", *pair) for slot, pair in parts]
        else:
            named = [(NAMES[spec.field], actual, expected)]
        for name, one, wanted in named:
            difference = difference_of(one, wanted, tolerance, slack)
            if difference is not None:
                is_overflow = facts.compute_dtype is not DType.FLOAT32 and not np.isfinite(one).all()
                yield Difference(f"{name} of {text.name} {difference}", is_overflow)


def verify_head(loaded: LoadedModel, texts: Sequence[ScoredText]) -> Difference | None:
    """Compares the logits of one batch with those of the checkpoint's own class. They are compared as a
    whole: a single score may be near zero by chance, beside large ones."""
    facts = loaded.facts
    texts = [text for text in texts if len(text.input_ids) <= facts.max_tokens]
    logits = LogitsPlan(facts.num_labels, facts.head.scores_tokens)
    plan = OutputPlan(DType.FLOAT32, logits=logits)
    works = [
        Work(
            text.input_ids,
            text.token_type_ids,
            plan,
            plan.specs(len(text.input_ids), facts.hidden_size),
        )
        for text in texts
    ]
    try:
        answers = Engine(loaded).run(works)
    except Exception as error:  # as above
        return Difference(f"it fails: {one_line(error)}")
    actual = np.concatenate([np.atleast_2d(np.asarray(outputs[0].data)) for outputs in answers])
    expected = torch.cat([text.logits for text in texts]).numpy()
    difference = difference_of(actual, expected, HEAD_AGREEMENT[facts.compute_dtype], SLACK)
    return None if difference is None else Difference(f"its score {difference}")


NAMES = {
    OutputField.LAST_HIDDEN_STATE: "last_hidden_state",
    OutputField.POOLER_OUTPUT: "pooler_output",
    OutputField.HIDDEN_STATES: "hidden state",
    OutputField.ATTENTIONS: "the attention map of layer",
    OutputField.EMBEDDINGS: "the first row",
}


def expected_of(text: Reference, field: OutputField, plan: OutputPlan) -> torch.Tensor:
    match field:
        case OutputField.LAST_HIDDEN_STATE:
            assert text.last_hidden_state is not None
            return text.last_hidden_state
        case OutputField.POOLER_OUTPUT:
            assert text.pooler_output is not None
            return text.pooler_output
        case OutputField.HIDDEN_STATES:
            return text.hidden_states
        case OutputField.ATTENTIONS:
            assert text.maps is not None
            assert plan.attentions is not None
            return text.maps[list(plan.attentions.layers)]
        case OutputField.EMBEDDINGS:
            assert text.last_hidden_state is not None
            return text.last_hidden_state[0]


def difference_of(actual: Array, expected: Array, tolerance: float, slack: float) -> str | None:
    """Describes how `actual` differs from `expected`; None if it
    agrees, and is finite wherever `expected` is."""
    finite = np.isfinite(expected)
    if not np.isfinite(actual[finite]).all():
        return "is not finite, but that of the original model in float32 is"
    wanted = expected[finite]
    error = float(np.linalg.norm(np.subtract(actual[finite], wanted)))
    norm = float(np.linalg.norm(wanted))
    if error <= tolerance * norm + slack * wanted.size**0.5:
        return None
    return f"differs from that of the original model by {error / max(norm, 1e-30):.2g} (relative; {tolerance:g} is allowed)"

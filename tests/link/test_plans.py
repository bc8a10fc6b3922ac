"""Plans and facts survive the way over the link, and a plan that does not fit the model is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layertap_server.enums import Activation, DType, Encoding, HeadKind, LayerMerge, Pooling
from layertap_server.link.plans import (
    check_plan,
    facts_from_json,
    facts_to_json,
    plan_from_json,
    plan_to_json,
)
from layertap_server.link.records import RecordError
from layertap_server.model_facts import TokenizerOptions
from layertap_server.output_plans import AttentionPlan, EmbeddingPlan, LogitsPlan, SparsePlan
from layertap_server.plan import OutputPlan
from scheduling.fake_engine import facts

MAPS = AttentionPlan((0, 11), (1, 2), False, (0, 4), (3, 1), (0, 1, 1), (1, 0), (0, 0))
VECTOR = EmbeddingPlan(
    (Pooling.MEAN, Pooling.WEIGHTED_MEAN), (3, 12), LayerMerge.MEAN, True, 8, Encoding.INT8, ((0, 2), (2, 5)), True,
    layer_counts=(2, 1),
)  # fmt: skip
ALL_FIELDS = replace(
    VECTOR,
    layer_merge=LayerMerge.CONCAT,
    cuts_normalized=True,
    layer_places=(1, 0, 0),
)
PAIRS = AttentionPlan(
    (0, 11),
    (),
    False,
    None,
    key_positions=(4, 4, 0),
    pairs=((0, 1), (0, 3), (11, 0)),
    pair_places=(2, 0, 1, 0),
)
TOKEN_VECTORS = replace(
    VECTOR, pooling=Pooling.NONE, encoding=Encoding.FLOAT32, segments=((0, 3),), has_spans=False, kept=(0, 1, 4),
    projects_tokens=True, is_projected=True,
)  # fmt: skip
# Together, they have a value other than the default in each field.
PLANS = [
    OutputPlan(DType.FLOAT32, last_hidden_state=True),
    OutputPlan(DType.BFLOAT16, pooler_output=True, hidden_states=(0, 12), hidden_places=(1, 0, 1)),
    OutputPlan(DType.FLOAT16, attentions=MAPS),
    OutputPlan(DType.FLOAT32, embeddings=(VECTOR, replace(VECTOR, pooling=Pooling.MEAN_MAX, has_spans=False))),
    OutputPlan(DType.FLOAT32, embeddings=(ALL_FIELDS,)),
    OutputPlan(DType.FLOAT32, last_hidden_state=True, last_positions=(4, 0, 0), attentions=PAIRS),
    OutputPlan(DType.FLOAT32, hidden_states=(2,), hidden_positions=(1, 1), embeddings=(TOKEN_VECTORS,)),
    OutputPlan(DType.FLOAT32, logits=LogitsPlan(9, True, (3, 0, 3), 4, Activation.SOFTMAX)),
    OutputPlan(DType.FLOAT32, sparse=SparsePlan(3, by_weight=True), contacts=True),
]  # fmt: skip
FACTS = replace(
    facts(),
    projected_size=16,
    projected_token_size=12,
    head=HeadKind.TOKEN_CLASSIFICATION,
    num_labels=9,
    has_sparse=True,
    has_contacts=True,
)


def objects(value: Any) -> Iterator[Any]:
    """The dataclasses in a value."""
    if is_dataclass(value):
        yield value
        value = tuple(getattr(value, one.name) for one in fields(value) if one.init)
    if isinstance(value, tuple):
        for one in value:
            yield from objects(one)


def places_of_numbers(data: Any, *before: int) -> Iterator[tuple[int, ...]]:
    """The index paths of the integers in a plan's JSON."""
    if isinstance(data, list):
        for number, one in enumerate(data):
            yield from places_of_numbers(one, *before, number)
    elif type(data) is int:
        yield before


def changed(plan: OutputPlan, path: tuple[int, ...], value: Any) -> Any:
    """The plan's JSON with another value at this path."""
    data = on_the_wire(plan)
    where = data
    for index in path[:-1]:
        where = where[index]
    where[path[-1]] = value
    return data


def on_the_wire(plan: OutputPlan) -> Any:
    return json.loads(json.dumps(plan_to_json(plan)))


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_survives(plan: OutputPlan) -> None:
    again = plan_from_json(on_the_wire(plan))
    assert again == plan
    assert again.specs(5, 768) == plan.specs(5, 768)
    check_plan(again, FACTS, 5)


def test_the_plans_here_have_a_value_in_each_field() -> None:
    """Else the tests of this file say nothing of a new field."""
    found: dict[str, bool] = {}
    for one in (one for plan in PLANS for one in objects(plan)):
        for spec in (spec for spec in fields(one) if spec.init):
            name = f"{type(one).__name__}.{spec.name}"
            is_other = spec.default is MISSING or getattr(one, spec.name) != spec.default
            found[name] = found.get(name, False) or is_other
    assert [name for name, is_other in found.items() if not is_other] == []


@pytest.mark.parametrize("plan", PLANS)
def test_a_negative_number_is_refused_in_each_field(plan: OutputPlan) -> None:
    for path in places_of_numbers(on_the_wire(plan)):
        for value in (-1, -(2**80)):
            with pytest.raises(RecordError):
                check_plan(plan_from_json(changed(plan, path, value)), FACTS, 5)


@settings(max_examples=300, deadline=None)
@given(
    plan=st.sampled_from(PLANS),
    seed=st.integers(0, 2**32),
    value=st.sampled_from([0, 1, 7, 10**12, 2**80, 0.5, True, None, "a", [], [[]], {}, float("nan")]),
)
def test_a_changed_plan_is_a_plan_that_fits_or_is_refused(plan: OutputPlan, seed: int, value: Any) -> None:
    paths = list(places_of_numbers(on_the_wire(plan)))
    data = changed(plan, random.Random(seed).choice(paths), value)
    try:
        again = plan_from_json(data)
        check_plan(again, FACTS, 5)
    except RecordError:
        return
    assert all(spec.nbytes < 10**6 for spec in again.specs(5, 768))
    assert plan_from_json(on_the_wire(again)) == again


def test_facts_survive() -> None:
    options = TokenizerOptions("0_Transformer", {"model_max_length": 7}, True)
    own = replace(
        facts(), prompts={"query": "q: "}, tokenizer=options, default_pooling=(Pooling.MEAN, Pooling.CLS)
    )
    assert facts_from_json(json.loads(json.dumps(facts_to_json(own)))) == own


WRONG = {
    "nothing": OutputPlan(DType.FLOAT32),
    "a hidden state beyond": OutputPlan(DType.FLOAT32, hidden_states=(13,)),
    "a negative one": OutputPlan(DType.FLOAT32, hidden_states=(-1,)),
    "one twice": OutputPlan(DType.FLOAT32, hidden_states=(1, 1)),
    "a place beyond": OutputPlan(DType.FLOAT32, hidden_states=(1,), hidden_places=(1,)),
    "a head beyond": OutputPlan(DType.FLOAT32, attentions=replace(MAPS, heads=(1, 12))),
    "a row beyond": OutputPlan(DType.FLOAT32, attentions=replace(MAPS, query_positions=(0, 5))),
    "counts of others": OutputPlan(DType.FLOAT32, attentions=replace(MAPS, head_counts=(1,))),
    "tokens beyond": OutputPlan(DType.FLOAT32, embeddings=(replace(VECTOR, segments=((0, 6),)),)),
    "no tokens": OutputPlan(DType.FLOAT32, embeddings=(replace(VECTOR, segments=((2, 2),)),)),
    "no layers": OutputPlan(DType.FLOAT32, embeddings=(replace(VECTOR, layers=(), layer_counts=None),)),
    "too many dimensions": OutputPlan(DType.FLOAT32, embeddings=(replace(VECTOR, dimensions=1537),)),
    "modules": OutputPlan(DType.FLOAT32, embeddings=(replace(VECTOR, is_projected=True),)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_plan_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(RecordError):
        check_plan(WRONG[name], facts(), 5)


@pytest.mark.parametrize("data", [None, 3, [], {}, [9] * 7, [1, False], [1, 0, False, None, None, [], None]])
def test_what_is_no_plan_is_refused(data: object) -> None:
    with pytest.raises(RecordError):
        plan_from_json(data)


SCORING = replace(facts(), head=HeadKind.MASKED_LANGUAGE, num_labels=30, has_sparse=True)
CLASSIFYING = replace(facts(), head=HeadKind.SEQUENCE_CLASSIFICATION, num_labels=3)


@pytest.mark.parametrize(
    ("of", "fits"),
    [
        (LogitsPlan(30, True), True),
        (LogitsPlan(30, True, positions=(4, 0, 4), top_k=30), True),
        (LogitsPlan(30, True, positions=(5,)), False),
        (LogitsPlan(30, True, positions=(-1,)), False),
        (LogitsPlan(30, True, positions=()), False),
        (LogitsPlan(30, True, top_k=31), False),
        (LogitsPlan(30, True, top_k=-1), False),
        (LogitsPlan(31, True), False),
        (LogitsPlan(30, False), False),
        (SparsePlan(30), True),
        (SparsePlan(7, by_weight=True), True),
        (SparsePlan(0), False),
        (SparsePlan(31), False),
    ],
)
def test_scores_are_those_of_the_model(of: LogitsPlan | SparsePlan, fits: bool) -> None:
    logits = isinstance(of, LogitsPlan)
    plan = OutputPlan(DType.FLOAT32, logits=of if logits else None, sparse=None if logits else of)  # type: ignore[arg-type]
    if fits:
        check_plan(plan, SCORING, 5)
    else:
        with pytest.raises(RecordError):
            check_plan(plan, SCORING, 5)
    for other in (facts(), CLASSIFYING):
        with pytest.raises(RecordError):
            check_plan(plan, other, 5)


def test_a_head_of_whole_inputs_has_no_positions() -> None:
    check_plan(OutputPlan(DType.FLOAT32, logits=LogitsPlan(3, False)), CLASSIFYING, 5)
    with pytest.raises(RecordError):
        check_plan(OutputPlan(DType.FLOAT32, logits=LogitsPlan(3, False, positions=(0,))), CLASSIFYING, 5)


def test_a_contact_map_needs_a_head_and_residues() -> None:
    plan = OutputPlan(DType.FLOAT32, contacts=True)
    check_plan(plan, replace(facts(), has_contacts=True), 3)
    for own, num_tokens in ((facts(), 3), (replace(facts(), has_contacts=True), 2)):
        with pytest.raises(RecordError, match="contact map"):
            check_plan(plan, own, num_tokens)

"""Plans and facts survive the way over the link, and a plan that does not fit the model is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from layertap_server.link.plans import (
    check_plan,
    facts_from_json,
    facts_to_json,
    plan_from_json,
    plan_to_json,
)
from layertap_server.link.records import RecordError
from layertap_server.model_facts import TokenizerOptions
from layertap_server.plan import (
    AttentionPlan,
    DType,
    EmbeddingPlan,
    Encoding,
    LayerMerge,
    OutputPlan,
    Pooling,
)
from scheduling.fake_engine import facts

MAPS = AttentionPlan((0, 11), (1, 2), False, (0, 4), (3, 1), (0, 1, 1), (1, 0), (0, 0))
VECTOR = EmbeddingPlan(
    (Pooling.MEAN, Pooling.WEIGHTED_MEAN), (3, 12), LayerMerge.MEAN, True, 8, Encoding.INT8, ((0, 2), (2, 5)), True,
    layer_counts=(2, 1),
)  # fmt: skip
PLANS = [
    OutputPlan(DType.FLOAT32, last_hidden_state=True),
    OutputPlan(DType.BFLOAT16, pooler_output=True, hidden_states=(0, 12), hidden_places=(1, 0, 1)),
    OutputPlan(DType.FLOAT16, attentions=MAPS),
    OutputPlan(
        DType.FLOAT32, embeddings=(VECTOR, replace(VECTOR, pooling=Pooling.MEAN_MAX, has_spans=False))
    ),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_survives(plan: OutputPlan) -> None:
    again = plan_from_json(json.loads(json.dumps(plan_to_json(plan))))
    assert again == plan
    assert again.specs(5, 768) == plan.specs(5, 768)
    check_plan(again, facts(), 5)


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


@pytest.mark.parametrize(
    "data", [None, 3, [], [9] * 7, [1, 0, 0, ["a"], None, None, []], [1, 0, 0, None, None, [1], []]]
)
def test_what_is_no_plan_is_refused(data: object) -> None:
    with pytest.raises(RecordError):
        plan_from_json(data)


def test_a_contact_map_needs_a_head_and_residues() -> None:
    plan = OutputPlan(DType.FLOAT32, contacts=True)
    check_plan(plan, replace(facts(), has_contacts=True), 3)
    for own, num_tokens in ((facts(), 3), (replace(facts(), has_contacts=True), 2)):
        with pytest.raises(RecordError, match="contact map"):
            check_plan(plan, own, num_tokens)

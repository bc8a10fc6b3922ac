"""Every encoder that transformers has, as a tiny random model: served as the table in docs/families.md says, and equal
to the model itself, each text alone, whatever stands beside it in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import every_model
from layertap_server.engine import engine_for, load_model
from layertap_server.engine.model import LoadedModel
from layertap_server.enums import DType, OutputField
from layertap_server.output_plans import AttentionPlan
from layertap_server.plan import OutputPlan, Work

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
SERVED = every_model.read_table(PAGE)
# `make test` takes the first model of each row that differs from all others in how it runs and what it has.
QUICK = {row: model_type for model_type, row in reversed(SERVED.items())}.values()
# Up to the limit of each; neighbours of near lengths share a padded pass.
LENGTHS = (1, 2, 3, 5, 6, 7, 8, 20, 21, 40, 63, 10_000)


@torch.no_grad()
def own(model: Any, ids: Any, types: Any) -> Any:
    inputs = {"input_ids": torch.from_numpy(ids)[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if types is not None:
        inputs["token_type_ids"] = torch.from_numpy(types)[None]
    return model(**inputs, output_hidden_states=True, output_attentions=True)


def works_of(loaded: LoadedModel) -> list[Work]:
    facts = loaded.facts
    maps = None
    if facts.has_attentions:
        maps = AttentionPlan(
            tuple(range(facts.num_layers)), tuple(range(facts.num_attention_heads)), False, None
        )
    plan = OutputPlan(
        DType.FLOAT32,
        last_hidden_state=True,
        pooler_output=facts.has_pooler,
        hidden_states=tuple(range(facts.num_layers + 1)),
        attentions=maps,
    )
    draw = np.random.default_rng(0)
    works = []
    for length in sorted({min(length, facts.max_tokens) for length in LENGTHS}):
        ids = draw.integers(5, min(facts.vocab_size, every_model.VOCAB_SIZE), length)
        types = (
            np.sort(draw.integers(0, facts.type_vocab_size, length)) if facts.type_vocab_size > 1 else None
        )
        works.append(Work(ids, types, plan, plan.specs(length, facts.hidden_size)))
    return works


@pytest.mark.parametrize(
    "model_type", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in SERVED]
)
def test_equal_to_transformers_in_mixed_batches(model_type: str, tmp_path: Path) -> None:
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip("the installed transformers does not have it")
    every_model.build(model_type, tmp_path)
    loaded = load_model(
        model_type, str(tmp_path), device="cpu", dtype="float32", trust_remote_code=False, max_input_tokens=0
    )
    assert every_model.row_of(loaded) == SERVED[model_type]
    works = works_of(loaded)
    model = every_model.read(tmp_path)
    for work, outputs in zip(works, engine_for(loaded).run(works), strict=True):
        expected = own(model, work.input_ids, work.token_type_ids)
        for spec, output in zip(work.specs, outputs, strict=True):
            wanted = {
                OutputField.LAST_HIDDEN_STATE: lambda one: one.last_hidden_state[0],
                OutputField.POOLER_OUTPUT: lambda one: one.pooler_output[0],
                OutputField.HIDDEN_STATES: lambda one: torch.cat(one.hidden_states),
                OutputField.ATTENTIONS: lambda one: torch.cat(one.attentions),
            }[spec.field](expected)
            np.testing.assert_allclose(
                output.data,
                wanted,
                rtol=1e-4,
                atol=2e-6 if spec.field is OutputField.ATTENTIONS else 2e-5,
                err_msg=f"{spec.field.name} of {work.num_tokens} tokens",
            )

"""The modules behind a pooling: the same bits alone and together where asked, and what they hold is counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from layertap_server.engine import projection as projections
from layertap_server.engine.memory import MemoryCost
from layertap_server.engine.projection import Dense, Normalize, Projection, make_faster
from layertap_server.enums import DType, Encoding, LayerMerge, Pooling
from layertap_server.output_plans import EmbeddingPlan
from layertap_server.plan import OutputPlan, Work

SIZE, TOKEN_SIZE, OUT = 48, 96, 33


def projection_of(*, on_tokens: bool = False) -> Projection:
    torch.manual_seed(0)
    modules = [Dense(SIZE, OUT, torch.nn.Tanh(), bias=True, use_residual=True), Normalize()]
    token_modules = [Dense(SIZE, TOKEN_SIZE, torch.nn.GELU(), bias=False, use_residual=False)]
    for module in (*modules, *token_modules):
        module.eval().requires_grad_(False)
        make_faster(module)
    if on_tokens:
        return Projection(tuple(token_modules), TOKEN_SIZE, (), TOKEN_SIZE)
    return Projection((), SIZE, tuple(modules), OUT)


@torch.inference_mode()
def test_by_row_a_vector_has_the_same_bits_in_any_company() -> None:
    projection = replace(projection_of(), by_row=True)
    vectors = torch.randn(37, SIZE)
    together = projection.of_vectors(vectors)
    for number, vector in enumerate(vectors):
        assert torch.equal(together[number], projection.of_vectors(vector[None])[0])
    torch.testing.assert_close(together, projection_of().of_vectors(vectors), atol=1e-6, rtol=0)


@torch.inference_mode()
def test_tokens_go_through_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    projection = projection_of(on_tokens=True)
    rows = torch.randn(50, SIZE)
    whole = projection.of_tokens(rows)
    monkeypatch.setattr(projections, "TOKEN_ROWS", 7)
    torch.testing.assert_close(projection.of_tokens(rows), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("projects_tokens", [True, False])
def test_rows_that_are_projected_are_counted(projects_tokens: bool) -> None:
    cost = MemoryCost(100.0, 0.0, 4 * SIZE, projected_row_bytes=4 * TOKEN_SIZE)
    embedding = EmbeddingPlan(
        Pooling.MEAN,
        (1,),
        LayerMerge.CONCAT,
        normalize=False,
        dimensions=OUT,
        encoding=Encoding.FLOAT32,
        segments=((0, 64),),
        has_spans=False,
        projects_tokens=projects_tokens,
    )
    plan = OutputPlan(DType.FLOAT32, embeddings=(embedding,))
    work = Work(np.zeros(64, np.int64), None, plan, plan.specs(64, SIZE))
    without = replace(cost, projected_row_bytes=0.0).of_pass([work], packed=True)
    assert cost.of_pass([work], packed=True) - without == (64 * 4 * TOKEN_SIZE if projects_tokens else 0)

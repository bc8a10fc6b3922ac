"""Prepacked linear layers give what the layers that they replace give."""

import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation, NewGELUActivation

from layertap_server.engine import linear
from layertap_server.engine.linear import PreparedLinear, prepare_linears


class Intermediate(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(48, 96)
        self.intermediate_act_fn = activation
        self.output = nn.Linear(96, 48, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate_act_fn(self.dense(rows)))


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(linear, "prepacking_pays", lambda weight, bias: True)


@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("num_rows", [1, 7, 600])
@pytest.mark.parametrize("fused", [True, False])
@torch.inference_mode()
def test_same_values(num_rows: int, fused: bool) -> None:
    torch.manual_seed(0)
    model = Intermediate(GELUActivation() if fused else NewGELUActivation())
    rows = torch.randn(1, num_rows, 48)
    expected = model(rows)

    assert prepare_linears(model, torch.float32, narrow_inside=[]) == (2, 2)

    assert isinstance(model.dense, PreparedLinear)
    assert isinstance(model.intermediate_act_fn, nn.Identity) == fused
    torch.testing.assert_close(model(rows), expected, atol=1e-5, rtol=1e-5)


def test_kept_where_it_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "prepacking_pays", lambda weight, bias: False)
    model = Intermediate(GELUActivation())
    assert prepare_linears(model, torch.float32, narrow_inside=[]) == (0, 2)
    assert type(model.dense) is nn.Linear


@pytest.mark.parametrize("wide_output", [True, False])
@torch.inference_mode()
def test_sixteen_bits_round_the_product_alone(monkeypatch: pytest.MonkeyPatch, wide_output: bool) -> None:
    monkeypatch.setattr(linear, "prepacking_pays", lambda weight, bias: False)
    torch.manual_seed(0)
    model = Intermediate(GELUActivation())
    rows = torch.randn(1, 5, 48)
    expected = model(rows)

    assert prepare_linears(model, torch.bfloat16, narrow_inside=[] if wide_output else [model]) == (0, 2)

    got = model(rows)
    assert got.dtype is (torch.float32 if wide_output else torch.bfloat16)
    assert (got - expected).norm() / expected.norm() < 1e-2

"""Prepared linear layers give what the layers that they replace give, in whichever way they are computed."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation, NewGELUActivation

from layertap_server.engine import precision as linear
from layertap_server.engine.loading import probing
from layertap_server.engine.precision import PreparedLinear, Way, prepare_linears


class Intermediate(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(48, 96)
        self.intermediate_act_fn = activation
        self.output = nn.Linear(96, 48, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate_act_fn(self.dense(rows)))


@pytest.fixture(autouse=True)
def timed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_fastest", {})


def choose(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    if linear.seconds_of(way, torch.randn(96, 48), None, torch.float32) == float("inf"):
        pytest.skip(f"no {way.value} products here")
    monkeypatch.setattr(linear, "fastest_way", lambda weight, bias, dtype: way)


@pytest.mark.parametrize("num_rows", [1, 7, 600])
@pytest.mark.parametrize("fused", [True, False])
@torch.inference_mode()
def test_same_values(num_rows: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(Way.PREPACKED, monkeypatch)
    torch.manual_seed(0)
    model = Intermediate(GELUActivation() if fused else NewGELUActivation())
    rows = torch.randn(1, num_rows, 48)
    expected = model(rows)

    assert prepare_linears(model, torch.float32, narrow_inside=[]) == {Way.PREPACKED: 2}

    assert isinstance(model.dense, PreparedLinear)
    assert isinstance(model.intermediate_act_fn, nn.Identity) == fused
    torch.testing.assert_close(model(rows), expected, atol=1e-5, rtol=1e-5)


def test_kept_where_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "seconds_of", lambda way, *_: 1.0 if way is Way.PLAIN else 0.99)
    model = Intermediate(GELUActivation())
    assert prepare_linears(model, torch.float32, narrow_inside=[]) == {Way.PLAIN: 2}
    assert type(model.dense) is nn.Linear


@pytest.mark.parametrize("way", Way)
def test_the_fastest_way_is_taken(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "seconds_of", lambda timed, *_: 1.0 if timed is way else 2.0)
    assert linear.fastest_way(torch.randn(4, 4), None, torch.float32) is way


def test_each_shape_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Way] = []
    monkeypatch.setattr(linear, "seconds_of", lambda way, *_: timed.append(way) or 1.0)
    for _ in range(2):
        prepare_linears(Intermediate(GELUActivation()), torch.float32, narrow_inside=[])
    assert len(timed) == 2 * len(Way)  # two shapes
    linear.fastest_way(torch.randn(96, 48), None, torch.float32)  # without a bias
    linear.fastest_way(torch.randn(96, 48), torch.randn(96), torch.bfloat16)
    assert len(timed) == 4 * len(Way)


@pytest.mark.parametrize("wide_output", [True, False])
@torch.inference_mode()
def test_sixteen_bits_round_the_product_alone(monkeypatch: pytest.MonkeyPatch, wide_output: bool) -> None:
    choose(Way.PLAIN, monkeypatch)
    torch.manual_seed(0)
    model = Intermediate(GELUActivation())
    rows = torch.randn(1, 5, 48)
    expected = model(rows)

    ways = prepare_linears(model, torch.bfloat16, narrow_inside=[] if wide_output else [model])

    assert ways == {Way.PLAIN: 2}
    got = model(rows)
    assert got.dtype is (torch.float32 if wide_output else torch.bfloat16)
    assert (got - expected).norm() / expected.norm() < 1e-2


def test_a_way_that_gives_wrong_results_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    product_of = linear.product_of

    def off_by_a_tenth(way: Way, *args: Any, **kwargs: Any) -> linear.Product:
        product = product_of(way, *args, **kwargs)
        return product if way is Way.PLAIN else lambda rows: product(rows) * 1.1

    monkeypatch.setattr(linear, "product_of", off_by_a_tenth)
    monkeypatch.setattr(linear, "fastest_call", lambda product, rows: 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        for way in Way:
            seconds = linear.seconds_of(way, torch.randn(64, 64), None, dtype)
            assert seconds == (1.0 if way is Way.PLAIN else float("inf"))


def test_a_linear_layer_that_is_read_and_not_called_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As LayoutLMv3's tables of relative positions."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(32, 16)
            self.called, self.read = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.called(self.embeddings(input_ids)) + self.read.weight[0]

    monkeypatch.setattr(probing, "attention_named", lambda model, name: nullcontext())
    monkeypatch.setattr(probing, "embedding_rows", lambda model: 32)
    model = Model()
    kept = probing.uncalled_linears(model, torch.device("cpu"), 8)
    assert kept == {model.read}
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        expected = model(ids, torch.ones_like(ids))
        read = model.read
        prepare_linears(model, torch.bfloat16, narrow_inside=(), kept=kept)
        assert model.read is read
        assert type(model.called) is not nn.Linear
        torch.testing.assert_close(model(ids, torch.ones_like(ids)), expected, atol=2e-2, rtol=2e-2)

"""Linear layers on the CPU: weights prepacked for oneDNN, where that measures faster.

`nn.Linear` packs its weight anew at each call, and in float32 may go to a slower library than
oneDNN; how much it matters differs from machine to machine, so each shape is measured once, at
load, and the faster way kept. A GELU that directly follows is computed as the product is written.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import nn

logger = logging.getLogger(__name__)

# Rows of a small and of a full batch, at which a shape is timed.
TIMED_ROWS = (16, 512)
TIMED_CALLS = 5
# The expected number of rows, by which oneDNN chooses a layout; others run as well.
PACKED_ROWS = 512
# What must be gained before a layer is replaced.
MIN_SPEEDUP = 1.03

# Where a linear layer is directly followed by an activation: names of the two beside each other.
ACTIVATED = (("dense", "intermediate_act_fn"), ("lin1", "activation"), ("ffn", "activation"))


class PrepackedLinear(nn.Module):  # type: ignore[misc]  # torch is not followed by the type checker
    """x·Wᵀ + b in oneDNN's own layout, and exact GELU of it where asked."""

    def __init__(self, linear: nn.Linear, *, gelu: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()
        # attribute, its scalars, its algorithm
        self._pointwise: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.weight, self.bias, *self._pointwise
        )
        return output


def is_exact_gelu(module: object) -> bool:
    if isinstance(module, nn.GELU):
        return bool(module.approximate == "none")
    return type(module).__name__ == "GELUActivation" and getattr(module, "act", None) is nn.functional.gelu


def fastest_call(layer: nn.Module, rows: torch.Tensor) -> float:
    """Seconds of the fastest of a few calls: the others were disturbed."""
    times = []
    for _ in range(TIMED_CALLS):
        begun = time.perf_counter()
        layer(rows)
        times.append(time.perf_counter() - begun)
    return min(times)


def prepacking_pays(linear: nn.Linear) -> bool:
    """Whether oneDNN's layout is faster for this shape on this machine, over small and full batches."""
    prepacked = PrepackedLinear(linear, gelu=False)
    speedup = 1.0
    for num_rows in TIMED_ROWS:
        rows = torch.randn(num_rows, linear.in_features).to(linear.weight.dtype)
        speedup *= fastest_call(linear, rows) / fastest_call(prepacked, rows)
    return bool(speedup ** (1 / len(TIMED_ROWS)) >= MIN_SPEEDUP)


@torch.inference_mode()
def prepack(model: nn.Module) -> tuple[int, int]:
    """Replaces the model's linear layers by prepacked ones where that is faster; frees their originals.

    Returns how many were replaced, and how many there are.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return 0, len(linears)
    pays: dict[tuple[int, int], bool] = {}
    num_replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            shape = (child.in_features, child.out_features)
            if shape not in pays:
                try:
                    pays[shape] = prepacking_pays(child)
                except RuntimeError as error:  # this build of torch, or this processor, has no such kernel
                    logger.debug("no prepacked linear layer of shape %s: %s", shape, error)
                    pays[shape] = False
            if not pays[shape]:
                continue
            activation = next(
                (act for linear, act in ACTIVATED if linear == name and hasattr(parent, act)), None
            )
            gelu = activation is not None and is_exact_gelu(getattr(parent, activation))
            setattr(parent, name, PrepackedLinear(child, gelu=gelu))
            if activation is not None and gelu:
                setattr(parent, activation, nn.Identity())
            num_replaced += 1
    return num_replaced, len(linears)

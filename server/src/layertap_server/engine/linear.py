"""Linear layers made ready: in 16 bits where asked, and prepacked for oneDNN where that is faster.

**16 bits.** Only the products are narrow: weights and inputs are rounded, the residual stream, the
norms and the softmax stay float32. A model run whole in bfloat16 strays 1.4 % from itself in
float32 over a few layers (relative Frobenius error of its hidden states); this way about 0.7 %.

**Prepacked.** On the CPU `nn.Linear` packs its weight anew at each call, and in float32 may go to a
slower library than oneDNN; how much it matters differs from machine to machine, so each shape is
measured once, at load, and the faster way kept. A GELU that directly follows is then computed as
the product is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import nn

logger = logging.getLogger(__name__)

# Rows of a small and of a full batch, at which a shape is timed.
TIMED_ROWS = (16, 512)
TIMED_CALLS = 5
# The expected number of rows, by which oneDNN chooses a layout; others run as well.
PACKED_ROWS = 512
# What must be gained before a layer is prepacked.
MIN_SPEEDUP = 1.03

# Where a linear layer is directly followed by an activation: names of the two beside each other.
ACTIVATED = (
    ("dense", "intermediate_act_fn"),
    ("lin1", "activation"),
    ("ffn", "activation"),
    ("intermediate", "activation"),
)

Product = Callable[[torch.Tensor], torch.Tensor]


class Narrowing:
    """Rounds inputs to `dtype`; once for the query, key and value layers, which share theirs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._last: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.dtype is self.dtype:
            return rows
        last, narrowed = self._last
        if last is not rows or narrowed is None:
            narrowed = rows.to(self.dtype)
            self._last = (rows, narrowed)
        return narrowed


class PreparedLinear(nn.Module):  # type: ignore[misc]  # torch is not followed by the type checker
    """What stands in for an `nn.Linear`. `wide_output` gives float32 back whatever the product is in."""

    def __init__(
        self, linear: nn.Linear, product: Product, narrowing: Narrowing, *, wide_output: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = None  # T5 looks here for a type to cast its input to; ours is cast by the narrowing
        self._product = product
        self._narrowing = narrowing
        self._wide_output = wide_output

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        output = self._product(self._narrowing(rows))
        return output.float() if self._wide_output else output


def plain_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    return lambda rows: F.linear(rows, weight, bias)


def prepacked_product(weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: bool) -> Product:
    """x·Wᵀ + b with W in oneDNN's own layout, and exact GELU of it where asked."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
    attribute: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, bias, *attribute)


def is_exact_gelu(module: object) -> bool:
    if isinstance(module, nn.GELU):
        return bool(module.approximate == "none")
    return type(module).__name__ == "GELUActivation" and getattr(module, "act", None) is nn.functional.gelu


def fastest_call(product: Product, rows: torch.Tensor) -> float:
    """Seconds of the fastest of a few calls: the others were disturbed."""
    times = []
    for _ in range(TIMED_CALLS):
        begun = time.perf_counter()
        product(rows)
        times.append(time.perf_counter() - begun)
    return min(times)


def prepacking_pays(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether oneDNN's layout is faster for this shape on this machine, over small and full batches."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        prepacked = prepacked_product(weight, bias, gelu=False)
        speedup = 1.0
        for num_rows in TIMED_ROWS:
            rows = torch.randn(num_rows, weight.shape[1]).to(weight.dtype)
            speedup *= fastest_call(plain_product(weight, bias), rows) / fastest_call(prepacked, rows)
    except (AttributeError, RuntimeError) as error:  # not in this build of torch, or not on this processor
        logger.debug("no prepacked linear layer of shape %s: %s", tuple(weight.shape), error)
        return False
    return bool(speedup ** (1 / len(TIMED_ROWS)) >= MIN_SPEEDUP)


@torch.inference_mode()
def prepare_linears(
    model: nn.Module, dtype: torch.dtype, *, narrow_inside: Iterable[nn.Module]
) -> tuple[int, int]:
    """Replaces the model's linear layers by ones in `dtype`, prepacked where faster; frees the originals.

    Inside the given modules a product is handed on as it is; elsewhere, as where embeddings are
    projected to the hidden size, it is made float32 again, so that the residual stream begins so.
    Returns how many were prepacked, and how many there are.
    """
    narrowing = Narrowing(dtype)
    narrow_parents = {id(module) for outer in narrow_inside for module in outer.modules()}
    pays: dict[torch.Size, bool] = {}
    num_prepacked = num_linears = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            num_linears += 1
            weight = child.weight.detach().to(dtype)
            bias = None if child.bias is None else child.bias.detach().to(dtype)
            if weight.shape not in pays:
                pays[weight.shape] = prepacking_pays(weight, bias)
            if pays[weight.shape]:
                activation = next(
                    (act for linear, act in ACTIVATED if linear == name and hasattr(parent, act)), ""
                )
                gelu = is_exact_gelu(getattr(parent, activation, None))
                if gelu:
                    setattr(parent, activation, nn.Identity())
                product = prepacked_product(weight, bias, gelu=gelu)
                num_prepacked += 1
            elif dtype is torch.float32:
                continue
            else:
                product = plain_product(weight, bias)
            setattr(
                parent,
                name,
                PreparedLinear(child, product, narrowing, wide_output=id(parent) not in narrow_parents),
            )
    return num_prepacked, num_linears

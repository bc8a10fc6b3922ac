"""Prepares linear layers: in 16 bits if requested, and each in the way that is fastest on this machine.

**16 bits.** Only the matrix products are in 16 bits: weights and inputs are rounded,
while the residual stream, the norms and the softmax stay float32. A model that runs
entirely in bfloat16 deviates by 1.4 % from itself in float32 over a few layers
(relative Frobenius error of its hidden states); this way it deviates by about 0.7 %.

**Ways.** On the CPU, `nn.Linear` packs its weight again at each call, and in float32 it may use a slower
library than oneDNN. The alternative is oneDNN with a weight that is packed once. Its gain differs from machine
to machine, so each weight shape is timed once, at load, and the faster way is kept. With oneDNN, an exact GELU
that directly follows is computed in the same call.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from enum import Enum

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import nn

logger = logging.getLogger(__name__)

# Numbers of rows at which a weight shape is timed: those of a small and of a full batch.
TIMED_ROWS = (16, 512)
TIMED_CALLS = 5
# The number of rows for which oneDNN chooses the layout of a packed weight; it works with any number.
PACKED_ROWS = 512
# Largest relative Frobenius error of a product, compared with the product in float32.
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# A layer is packed only if that makes it at least this much faster.
MIN_SPEEDUP = 1.03

# Attribute names of a linear layer and of the activation that directly follows it, in the same parent module.
ACTIVATED = (
    ("dense", "intermediate_act_fn"),
    ("lin1", "activation"),
    ("ffn", "activation"),
    ("intermediate", "activation"),
)

Product = Callable[[torch.Tensor], torch.Tensor]

# The results of `fastest_way`. Models are loaded one after another.
_fastest: dict[tuple[object, ...], Way] = {}


class Way(Enum):
    """How a linear layer is computed."""

    PLAIN = "plain"
    PREPACKED = "oneDNN"


class Narrowing:
    """Rounds inputs to `dtype`. It keeps the last result, so that the
    input that query, key and value layers share is rounded once."""

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
    """Replaces an `nn.Linear`."""

    def __init__(self, linear: nn.Linear, product: Product) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # T5 casts its input to the type of this weight, if there is one; here the product casts.
        self.weight = None
        self._product = product

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._product(rows)


def product_of(
    way: Way,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    narrowing: Narrowing,
    *,
    gelu: bool = False,
    wide_output: bool = False,
) -> Product:
    """A function that computes x·Wᵀ + b in the type of `narrowing`,
    and with `gelu` its exact GELU (not in the plain way).

    With `wide_output` the result is float32 whatever the type of the product. Raises RuntimeError or
    AttributeError if this processor or this build of torch does not support the way.
    """
    weight = weight.detach().to(narrowing.dtype)
    bias = None if bias is None else bias.detach().to(narrowing.dtype)
    if way is Way.PREPACKED:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        attribute: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def product(rows: torch.Tensor) -> torch.Tensor:
        rows = narrowing(rows)
        if way is Way.PREPACKED:
            output = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, *attribute)
        else:
            output = F.linear(rows, weight, bias)
        return output.float() if wide_output else output

    return product


def is_exact_gelu(module: object) -> bool:
    if isinstance(module, nn.GELU):
        return bool(module.approximate == "none")
    return type(module).__name__ == "GELUActivation" and getattr(module, "act", None) is nn.functional.gelu


def fastest_call(product: Product, rows: torch.Tensor) -> float:
    """Seconds of the fastest of a few calls: the slower ones were delayed by other work on the machine."""
    times = []
    for _ in range(TIMED_CALLS):
        begun = time.perf_counter()
        product(rows)
        times.append(time.perf_counter() - begun)
    return min(times)


def seconds_of(way: Way, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> float:
    """The geometric mean of the seconds for a small and a full batch;
    infinity if the way is not supported or gives wrong results."""
    times = []
    try:
        product = product_of(way, weight, bias, Narrowing(dtype))
        for num_rows in TIMED_ROWS:
            rows = torch.randn(num_rows, weight.shape[1]).to(dtype)
            expected = F.linear(rows.float(), weight, bias)
            if not (product(rows) - expected).norm() <= MAX_ERROR[dtype] * expected.norm():
                raise RuntimeError("its results are wrong")
            times.append(fastest_call(product, rows))
    except (AttributeError, RuntimeError) as error:
        logger.debug("no %s linear layer of shape %s: %s", way.value, tuple(weight.shape), error)
        return math.inf
    return math.prod(times) ** (1 / len(times))


def fastest_way(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Way:
    """The way that is fastest for this shape on this machine. Each is timed once in a process: the layers of
    a model are prepared twice, alone for a comparison and in the model."""
    if weight.device.type != "cpu":
        return Way.PLAIN
    key = tuple(weight.shape), bias is not None, dtype, torch.get_num_threads()
    if key not in _fastest:
        _fastest[key] = time_ways(weight, bias, dtype)
    return _fastest[key]


def time_ways(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Way:
    seconds = {way: seconds_of(way, weight, bias, dtype) for way in Way}
    fastest = min(Way, key=seconds.__getitem__)
    return fastest if seconds[Way.PLAIN] >= MIN_SPEEDUP * seconds[fastest] else Way.PLAIN


@torch.inference_mode()
def prepare_linears(
    model: nn.Module,
    dtype: torch.dtype,
    *,
    narrow_inside: Iterable[nn.Module],
    kept: Collection[nn.Module] = (),
) -> Counter[Way]:
    """Replaces the model's linear layers by layers that compute in
    `dtype`, packed where that is faster, and frees the originals. Those in `kept` stay.

    Inside the modules of `narrow_inside` a layer returns `dtype`. Elsewhere, as where embeddings are
    projected to the hidden size, it returns float32, so that the residual stream is float32 from its start.
    Returns the number of layers for each way.
    """
    narrowing = Narrowing(dtype)
    narrow_parents = {id(module) for outer in narrow_inside for module in outer.modules()}
    ways: dict[torch.Size, Way] = {}
    counts: Counter[Way] = Counter()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child in kept:
                continue
            shape = child.weight.shape
            if shape not in ways:
                ways[shape] = fastest_way(child.weight, child.bias, dtype)
            way = ways[shape]
            counts[way] += 1
            if way is Way.PLAIN and dtype is torch.float32:
                continue
            gelu = False
            if way is not Way.PLAIN:
                activation = next(
                    (act for linear, act in ACTIVATED if linear == name and hasattr(parent, act)), ""
                )
                gelu = is_exact_gelu(getattr(parent, activation, None))
                if gelu:
                    setattr(parent, activation, nn.Identity())
            wide_output = id(parent) not in narrow_parents
            product = product_of(way, child.weight, child.bias, narrowing, gelu=gelu, wide_output=wide_output)
            setattr(parent, name, PreparedLinear(child, product))
    return counts

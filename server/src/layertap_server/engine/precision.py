"""Linear layers made ready: in 16 bits where asked, and each in the way that is fastest here.

**16 bits.** Only the products are narrow: weights and inputs are rounded, the residual stream, the
norms and the softmax stay float32. A model run whole in bfloat16 strays 1.4 % from itself in
float32 over a few layers (relative Frobenius error of its hidden states); this way about 0.7 %.

**Ways.** On the CPU `nn.Linear` packs its weight anew at each call, and in float32 may go to a
slower library than oneDNN. So beside it there are oneDNN with a weight packed once, and the native
product; how much each gains differs from machine to machine, so each shape is measured once, at
load, and the fastest kept. A GELU that directly follows is then computed as the product is written.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import nn

from layertap_server.engine.cpu.product import NativeProduct, product_kernel

logger = logging.getLogger(__name__)

# Rows of a small and of a full batch, at which a shape is timed.
TIMED_ROWS = (16, 512)
TIMED_CALLS = 5
# The expected number of rows, by which oneDNN chooses a layout; others run as well.
PACKED_ROWS = 512
# Largest relative Frobenius error of a product, beside one in float32.
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# What must be gained before a layer is packed.
MIN_SPEEDUP = 1.03

# Where a linear layer is directly followed by an activation: names of the two beside each other.
ACTIVATED = (
    ("dense", "intermediate_act_fn"),
    ("lin1", "activation"),
    ("ffn", "activation"),
    ("intermediate", "activation"),
)

Product = Callable[[torch.Tensor], torch.Tensor]


class Way(Enum):
    """How a linear layer is computed."""

    PLAIN = "plain"
    PREPACKED = "oneDNN"
    NATIVE = "native"


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
    """What stands in for an `nn.Linear`."""

    def __init__(self, linear: nn.Linear, product: Product) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = None  # T5 looks here for a type to cast its input to; the product casts
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
    """x·Wᵀ + b, and exact GELU of it where asked (not the plain way), rounded by the narrowing.

    With `wide_output` the result is float32 whatever the product is in. Raises RuntimeError or
    AttributeError where this processor, or this build of torch, has no such way.
    """
    if way is Way.NATIVE:
        kernel = product_kernel()
        if kernel is None or not kernel.fits(weight, narrowing.dtype):
            raise RuntimeError("no native product")
        return NativeProduct(kernel, weight, bias, narrowing.dtype, gelu=gelu, wide_output=wide_output)
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
    """Seconds of the fastest of a few calls: the others were disturbed."""
    times = []
    for _ in range(TIMED_CALLS):
        begun = time.perf_counter()
        product(rows)
        times.append(time.perf_counter() - begun)
    return min(times)


def seconds_of(way: Way, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> float:
    """The geometric mean over small and full batches; infinity where there is no such way, or a wrong one."""
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
    """The way that is fastest for this shape on this machine."""
    if weight.device.type != "cpu":
        return Way.PLAIN
    seconds = {way: seconds_of(way, weight, bias, dtype) for way in Way}
    fastest = min(Way, key=seconds.__getitem__)
    return fastest if seconds[Way.PLAIN] >= MIN_SPEEDUP * seconds[fastest] else Way.PLAIN


@torch.inference_mode()
def prepare_linears(
    model: nn.Module, dtype: torch.dtype, *, narrow_inside: Iterable[nn.Module]
) -> Counter[Way]:
    """Replaces the model's linear layers by ones in `dtype`, packed where faster; frees the originals.

    Inside the given modules a product is handed on as it is; elsewhere, as where embeddings are
    projected to the hidden size, it is made float32 again, so that the residual stream begins so.
    Returns how many are computed in which way.
    """
    narrowing = Narrowing(dtype)
    narrow_parents = {id(module) for outer in narrow_inside for module in outer.modules()}
    ways: dict[torch.Size, Way] = {}
    counts: Counter[Way] = Counter()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
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

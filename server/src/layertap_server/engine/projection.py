"""The sentence-transformers modules before and after the pooling: Dense, LayerNorm and Normalize.

They run in float32 on the model's device. Sources: sentence-transformers' modules of those names.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from safetensors.torch import load_file
from torch import nn

from layertap_server.engine.cpu.product import NativeProduct, product_kernel
from layertap_server.engine.loading.sentence_transformers import (
    EmbeddingConfig,
    ModuleConfig,
    UnsupportedError,
    file_in,
    find_file,
)
from layertap_server.engine.precision import PreparedLinear

# Largest relative Frobenius error of a native product.
MAX_ERROR = 1e-5
PROBE_ROWS = 5
# Token rows that pass through the token modules in one step, so that
# the modules' temporary memory is bounded.
TOKEN_ROWS = 1024


class Dense(nn.Module):  # type: ignore[misc]  # torch is not followed by the type checker
    """A linear layer, its activation and, if configured, a residual.
    Attributes are named as in the checkpoint."""

    def __init__(
        self, in_features: int, out_features: int, activation: nn.Module, *, bias: bool, use_residual: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation_function = activation
        self.use_residual = use_residual
        if use_residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        projected = self.activation_function(self.linear(rows))
        if not self.use_residual:
            return projected
        return projected + (self.residual(rows) if hasattr(self, "residual") else rows)


class LayerNorm(nn.Module):  # type: ignore[misc]
    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.norm(rows)


class Normalize(nn.Module):  # type: ignore[misc]
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(rows, dim=-1)


@dataclass(frozen=True, slots=True)
class Projection:
    """The modules of a model's configured embedding. `size` is the
    size of its vectors before they are truncated."""

    # Applied to rows of the last hidden state: (n, H) to (n, token_size).
    token_modules: tuple[nn.Module, ...]
    token_size: int
    # Applied to pooled vectors: (n, poolings · token_size) to (n, size).
    vector_modules: tuple[nn.Module, ...]
    size: int
    # Whether each vector is projected in a call of its own, so that
    # its bits do not depend on the other vectors.
    by_row: bool = False

    @property
    def sums_in_one_order(self) -> bool:
        """Whether the order of a row's sums is independent of the
        number of threads: no `nn.Linear` is left."""
        modules = [
            part for module in (*self.token_modules, *self.vector_modules) for part in module.modules()
        ]
        return not any(isinstance(part, nn.Linear) for part in modules)

    def of_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, H) rows of hidden states, float32, to (n, token_size)."""
        if not self.token_modules:
            return rows
        parts = [through(self.token_modules, some) for some in rows.split(TOKEN_ROWS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def of_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, poolings · token_size) pooled vectors to (n, size)."""
        if not self.by_row:
            return through(self.vector_modules, vectors)
        return torch.cat([through(self.vector_modules, vector) for vector in vectors.split(1)])


def through(modules: Sequence[nn.Module], rows: torch.Tensor) -> torch.Tensor:
    for module in modules:
        rows = module(rows)
    return rows


def load_projection(
    source: str,
    config: EmbeddingConfig,
    hidden_size: int,
    device: torch.device,
    trust_remote_code: bool,
) -> Projection | None:
    """Loads the modules of the configured embedding; None if it only pools. Raises `UnsupportedError` if they
    cannot be loaded or do not fit the model."""
    if not (config.token_modules or config.vector_modules):
        return None
    token_modules = load_modules(source, config.token_modules, device, trust_remote_code)
    # The sizes are found before the modules are made faster: a native
    # product does not check the size of its input.
    token_size = size_behind(token_modules, hidden_size, device)
    vector_modules = load_modules(source, config.vector_modules, device, trust_remote_code)
    size = size_behind(vector_modules, token_size * len(config.poolings), device)
    for module in (*token_modules, *vector_modules):
        make_faster(module)
    return Projection(token_modules, token_size, vector_modules, size)


def load_modules(
    source: str, configs: Sequence[ModuleConfig], device: torch.device, trust_remote_code: bool
) -> tuple[nn.Module, ...]:
    try:
        return tuple(load_module(source, one, trust_remote_code).to(device, torch.float32) for one in configs)
    except UnsupportedError:
        raise
    except Exception as error:  # the files, or the code of an activation, may raise anything
        raise UnsupportedError(f"its modules cannot be loaded: {error}") from error


def load_module(source: str, config: ModuleConfig, trust_remote_code: bool) -> nn.Module:
    if config.kind == "Normalize":
        return Normalize()
    module = (
        dense(config, trust_remote_code) if config.kind == "Dense" else LayerNorm(config.config["dimension"])
    )
    module.load_state_dict(read_weights(source, config))
    return module.eval().requires_grad_(False)


def dense(module: ModuleConfig, trust_remote_code: bool) -> Dense:
    config = module.config
    return Dense(
        config["in_features"],
        config["out_features"],
        activation_of(module, trust_remote_code),
        bias=config.get("bias", True),
        use_residual=config.get("use_residual", False),
    )


def activation_of(module: ModuleConfig, trust_remote_code: bool) -> nn.Module:
    name = module.config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not name.startswith("torch.") and not trust_remote_code:
        raise UnsupportedError(
            f"its Dense module {module.path} has an activation outside of torch, '{name}'; it needs "
            "--trust-remote-code"
        )
    package, _, attribute = name.rpartition(".")
    made = getattr(importlib.import_module(package), attribute)
    if not trust_remote_code and not (inspect.isclass(made) and issubclass(made, nn.Module)):
        raise UnsupportedError(f"the activation of its Dense module {module.path} is not a module: '{name}'")
    return made()


def read_weights(source: str, module: ModuleConfig) -> Mapping[str, torch.Tensor]:
    weights: Mapping[str, torch.Tensor]
    if path := find_file(source, file_in(module.path, "model.safetensors")):
        weights = load_file(path)
    elif path := find_file(source, file_in(module.path, "pytorch_model.bin")):
        weights = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise UnsupportedError(f"its {module.kind} module {module.path} has no weights")
    return weights


def size_behind(modules: Sequence[nn.Module], size: int, device: torch.device) -> int:
    """The size of the modules' output for vectors of `size`, found by running the modules."""
    try:
        with torch.inference_mode():
            return int(through(modules, torch.zeros(PROBE_ROWS, size, device=device)).shape[-1])
    except RuntimeError as error:
        raise UnsupportedError(f"its modules do not fit vectors of {size} dimensions: {error}") from error


@torch.inference_mode()
def make_faster(module: nn.Module) -> None:
    """Replaces linear layers by native products on the CPU, if their results are right. A native product sums
    each row in the same order for any number of threads and rows."""
    kernel = product_kernel()
    for name, linear in list(module.named_children()):
        if kernel is None or type(linear) is not nn.Linear or not kernel.fits(linear.weight, torch.float32):
            continue
        product = NativeProduct(
            kernel, linear.weight, linear.bias, torch.float32, gelu=False, wide_output=True
        )
        rows = torch.linspace(-1, 1, PROBE_ROWS * linear.in_features).view(PROBE_ROWS, -1)
        expected = linear(rows)
        if (product(rows) - expected).norm() <= MAX_ERROR * expected.norm():
            setattr(module, name, PreparedLinear(linear, product))

"""From a hub name or a local folder to a model that is ready to run, and the facts about it.

Nothing is taken on trust: the number of layers and heads comes from a pass, weights that the
checkpoint lacks are refused, and packed results are compared with the model's own eager attention
before the first request.
"""

from __future__ import annotations

import inspect
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from layertap_server.engine import attention
from layertap_server.engine.families import FAMILIES, Family, ModelInputs
from layertap_server.engine.linear import prepack
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import TORCH_DTYPES, LayerHooks, Taps
from layertap_server.plan import DType, ModelFacts, OutputPlan, Pooling, Work

logger = logging.getLogger(__name__)

# transformers keeps the attention implementations in a process-wide table, and silences by globals.
_loading = threading.Lock()

# Largest relative Frobenius error between the packed pass and the model's own, by dtype.
PACKED_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

PADDED = "padded by length groups, the model's own eager attention"

# sentence-transformers' names in 1_Pooling/config.json, older flags and newer mode alike.
POOLING_MODES = {
    "mean": Pooling.MEAN,
    "mean_tokens": Pooling.MEAN,
    "cls": Pooling.CLS,
    "cls_token": Pooling.CLS,
    "max": Pooling.MAX,
    "max_tokens": Pooling.MAX,
    "lasttoken": Pooling.LAST_TOKEN,
}


class ModelLoadError(Exception):
    """The model cannot be served; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Any
    hooks: LayerHooks
    pooler: Callable[[torch.Tensor], torch.Tensor] | None
    family: Family
    facts: ModelFacts
    device: torch.device
    pad_token_id: int

    def packed_inputs(self, packing: Packing) -> ModelInputs:
        """The arguments of the model's forward for a packed batch, each (1, total)."""
        arrays = {
            "input_ids": packing.input_ids(),
            "position_ids": self.family.positions(packing, self.model.config),
        }
        if self.facts.type_vocab_size > 0:
            arrays["token_type_ids"] = packing.token_type_ids()
        inputs = {name: torch.from_numpy(array)[None].to(self.device) for name, array in arrays.items()}
        if self.family.embeddings is not None:
            inputs = self.family.embeddings(self.model, packing, inputs)
        return inputs


def load_model(
    name: str, source: str, *, device: str, dtype: str, trust_remote_code: bool, max_input_tokens: int
) -> LoadedModel:
    """Loads `source` (a hub name or a local folder) to be served as `name`."""
    with _loading:
        attention.register()
        torch_device = choose_device(device)
        torch_dtype = choose_dtype(dtype, torch_device)
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"cannot load the model '{source}': {error}") from error
        if getattr(config, "is_decoder", False):
            raise ModelLoadError(f"'{source}' is configured as a decoder; Layertap serves encoders")
        family = FAMILIES.get(config.model_type)
        model, missing = read_weights(source, config, family is not None, torch_dtype, trust_remote_code)
        model.eval().requires_grad_(False).to(torch_device)
        if torch_device.type == "cpu":
            logger.info("%s: %d of %d linear layers run faster prepacked", name, *prepack(model))
        return prepare(
            name, source, model, family, detach_pooler(model, family, missing), torch_device, max_input_tokens
        )


def read_weights(
    source: str, config: Any, packed: bool, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, set[str]]:
    """The model and the names of the weights that its checkpoint lacks."""
    # T5 and its kin: their encoder alone. For the others both give the same class.
    has_encoder = type(config) in AutoModelForTextEncoding._model_mapping
    if config.is_encoder_decoder and not has_encoder:
        raise ModelLoadError(f"transformers has no encoder of its own for '{config.model_type}' ('{source}')")
    auto_class = AutoModelForTextEncoding if has_encoder else AutoModel
    verbosity = transformers_logging.get_verbosity()
    # Its report on missing weights, and its progress bar: ours follow.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, report = auto_class.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME if packed else "eager",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"cannot load the model '{source}': {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = set(report["missing_keys"])
    unknown = sorted(key for key in missing if not key.startswith(("pooler", "contact_head")))
    if unknown:
        raise ModelLoadError(
            f"the checkpoint '{source}' lacks {len(unknown)} weights of the model, such as '{unknown[0]}'; "
            "serving it would answer with random numbers"
        )
    return model, missing


def detach_pooler(
    model: Any, family: Family | None, missing: set[str]
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Takes the pooler out of the model's forward: it runs only on the texts that want it.

    None where there is none, or where the checkpoint has no weights for it: a random pooler's
    output is no output of the model.
    """
    pooler = getattr(model, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return None
    call = (family or Family()).pooler(model, pooler)
    model.pooler = None
    return None if any(key.startswith("pooler") for key in missing) else call


def prepare(
    name: str,
    source: str,
    model: Any,
    family: Family | None,
    pooler: Callable[[torch.Tensor], torch.Tensor] | None,
    device: torch.device,
    max_input_tokens: int,
) -> LoadedModel:
    """Probes the model for its facts, and checks the packed pass against its own."""
    config = model.config
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    num_layers, num_heads, hidden_size = probe(model, device)
    default_pooling, default_normalize, pool_prompt = pooling_defaults(source)
    facts = ModelFacts(
        name=name,
        architecture=config.model_type,
        revision=getattr(config, "_commit_hash", None) or "",
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_attention_heads=num_heads or config.num_attention_heads,
        vocab_size=model.get_input_embeddings().num_embeddings,
        type_vocab_size=(getattr(config, "type_vocab_size", 0) or 0) if takes_types else 0,
        max_tokens=min(token_limit(config, family), max_input_tokens or token_limit(config, family)),
        has_pooler=pooler is not None,
        has_attentions=num_heads > 0,
        default_pooling=default_pooling,
        default_normalize=default_normalize,
        pool_prompt=pool_prompt,
        prompts=read_json(source, "config_sentence_transformers.json").get("prompts") or {},
        compute_dtype=next(ours for ours, torchs in TORCH_DTYPES.items() if torchs is model.dtype),
        device=str(device),
        packed=family is not None,
        attention=attention.describe(model.dtype, device) if family is not None else PADDED,
    )
    layers = layer_modules(model) if family is not None else []
    loaded = LoadedModel(
        model, LayerHooks(layers), pooler, family or Family(), facts, device, config.pad_token_id or 0
    )
    if family is not None and not packed_agrees(loaded):
        logger.warning("%s: packed results differ from the model's own; it runs padded", name)
        model.set_attn_implementation("eager")
        loaded = replace(loaded, facts=replace(facts, packed=False, attention=PADDED))
    return loaded


def probe_ids(num_tokens: int, vocab_size: int, offset: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Ordinary ids, away from the special tokens at the vocabulary's start where it is large enough."""
    return (np.arange(num_tokens, dtype=np.int64) * 37 + offset) % max(vocab_size - 5, 1) + min(
        4, vocab_size - 1
    )


@torch.inference_mode()
def probe(model: Any, device: torch.device) -> tuple[int, int, int]:
    """(layers, heads, hidden size), counted on the model's own outputs; 0 heads: it gives no maps."""
    ids = torch.from_numpy(probe_ids(6, model.get_input_embeddings().num_embeddings, 1))[None].to(device)
    try:
        with eager_attention(model):
            output = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                output_hidden_states=True,
                output_attentions=True,
            )
    except RuntimeError as error:  # some of the library's models compute in float32 alone
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelLoadError(
            f"'{model.config.model_type}' fails in {dtype} on {device}: {error}; try --dtype float32"
        ) from error
    hidden_states = output.hidden_states
    if not hidden_states or hidden_states[0].shape != hidden_states[-1].shape:
        raise ModelLoadError(f"'{model.config.model_type}' does not give one hidden state a layer and token")
    num_layers = len(hidden_states) - 1
    attentions: Sequence[Any] = output.attentions or ()
    uniform = len(attentions) == num_layers and all(
        weights is not None and weights.ndim == 4 and weights.shape[-2:] == (6, 6) for weights in attentions
    )
    return num_layers, int(attentions[0].shape[1]) if uniform else 0, int(hidden_states[-1].shape[-1])


@torch.inference_mode()
def packed_agrees(loaded: LoadedModel) -> bool:
    """Whether three texts packed together give what the model's eager attention gives each alone."""
    vocab_size, num_layers = loaded.facts.vocab_size, loaded.facts.num_layers
    plan = OutputPlan(DType.FLOAT32, hidden_states=tuple(range(num_layers + 1)))
    works = [
        Work(ids, None, plan, plan.specs(len(ids), loaded.facts.hidden_size))
        for ids in (
            probe_ids(length, vocab_size, length) for length in (3, 7, 5) if length <= loaded.facts.max_tokens
        )
    ]
    packing = Packing.of(works)
    taps = Taps(packing, num_layers, loaded.device)
    loaded.hooks.taps = taps
    try:
        output = loaded.model(**loaded.packed_inputs(packing), taps=taps)
        taps.write_hidden_state(num_layers, output.last_hidden_state[0])
    finally:
        loaded.hooks.taps = None
    with eager_attention(loaded.model):
        for work, (packed,) in zip(packing.works, taps.buffers, strict=True):
            ids = torch.from_numpy(work.input_ids)[None].to(loaded.device)
            alone = torch.cat(loaded.model(input_ids=ids, output_hidden_states=True).hidden_states).float()
            error = (
                (packed - alone).norm() / alone.norm().clamp_min(1e-6) if packed is not None else alone.norm()
            )
            if not error <= PACKED_TOLERANCE[loaded.model.dtype]:
                return False
    return True


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """The library's own attention for a while; the config is read at every pass."""
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = implementation


def layer_modules(model: Any) -> list[nn.Module]:
    """The modules whose outputs are the hidden states, as transformers itself records them."""
    recorded = model._can_record_outputs["hidden_states"]
    layer_class = getattr(recorded, "target_class", recorded)
    return [module for module in model.modules() if isinstance(module, layer_class)]


def token_limit(config: Any, family: Family | None) -> int:
    """Tokens of the longest text that the model has positions for."""
    num_positions = (
        getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 512
    )
    if family is not None:
        token_id = 0 if config.pad_token_id else 1  # any but padding
        no_outputs = OutputPlan(DType.FLOAT32)
        one_token = Packing.of([Work(np.array([token_id]), None, no_outputs, ())])
        num_positions -= int(family.positions(one_token, config)[0])
    elif config.model_type == "mpnet":
        num_positions -= 2  # counted from behind its padding_idx, which is 1 whatever its config says
    return int(num_positions)


def choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelLoadError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda:0" if device == "cuda" else device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return TORCH_DTYPES[DType[dtype.upper()]]


def read_json(source: str, filename: str) -> dict[str, Any]:
    """A configuration file beside the model; empty where there is none."""
    path = cached_file(
        source,
        filename,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    return content if isinstance(content, dict) else {"modules": content}


def pooling_defaults(source: str) -> tuple[Pooling, bool, bool]:
    """(pooling, normalize, whether a prompt's tokens are pooled) as sentence-transformers would have it.

    Mean, not normalized, prompt included, for a model without its configuration.
    """
    modules = read_json(source, "modules.json").get("modules", [])
    types = {str(module.get("type", "")).rsplit(".", 1)[-1]: module.get("path", "") for module in modules}
    if unknown := types.keys() - {"Transformer", "Pooling", "Normalize"}:
        logger.warning("%s: embeddings leave out its %s module", source, ", ".join(sorted(unknown)))
    config = read_json(source, f"{types['Pooling']}/config.json") if types.get("Pooling") else {}
    named = config.get("pooling_mode")
    flags = [
        key.removeprefix("pooling_mode_")
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on
    ]
    modes = [named] if isinstance(named, str) else flags
    if len(modes) > 1 or (modes and modes[0] not in POOLING_MODES):
        logger.warning("%s: pooling %s is not supported as a default; mean is used", source, "+".join(modes))
        modes = []
    pooling = POOLING_MODES[modes[0]] if modes else Pooling.MEAN
    return pooling, "Normalize" in types, bool(config.get("include_prompt", True))

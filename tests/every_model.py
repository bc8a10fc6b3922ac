"""A tiny model with seeded weights of every configuration that transformers exports, as far as one can be made."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layertap_server.engine.model import LoadedModel

VOCAB_SIZE = 300
NUM_LAYERS = 3
HIDDEN_SIZE = 32
MAX_POSITIONS = 66
MAX_PARAMETERS = 20_000_000

# The names of sizes in the configurations. Each size that is larger is reduced to this value.
SIZES: dict[str, int] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "dim",
            "n_embd",
            "emb_dim",
            "embed_dim",
            "embedding_size",
            "true_hidden_size",
        ),
        HIDDEN_SIZE,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "d_ff",
            "hidden_dim",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "d_inner",
        ),
        2 * HIDDEN_SIZE,
    ),
    **dict.fromkeys(("n_inner", "ffn_hidden_size"), 2 * HIDDEN_SIZE),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layers",
            "n_layer",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "depth",
        ),
        NUM_LAYERS,
    ),
    "num_decoder_layers": NUM_LAYERS,
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_heads",
            "n_head",
            "num_heads",
            "encoder_attention_heads",
            "num_key_value_heads",
        ),
        4,
    ),
    "decoder_attention_heads": 4,
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size"), 8),
    "vocab_size": VOCAB_SIZE,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), MAX_POSITIONS),
    "max_2d_position_embeddings": 128,
    "moe_intermediate_size": HIDDEN_SIZE,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
}
TOKENS = ("pad", "bos", "eos", "sep", "cls", "mask", "unk", "decoder_start")

# Further settings that a model type needs.
OWN: Mapping[str, Mapping[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "canine": {
        "downsampling_rate": 2,
        "upsampling_kernel_size": 2,
        "num_hash_functions": 4,
        "local_transformer_stride": 8,
    },
    "esm": {
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": 1,
        "mask_token_id": 4,
        "position_embedding_type": "rotary",
    },
    "funnel": {
        "architectures": ["FunnelModel"],
        "block_sizes": [1, 1, 1],
        "block_repeats": [1, 1, 1],
        "num_decoder_layers": 1,
    },
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 32},
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 48},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "markuplm": {"max_depth": 10},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "neomme": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    "perceiver": {"d_latents": 32, "num_latents": 8},
    "reformer": {
        "attn_layers": ["local", "lsh", "local"],
        "is_decoder": False,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 40,
        "shape_vocab_size": 40,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "t5gemma": {"is_encoder_decoder": False},
    "xlnet": {"d_head": 8},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
}

# Model types whose dot products or layers are not scaled: with weights as large as the others', rounding
# errors are too large.
GAINS = {**dict.fromkeys(("mt5", "t5", "t5gemma", "umt5"), 1.0), "cpmant": 0.05}


class NotMadeError(Exception):
    """There is no such tiny model, or transformers has no model for the configuration; the message says why."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    config = CONFIG_MAPPING[model_type]()
    shrink(config)
    for name, value in OWN.get(model_type, {}).items():
        setattr(config, name, value)
    return config


def shrink(config: PreTrainedConfig) -> None:
    names = {own: canonical for canonical, own in (config.attribute_map or {}).items()}
    num_layers = getattr(config, "num_hidden_layers", 0)
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            shrink(value)
            continue
        if isinstance(value, list) and len(value) == num_layers > NUM_LAYERS:
            setattr(config, key, value[-NUM_LAYERS:])  # one layer type for each layer
        size = SIZES.get(key, SIZES.get(names.get(key, "")))
        if size is not None and isinstance(value, int) and not isinstance(value, bool) and value > size:
            setattr(config, key, size)
    for number, token in enumerate(TOKENS):
        token_id = getattr(config, f"{token}_token_id", None)
        if isinstance(token_id, int) and token_id >= VOCAB_SIZE:
            setattr(config, f"{token}_token_id", number)


def auto_class_of(config: PreTrainedConfig) -> Any:
    """As `AutoModel` would have it; the encoder alone where there is a class for it."""
    return AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel


def build(model_type: str, folder: Path) -> Any:
    """Saves a tiny model of the type into the folder, and returns it. Raises `NotMadeError`."""
    try:
        config = tiny_config(model_type)
    except Exception as error:
        raise NotMadeError(f"no configuration by default: {said(error)}") from error
    auto_class = auto_class_of(config)
    if type(config) not in auto_class._model_mapping:
        raise NotMadeError("AutoModel has no class for it")
    try:
        with torch.device("meta"):
            model = auto_class.from_config(copy.deepcopy(config))
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if num_parameters > MAX_PARAMETERS:
            raise NotMadeError(f"no small one was found ({num_parameters / 1e6:.0f} million weights)")
        torch.manual_seed(0)
        model = auto_class.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    except NotMadeError:
        raise
    except Exception as error:
        raise NotMadeError(f"no tiny one was made: {said(error)}") from error
    randomize(model, GAINS.get(model_type, 3.0))
    try:
        model.save_pretrained(folder)
    except Exception as error:
        raise NotMadeError(f"it cannot be saved: {said(error)}") from error
    return model


def randomize(model: Any, gain: float) -> None:
    """Makes the weights larger, as they are initialized all tokens and layers give nearly the same; and padding, which
    is initialized to zero and could hide what it does."""
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, torch.nn.Embedding):
                    parameter.copy_(0.1 * gain * torch.randn(parameter.shape))
                elif parameter.dim() > 1:
                    parameter.mul_(gain)
                elif name == "bias":
                    parameter.add_(0.05 * torch.randn(parameter.shape))


def said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def read(folder: Path) -> Any:
    """The model as transformers itself reads it, with its own eager attention."""
    config = AutoConfig.from_pretrained(folder)
    return auto_class_of(config).from_pretrained(folder, attn_implementation="eager").eval()


# ------------------------------------------------------------------------------------- the table of docs/families.md

BEGIN, END = "<!-- every model: begin -->", "<!-- every model: end -->"


def row_of(loaded: LoadedModel) -> tuple[str, str, str]:
    """How a model runs, and whether it has a pooler and attention maps, in the table's words."""
    facts = loaded.facts
    how = "packed" if facts.packed else "alone" if loaded.one_text_per_pass else "padded"
    return how, yes_or_no(facts.has_pooler), yes_or_no(facts.has_attentions)


def yes_or_no(is_so: bool) -> str:
    return "yes" if is_so else "no"


def read_table(page: Path) -> dict[str, tuple[str, str, str]]:
    """Of each model type that is served, its row."""
    table = page.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| (\w+) \| (\w+) \|$", table, re.MULTILINE)
    return {model_type: (how, pooler, maps) for model_type, how, pooler, maps in rows}

"""Tiny models of every family: seeded weights, true architecture, and a tokenizer made in code."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from tiny_tokenizers import (
    EXAMPLE,
    MAX_TOKENS,
    byte_level,
    plain_byte_level,
    residues,
    sentences,
    unigram,
    wordpiece,
)

__all__ = [
    "EXAMPLE",
    "FAMILIES",
    "HIDDEN_SIZE",
    "MAX_TOKENS",
    "NUM_HEADS",
    "NUM_LAYERS",
    "Family",
    "build",
    "build_all",
    "sentences",
]

NUM_LAYERS = 4
HIDDEN_SIZE = 32
NUM_HEADS = 4


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture, small: `config` is what differs from the family's own defaults."""

    model_type: str
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    config: Mapping[str, Any] = field(default_factory=dict)
    model_class: type[Any] = AutoModel
    has_pooler: bool = True
    uses_type_ids: bool = True
    """A second text of a pair is told apart by its type ids."""
    mask: str = "[MASK]"
    gain: float = 1.0
    """Spread of the weights, beside the other families'."""


# -------------------------------------------------------------------------------- families

_BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_FAIRSEQ_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
_CAMEMBERT_SPECIAL = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>", "<mask>"]
_T5_SPECIAL = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{index}>" for index in range(4))]
_ANGLED = {"mask": "<mask>", "uses_type_ids": False}

_bert = partial(wordpiece, _BERT_SPECIAL)
_roberta = partial(byte_level, _FAIRSEQ_SPECIAL, "RobertaTokenizer")
_xlm_roberta = partial(unigram, _FAIRSEQ_SPECIAL, "XLMRobertaTokenizer")
_modernbert = partial(
    plain_byte_level,
    {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "[CLS]",
    "[SEP]",
)
_eurobert = partial(
    plain_byte_level,
    {
        "pad_token": "<|pad|>",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "mask_token": "<|mask|>",
    },
    "<|begin_of_text|>",
    "<|end_of_text|>",
)

# Position embeddings of these start at padding_idx + 1.
_FAIRSEQ = {
    "max_position_embeddings": MAX_TOKENS + 2,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}
_DEBERTA = {"relative_attention": True, "position_biased_input": False, "layer_norm_eps": 1e-7}

FAMILIES: dict[str, Family] = {
    "bert": Family("bert", _bert),
    "roberta": Family("roberta", _roberta, _FAIRSEQ, **_ANGLED),
    "xlm_roberta": Family("xlm-roberta", _xlm_roberta, _FAIRSEQ, **_ANGLED),
    "camembert": Family(
        "camembert", partial(unigram, _CAMEMBERT_SPECIAL, "CamembertTokenizer"), _FAIRSEQ, **_ANGLED
    ),
    "distilbert": Family("distilbert", _bert, has_pooler=False, uses_type_ids=False),
    "electra": Family("electra", _bert, {"embedding_size": 16}, has_pooler=False),
    "albert": Family(
        "albert",
        partial(
            unigram,
            ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"],
            "AlbertTokenizer",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        ),
        {"embedding_size": 16, "hidden_act": "gelu_new", "bos_token_id": 2, "eos_token_id": 3},
    ),
    "mpnet": Family(
        "mpnet",
        partial(wordpiece, ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], "MPNetTokenizer"),
        {"max_position_embeddings": MAX_TOKENS + 2, "relative_attention_num_buckets": 32},
        **_ANGLED,
    ),
    "deberta_v2": Family(
        "deberta-v2",
        partial(unigram, ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], "DebertaV2Tokenizer"),
        _DEBERTA
        | {
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "type_vocab_size": 0,
        },
        has_pooler=False,
        uses_type_ids=False,
    ),
    "modernbert": Family(
        "modernbert",
        _modernbert,
        {
            "local_attention": 16,
            "global_attn_every_n_layers": 3,
            "pad_token_id": 0,
            "cls_token_id": 2,
            "bos_token_id": 2,
            "sep_token_id": 3,
            "eos_token_id": 3,
        },
        has_pooler=False,
        uses_type_ids=False,
    ),
    "nomic_bert": Family("nomic_bert", _bert, has_pooler=False),
    "esm": Family(
        "esm",
        residues,
        {
            "position_embedding_type": "rotary",
            "token_dropout": True,
            "mask_token_id": 32,
            "pad_token_id": 1,
        },
        **_ANGLED,
    ),
    "esm_absolute": Family(
        "esm",
        residues,
        {
            "position_embedding_type": "absolute",
            "emb_layer_norm_before": True,
            "token_dropout": True,
            "mask_token_id": 32,
            "pad_token_id": 1,
            "max_position_embeddings": MAX_TOKENS + 2,
        },
        **_ANGLED,
    ),
    "ernie": Family("ernie", _bert, {"use_task_id": True}),
    "eurobert": Family(
        "eurobert",
        _eurobert,
        {
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "mask_token_id": 3,
        },
        has_pooler=False,
        uses_type_ids=False,
        mask="<|mask|>",
    ),
    "deberta": Family(
        "deberta",
        partial(byte_level, ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"], "DebertaTokenizer"),
        _DEBERTA | {"pos_att_type": ["c2p", "p2c"], "max_relative_positions": 40, "pad_token_id": 1},
        has_pooler=False,
        uses_type_ids=False,
    ),
    "jina_embeddings_v3": Family(
        "jina_embeddings_v3",
        _xlm_roberta,
        {"type_vocab_size": 1, "pad_token_id": 1},
        **_ANGLED,
    ),
    "t5": Family(
        "t5",
        partial(unigram, _T5_SPECIAL, "T5Tokenizer", extra_ids=4),
        {"d_kv": 8, "relative_attention_max_distance": 40},
        model_class=transformers.T5EncoderModel,
        has_pooler=False,
        uses_type_ids=False,
        mask="<extra_id_0>",
        gain=0.7,  # its dot products are not scaled down by the head size
    ),
}


# ----------------------------------------------------------------------------------- models


def build(name: str, folder: Path, *, num_layers: int = NUM_LAYERS, gain: float = 1.0) -> None:
    """Save the tiny model of family `name` with its tokenizer, as `from_pretrained` reads them.

    A gain of 1 leaves attention far from uniform; less makes a gentler model, that rounding hurts less.
    """
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "max_position_embeddings": MAX_TOKENS,
    }
    probe = AutoConfig.for_model(family.model_type)
    names = {key: probe.attribute_map.get(key, key) for key in sizes}
    if family.model_type == "t5":
        names |= {"intermediate_size": "d_ff", "max_position_embeddings": "n_positions"}
    config = AutoConfig.for_model(
        family.model_type,
        **{names[key]: value for key, value in sizes.items()}
        | {"vocab_size": len(tokenizer)}
        | dict(family.config),
    )
    maker = family.model_class
    model = maker.from_config(config) if maker is AutoModel else maker(config)
    _randomize(model, seed=sum(name.encode()), gain=gain * family.gain)
    model.save_pretrained(folder)


def build_all(root: Path) -> dict[str, Path]:
    """Build every family into a folder of its own under `root`; name to folder."""
    folders = {name: root / name for name in FAMILIES}
    for name, folder in folders.items():
        build(name, folder)
    return folders


def _randomize(model: PreTrainedModel, *, seed: int, gain: float) -> None:
    """Weights that keep the scale of what flows through, and norms that are no identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if isinstance(module, torch.nn.Embedding):
                    parameter.copy_(gain * noise)
                elif parameter.dim() > 1:
                    parameter.copy_(gain * noise / math.sqrt(math.prod(parameter.shape[1:])))
                else:
                    parameter.copy_(0.2 * noise + (1 if name == "weight" else 0))

"""Facts about each architecture that runs packed; any other runs padded.

A family belongs here once its parity tests pass in mixed batches (tests/parity). Adding one is a
line in `FAMILIES`, with the ways in which it differs from BERT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from layertap_server.engine.packing import Packing
from layertap_server.plan import Int64Array

# The share of masked tokens that ESM models saw in training: 15 % chosen, 80 % of those masked.
ESM_TRAINED_MASK_RATIO = 0.15 * 0.8

ModelInputs = dict[str, torch.Tensor]


def positions_from_zero(packing: Packing, config: Any) -> Int64Array:
    return np.concatenate([np.arange(work.num_tokens, dtype=np.int64) for work in packing.works])


def positions_after_padding(packing: Packing, config: Any) -> Int64Array:
    """RoBERTa counts its tokens from padding_idx + 1, and leaves padding at padding_idx."""
    padding_idx: int = config.pad_token_id
    positions = []
    for work in packing.works:
        is_token = (work.input_ids != padding_idx).astype(np.int64)
        positions.append(np.cumsum(is_token) * is_token + padding_idx)
    return np.concatenate(positions)


def esm_positions(packing: Packing, config: Any) -> Int64Array:
    absolute = getattr(config, "position_embedding_type", "absolute") == "absolute"
    return (positions_after_padding if absolute else positions_from_zero)(packing, config)


def esm_embeddings(model: nn.Module, packing: Packing, inputs: ModelInputs) -> ModelInputs:
    """ESM scales the embeddings of a row by its share of `<mask>`: here, of each text by its own."""
    embeddings: Any = model.embeddings
    input_ids = inputs["input_ids"][0]
    embedded = embeddings.word_embeddings(input_ids)
    if embeddings.token_dropout:
        is_mask = input_ids == embeddings.mask_token_id
        lengths = packing.lengths(input_ids.device)
        texts = torch.arange(len(lengths), device=input_ids.device)
        text_of_row = torch.repeat_interleave(texts, lengths, output_size=len(input_ids))
        num_masks = torch.zeros(len(lengths), device=input_ids.device).index_add_(
            0, text_of_row, is_mask.float()
        )
        scale = (1 - ESM_TRAINED_MASK_RATIO) / (1 - num_masks / lengths.clamp_min(1))
        embedded = embedded.masked_fill(is_mask[:, None], 0.0)
        embedded = (embedded * scale[text_of_row, None]).to(embedded.dtype)
    position_ids = inputs["position_ids"]
    embedded = embeddings(inputs_embeds=embedded[None], position_ids=position_ids)
    return {"inputs_embeds": embedded, "position_ids": position_ids}


def call_pooler(model: nn.Module, pooler: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """(n, 1, H) first rows to (n, H), by the model's own pooler module."""
    call: Callable[[torch.Tensor], torch.Tensor] = pooler
    return call


def albert_pooler(model: nn.Module, pooler: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """ALBERT's pooler is a bare linear layer; its activation stands beside it."""
    activation: Any = model.pooler_activation
    return lambda first_rows: activation(pooler(first_rows[:, 0]))


@dataclass(frozen=True, slots=True)
class Family:
    """How a packed family differs from BERT."""

    positions: Callable[[Packing, Any], Int64Array] = positions_from_zero
    pooler: Callable[[nn.Module, nn.Module], Callable[[torch.Tensor], torch.Tensor]] = call_pooler
    # Whether its layers are built as BERT's are, after attention too.
    has_bert_layers: bool = False
    # Rewrites the model's inputs where its own embedding layer mixes rows.
    embeddings: Callable[[nn.Module, Packing, ModelInputs], ModelInputs] | None = None


FAMILIES: dict[str, Family] = {
    "albert": Family(pooler=albert_pooler),
    "bert": Family(has_bert_layers=True),
    "camembert": Family(positions=positions_after_padding, has_bert_layers=True),
    "distilbert": Family(),
    "electra": Family(has_bert_layers=True),
    "ernie": Family(has_bert_layers=True),
    "esm": Family(positions=esm_positions, embeddings=esm_embeddings),
    "eurobert": Family(),
    "jina_embeddings_v3": Family(),
    "modernbert": Family(),
    "nomic_bert": Family(),
    "roberta": Family(positions=positions_after_padding, has_bert_layers=True),
    "xlm-roberta": Family(positions=positions_after_padding, has_bert_layers=True),
}


def depends_on_longest(config: Any) -> bool:
    """Whether rotary frequencies are chosen by the longest text of a batch ("dynamic" NTK, LongRoPE): a
    text's results would then depend on its company, and so each runs by itself."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = {str(one.get("rope_type", "")) for one in [parameters, *by_layer_type]}
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)

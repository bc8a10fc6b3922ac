"""Facts about each architecture that runs packed; any other runs padded.

A family belongs here once its parity tests pass in mixed batches (tests/parity). To add one, add a line to
`FAMILIES` that states how it differs from BERT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import nn

from layertap_server.engine.packing import Packing
from layertap_server.plan import Int64Array

# The share of masked tokens that ESM models saw in training: 15 % chosen, 80 % of those masked.
ESM_TRAINED_MASK_RATIO = 0.15 * 0.8

ModelInputs = dict[str, torch.Tensor]


def positions_from_zero(packing: Packing, config: Any) -> Int64Array:
    starts = packing.of_each_row(packing.cu_seqlens_array[:-1])
    return np.arange(packing.total_tokens, dtype=np.int64) - starts


def positions_after_padding(packing: Packing, config: Any) -> Int64Array:
    """RoBERTa numbers the tokens of a text from padding_idx + 1; padding tokens have position padding_idx."""
    padding_idx: int = config.pad_token_id
    is_token = packing.input_ids() != padding_idx
    counted = np.cumsum(is_token)
    before = np.concatenate([[0], counted])[packing.cu_seqlens_array[:-1]]
    positions: Int64Array = (counted - packing.of_each_row(before)) * is_token + padding_idx
    return positions


def esm_positions(packing: Packing, config: Any) -> Int64Array:
    absolute = getattr(config, "position_embedding_type", "absolute") == "absolute"
    return (positions_after_padding if absolute else positions_from_zero)(packing, config)


def esm_embeddings(model: nn.Module, inputs: ModelInputs, bounds: torch.Tensor) -> ModelInputs:
    """ESM scales the embeddings of a batch row by the row's share of `<mask>` tokens. Here the share is that
    of each packed text; `bounds` is (2, rows), where the text of each row begins and ends."""
    embeddings: Any = model.embeddings
    input_ids = inputs["input_ids"][0]
    embedded = embeddings.word_embeddings(input_ids)
    if embeddings.token_dropout:
        is_mask = input_ids == embeddings.mask_token_id
        starts, ends = bounds
        masks_before = F.pad(is_mask.cumsum(0), (1, 0))
        share = (masks_before[ends] - masks_before[starts]) / (ends - starts)
        scale = (1 - ESM_TRAINED_MASK_RATIO) / (1 - share)
        embedded = embedded.masked_fill(is_mask[:, None], 0.0)
        embedded = (embedded * scale[:, None]).to(embedded.dtype)
    position_ids = inputs["position_ids"]
    embedded = embeddings(inputs_embeds=embedded[None], position_ids=position_ids)
    return {"inputs_embeds": embedded, "position_ids": position_ids}


def call_pooler(model: nn.Module, pooler: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's own pooler module, from first rows (n, 1, H) to (n, H)."""
    call: Callable[[torch.Tensor], torch.Tensor] = pooler
    return call


def albert_pooler(model: nn.Module, pooler: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """ALBERT's pooler is a plain linear layer; the activation is a separate attribute of the model."""
    activation: Any = model.pooler_activation
    return lambda first_rows: activation(pooler(first_rows[:, 0]))


@dataclass(frozen=True, slots=True)
class Family:
    """How a packed family differs from BERT."""

    positions: Callable[[Packing, Any], Int64Array] = positions_from_zero
    pooler: Callable[[nn.Module, nn.Module], Callable[[torch.Tensor], torch.Tensor]] = call_pooler
    # Whether its layers have the structure of BERT's, including what follows the attention.
    has_bert_layers: bool = False
    # Rewrites the model's inputs where its own embedding layer mixes rows. The last argument is (2, rows):
    # the rows in which the text of each row begins and ends.
    embeddings: Callable[[nn.Module, ModelInputs, torch.Tensor], ModelInputs] | None = None


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


def sparse_blocks(model: Any) -> Callable[[], None] | None:
    """A function that resets a block-sparse BigBird before a pass; None for other models.

    At a text that is too short for its blocks, transformers switches the model to full attention permanently.
    The reset makes each text's kind of attention depend on that text only.
    """
    if getattr(model.config, "attention_type", "") != "block_sparse":
        return None
    return partial(model.set_attention_type, "block_sparse")


def depends_on_longest(config: Any) -> bool:
    """Whether the longest text of a batch determines the rotary frequencies ("dynamic" NTK, LongRoPE). A
    text's results would then depend on its batch, so each text runs in a batch of one."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = {str(one.get("rope_type", "")) for one in [parameters, *by_layer_type]}
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)

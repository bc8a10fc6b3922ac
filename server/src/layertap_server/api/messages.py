"""Builds the protobuf messages that describe tokens and models."""

from __future__ import annotations

from functools import lru_cache
from itertools import compress
from typing import Any, cast

from layertap.v1 import encoder_pb2 as pb
from layertap_server.config import Config
from layertap_server.enums import Pooling
from layertap_server.model_facts import ModelFacts
from layertap_server.tokenization.inputs import Encoded


def head_message(encoded: Encoded, with_tokens: bool) -> pb.EncodeResult:
    """A result without its tensors. Do not modify it: the message may be cached, and shared by results."""
    if not with_tokens:
        return counts_message(encoded.num_tokens, encoded.num_truncated)
    return pb.EncodeResult(
        token_count=encoded.num_tokens,
        truncated_tokens=encoded.num_truncated,
        tokens=tokens_message(encoded),
    )


@lru_cache(maxsize=4096)
def counts_message(num_tokens: int, num_truncated: int) -> pb.EncodeResult:
    return pb.EncodeResult(token_count=num_tokens, truncated_tokens=num_truncated)


def tokens_message(encoded: Encoded, *, with_special: bool = True) -> pb.Tokens:
    table = encoded.table()
    columns: dict[str, list[Any]] = {
        "ids": encoded.input_ids.tolist(),
        "tokens": table.tokens,
        "type_ids": encoded.type_ids.tolist(),
        "starts": table.starts,
        "ends": table.ends,
        "special": table.special,
        "word_ids": table.word_ids,
        "sequence_ids": table.sequence_ids,
    }
    if not with_special:
        kept = [not is_special for is_special in table.special]
        columns = {name: list(compress(values, kept)) for name, values in columns.items()}
    return pb.Tokens(**columns)


def model_message(facts: ModelFacts, config: Config) -> pb.Model:
    return pb.Model(
        name=facts.name,
        architecture=facts.architecture,
        revision=facts.revision,
        hidden_size=facts.hidden_size,
        num_layers=facts.num_layers,
        num_attention_heads=facts.num_attention_heads,
        vocab_size=facts.vocab_size,
        max_tokens=facts.max_tokens,
        has_pooler=facts.has_pooler,
        has_attentions=facts.has_attentions,
        default_pooling=pooling_number(facts),
        default_normalize=facts.default_normalize,
        prompts=facts.prompts,
        compute_dtype=cast("pb.DataType", facts.compute_dtype.value),
        device=facts.device,
        limits=pb.ModelLimits(
            max_inputs_per_request=config.max_inputs_per_request,
            max_message_bytes=config.max_message_bytes,
            max_result_bytes=config.max_result_bytes,
        ),
        embedding_unsupported=facts.embedding_unsupported,
        embedding_size=facts.embedding_size,
        head=cast("pb.HeadKind", facts.head.value),
        labels=facts.labels,
        head_activation=facts.head_activation,
        has_sparse=facts.has_sparse,
        has_contacts=facts.has_contacts,
        connections=advised_connections(config),
    )


def advised_connections(config: Config) -> int:
    """The number of connections that a busy client should open: one for each process that accepts them. (The
    supervisor has replaced "auto" by the number that it has chosen.)"""
    return max(int(config.fronts), 1) if config.fronts.isdigit() else 1


def pooling_number(facts: ModelFacts) -> pb.Pooling:
    """The configured pooling as the contract's enum.

    0 (unspecified) where several are concatenated, or the configured embedding is unsupported.
    """
    pooling = facts.default_pooling
    if pooling == (Pooling.MEAN, Pooling.MAX):
        pooling = Pooling.MEAN_MAX
    is_named = isinstance(pooling, Pooling)
    return cast("pb.Pooling", pooling if is_named and not facts.embedding_unsupported else 0)

"""What the fake server's models with heads answer: logits, sparse vectors, contacts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from layertap.v1 import encoder_pb2 as pb

VOCABULARY = 1010

# The models that `GetModel` knows beside those without a head.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "classifier": {"head": pb.HEAD_KIND_SEQUENCE_CLASSIFICATION, "labels": ["no", "maybe", "yes"]},
    "reranker": {"head": pb.HEAD_KIND_SEQUENCE_CLASSIFICATION, "labels": ["LABEL_0"]},
    "tagger": {"head": pb.HEAD_KIND_TOKEN_CLASSIFICATION, "labels": ["O", "B-PER", "I-PER", "B-LOC"]},
    "splade": {"head": pb.HEAD_KIND_MASKED_LANGUAGE, "has_sparse": True},
    "masked": {"head": pb.HEAD_KIND_MASKED_LANGUAGE},
    "protein": {"has_contacts": True, "embedding_size": 4},
}


def num_labels(model: str) -> int:
    return len(MODELS[model].get("labels", ())) or VOCABULARY


def token_scores(model: str, ids: list[int]) -> np.ndarray:
    """(T, labels)"""
    labels = np.arange(num_labels(model))
    return np.sin(np.array(ids)[:, None] * 1.3 + labels * 2).astype(np.float32)


def scores(model: str, ids: list[int]) -> np.ndarray:
    """(labels), or (T, labels) of a head that scores tokens."""
    of_tokens = token_scores(model, ids)
    is_of_text = MODELS[model]["head"] == pb.HEAD_KIND_SEQUENCE_CLASSIFICATION
    return of_tokens.mean(0) if is_of_text else of_tokens


def activated(logits: np.ndarray, activation: int) -> np.ndarray:
    if activation == pb.ACTIVATION_SOFTMAX:
        powers = np.exp(logits)
        return powers / powers.sum(-1, keepdims=True)
    return 1 / (1 + np.exp(-logits)) if activation == pb.ACTIVATION_SIGMOID else logits


def logits(model: str, ids: list[int], wanted: pb.LogitsSelection) -> tuple[np.ndarray, np.ndarray | None]:
    """The logits, and with `top_k` their labels' ids."""
    values = activated(scores(model, ids), wanted.activation)
    if wanted.positions:
        values = values[list(wanted.positions)]
    if not wanted.top_k:
        return values, None
    chosen = np.argsort(-values, axis=-1, kind="stable")[..., : wanted.top_k]
    return np.take_along_axis(values, chosen, -1), chosen.astype(np.int32)


def sparse(model: str, ids: list[int], top_k: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights). Of an input of one token, nothing is above zero."""
    weights = np.log1p(np.maximum(token_scores(model, ids), 0)).max(0) if len(ids) > 1 else np.zeros(4)
    (found,) = np.nonzero(weights)
    if top_k:
        found = found[np.argsort(-weights[found], kind="stable")[:top_k]]
    return found.astype(np.int32), weights[found]


def contacts(ids: list[int]) -> np.ndarray:
    """(T', T')"""
    inner = np.array(ids[1:-1], np.float32)
    return 1 / (1 + np.exp(-np.cos(np.add.outer(inner, inner))))


def fill(result: pb.EncodeResult, request: pb.EncodeRequest, ids: list[int], tensor: Any) -> None:
    """Adds the outputs of the heads that the request selects."""
    outputs, wire = request.outputs, request.wire_dtype
    if outputs.HasField("logits"):
        values, labels = logits(request.model, ids, outputs.logits)
        result.logits.CopyFrom(tensor(values, wire))
        if labels is not None:
            result.logit_ids.CopyFrom(tensor(labels, pb.DATA_TYPE_INT32))
    if outputs.HasField("sparse"):
        entries, weights = sparse(request.model, ids, outputs.sparse.top_k)
        result.sparse_ids.CopyFrom(tensor(entries, pb.DATA_TYPE_INT32))
        result.sparse_weights.CopyFrom(tensor(weights, wire))
    if outputs.contacts:
        result.contacts.CopyFrom(tensor(contacts(ids), wire))


def lacks(model: str, outputs: pb.OutputSelection) -> bool:
    """Whether an output is selected that the model does not have."""
    facts = MODELS.get(model, {})
    return (
        (outputs.HasField("logits") and "head" not in facts)
        or (outputs.HasField("sparse") and "has_sparse" not in facts)
        or (outputs.contacts and "has_contacts" not in facts)
    )

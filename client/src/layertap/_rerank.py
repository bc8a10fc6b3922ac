"""Re-ranking: the requests for the scores of pairs, and texts in the order of their scores. No I/O; shared by
both clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from layertap import _arguments
from layertap._results import Model, Ranked
from layertap._types import Array, Logits, Pair
from layertap.errors import FailedPrecondition

ScoreActivation: TypeAlias = Literal["none", "sigmoid"]


def pairs(query: Any, texts: Any) -> list[Pair]:
    """The pair of the query with each text.

    Raises:
        TypeError, ValueError: the query, `texts` or one of them has a wrong type.
    """
    query = _arguments.text("query", query)
    if isinstance(texts, Iterator):
        texts = list(texts)
    found = _arguments.sequence("texts", texts, "give a list of texts")
    return [Pair(query, _arguments.text(f"texts[{index}]", text)) for index, text in enumerate(found)]


def scores_selection(activation: Any) -> Logits:
    """The selection of the scores.

    Raises:
        ValueError: the activation is unknown, or makes all scores equal.
    """
    if activation == "softmax":
        raise _arguments.wrong_value(
            "activation", activation, "of a single label it is always 1; give 'sigmoid', or None"
        )
    if activation not in (None, "none", "sigmoid"):
        raise _arguments.wrong_value("activation", activation, "give 'sigmoid', or None for the logits")
    return Logits(activation=activation)


def limit_of(top_k: Any) -> int | None:
    """The most texts to return; None for all."""
    return None if top_k is None else _arguments.whole_number("top_k", top_k, 1, (1 << 32) - 1)


def can_rerank(model: Model) -> bool:
    """Whether the model has a head that gives each pair one score."""
    return model.head == "sequence_classification" and len(model.labels) == 1


def check_head(model: Model) -> None:
    """Raises FailedPrecondition if the model cannot rerank; the message says what it has instead."""
    if can_rerank(model):
        return
    has = {
        "": "has no head",
        "sequence_classification": f"has a head with {len(model.labels)} labels",
        "token_classification": "has a head that scores tokens",
        "masked_language": "has a head for masked words",
    }[model.head]
    raise FailedPrecondition(
        f"rerank needs a model with one score for each pair (a cross-encoder); {model.name!r} {has}"
    )


def ranked(pairs: Sequence[Pair], results: Iterable[Any], top_k: int | None) -> list[Ranked]:
    """The texts of the pairs, highest score first; texts of equal score in their order, NaN last.

    Raises:
        FailedPrecondition: a result does not have exactly one score.
    """
    logits = [result.logits for result in results]
    scores = np.array([_score(one) for one in logits], np.float32)
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [Ranked(index, float(scores[index]), pairs[index].second) for index in order.tolist()]


def _score(logits: Array | None) -> float:
    if logits is None or logits.shape != (1,):
        shape = None if logits is None else logits.shape
        raise FailedPrecondition(
            f"rerank needs one score for each pair, and the model gave logits of shape {shape}"
        )
    return float(logits[0])

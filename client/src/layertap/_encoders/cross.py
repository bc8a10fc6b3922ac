"""A served model with the methods of `sentence_transformers.CrossEncoder`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np

from layertap import _arguments
from layertap._client import DEFAULT_ADDRESS, Client
from layertap._encoders.base import RemoteEncoder, as_input, as_inputs, check_call, listed
from layertap._requests import is_single
from layertap._torch import load_torch
from layertap._transport import TLSLike
from layertap._types import Array
from layertap.errors import FailedPrecondition

ScoreFunction: TypeAlias = 'Literal["none", "sigmoid", "softmax"] | Callable[[Any], Any]'


class CrossEncoder(RemoteEncoder):
    """A served model with the methods of a sentence-transformers `CrossEncoder`.

    The model must have a head that classifies whole inputs. `address`, `token`, `tls` and `timeout` are as
    in `SentenceEncoder`. `activation_fn` is what is applied to the logits: "none", "sigmoid", "softmax", or a
    function of a (N, labels) tensor, such as `torch.nn.Sigmoid()`. None is the function that the checkpoint's
    files name (`Model.head_activation`), and otherwise the default of sentence-transformers: the sigmoid for
    one label, else nothing.

    Example:
        >>> with CrossEncoder("127.0.0.1:50051", "reranker") as model:
        ...     scores = model.predict([("how do bees fly", "Bees beat their wings."), ("how", "why")])

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    def __init__(
        self,
        address: str | Client = DEFAULT_ADDRESS,
        model: str = "",
        *,
        activation_fn: ScoreFunction | None = None,
        token: str | None = None,
        tls: TLSLike = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(address, model, token=token, tls=tls, timeout=timeout)
        self.activation_fn = _checked(activation_fn)

    @property
    def num_labels(self) -> int:
        """The number of the head's labels."""
        return len(self._head_labels)

    @property
    def _head_labels(self) -> tuple[str, ...]:
        facts = self.facts
        if facts.head != "sequence_classification":
            kind = f"a head for {facts.head}" if facts.head else "no head"
            raise FailedPrecondition(
                f"a CrossEncoder needs a model that classifies whole inputs; {facts.name!r} has {kind}"
            )
        return facts.labels

    def _configured(self, num_labels: int) -> ScoreFunction:
        """The function that the model is configured with. Raises `FailedPrecondition` for an unknown one."""
        named = self.facts.head_activation
        if named in ("none", "sigmoid", "softmax"):
            return named  # type: ignore[return-value]
        if named:
            raise FailedPrecondition(
                f"{self.facts.name!r} is configured with {named!r}, which this client does not know; give it as "
                "activation_fn"
            )
        return "sigmoid" if num_labels == 1 else "none"

    def predict(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: ScoreFunction | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
    ) -> Any:
        """Returns the scores of pairs of texts: (N,) for a head with one label, otherwise (N, labels). A
        single pair, (text, text), gives a number, or (labels,).

        `activation_fn` replaces that of the encoder; `apply_softmax` then applies a softmax over the labels.
        The result is a float32 numpy array, a torch tensor with `convert_to_tensor`, or a list of tensors if
        `convert_to_numpy` is False as well. `batch_size` is not used: the server makes its own batches.

        Raises:
            FailedPrecondition: the model has no head that classifies whole inputs.
            LayertapError: the call failed; `input_index` is the index of the pair that caused it, or None.
        """
        check_call(batch_size)
        pairs, one = _pairs(inputs)
        num_labels = self.num_labels
        function = _checked(activation_fn) or self.activation_fn or self._configured(num_labels)
        text, name = self._prompt(prompt, prompt_name)
        logits = np.zeros((len(pairs), num_labels), np.float32)
        for index, result in self._results(
            pairs,
            show_progress_bar,
            logits=True,
            truncation="end",
            max_tokens=self._max_tokens,
            prompt=text,
            prompt_name=name,
        ):
            logits[index] = result.logits
        scores = _activated(logits, function)
        if num_labels == 1 and scores.ndim > 1:
            scores = scores[:, 0]
        if apply_softmax and scores.ndim > 1:
            scores = _softmax(scores)
        if convert_to_tensor or not convert_to_numpy:
            torch = load_torch("convert_to_tensor")
            tensor = torch.from_numpy(np.ascontiguousarray(scores)).to(device or "cpu")
            if convert_to_tensor:
                return tensor[0] if one else tensor
            return tensor[0] if one else list(tensor)
        if not pairs:
            return np.array([])
        return scores[0] if one else scores

    def rank(
        self,
        query: str,
        documents: Any,
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: ScoreFunction | None = None,
    ) -> list[dict[str, Any]]:
        """Returns the documents by their scores for the query, highest first, each as a dict with `corpus_id`,
        `score` and, with `return_documents`, `text`. `top_k` limits how many are returned.

        Raises:
            ValueError: the model's head has more than one label.
        """
        if self.num_labels != 1:
            raise ValueError(f"rank needs a head with one label, and this one has {self.num_labels}")
        texts = listed(documents)
        scores = self.predict(
            [(query, text) for text in texts],
            prompt_name,
            prompt,
            batch_size,
            show_progress_bar,
            activation_fn,
        )
        ranked = [{"corpus_id": index, "score": score} for index, score in enumerate(scores.tolist())]
        if return_documents:
            for one in ranked:
                one["text"] = texts[one["corpus_id"]]
        return sorted(ranked, key=lambda one: one["score"], reverse=True)[:top_k]


def _pairs(inputs: Any) -> tuple[list[Any], bool]:
    """The inputs as a list, and whether they are one input: a text, or a pair."""
    if is_single(inputs):
        return [inputs], True
    values = listed(inputs)
    if values and isinstance(inputs, list | tuple | np.ndarray) and isinstance(values[0], str):
        return [as_input(values)], True
    return as_inputs(values), False


def _checked(function: Any) -> ScoreFunction | None:
    if function is None or callable(function) or function in ("none", "sigmoid", "softmax"):
        return function  # type: ignore[no-any-return]
    raise _arguments.wrong_value(
        "activation_fn", function, "give 'none', 'sigmoid', 'softmax', or a function of tensors"
    )


def _activated(logits: Array, function: ScoreFunction) -> Array:
    if callable(function):
        torch = load_torch("a function as activation_fn")
        with torch.inference_mode():
            return np.asarray(function(torch.from_numpy(logits)).float().cpu().numpy())
    if function == "sigmoid":
        # The same number without an overflow for logits far below zero.
        return np.asarray(np.exp(-np.logaddexp(0, -logits)), np.float32)
    return _softmax(logits) if function == "softmax" else logits


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))

"""A transformer of texts for scikit-learn: `pip install 'layertap[sklearn]'`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from layertap import _arguments
from layertap._client import DEFAULT_ADDRESS, Client
from layertap._extras import missing
from layertap._text_vectors import TOKEN_VARIABLE, embed_options, token_of
from layertap._transport import TLS
from layertap._types import Array, TruncationName

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
except ModuleNotFoundError as error:
    raise missing(error, __name__, "sklearn", "scikit-learn", "sklearn") from error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

__all__ = ["LayertapVectorizer"]


class LayertapVectorizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Transforms texts into the embeddings of a served model, (N, D) float32.

    `prompt_name` is the name of a prompt that is configured with the model, and `prompt` a text of your own to
    put before each text; by default, the model's default prompt is, if it has one. `dimensions` keeps that many
    leading dimensions; `normalize` divides by the L2 norm, or not (None: as the model is configured). Texts
    over the model's limit are rejected, unless `truncation` says at which end to cut them: "end" or "start".
    `timeout` is the time limit of a call in seconds (None: no limit). `address`, `model` and `tls` are as in
    `SentenceEncoder`, but `tls` is True or a `TLS`.

    `token_variable` is the name of the environment variable with the token that is sent with every call, if it
    is set: the parameters of an estimator are printed, and pickled for other processes. A connection is open
    during `fit` and `transform` only, so that an estimator can be cloned, pickled and sent to other processes
    at any time.

    Example:
        >>> make_pipeline(LayertapVectorizer("127.0.0.1:50051"), LogisticRegression()).fit(texts, labels)
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        model: str = "",
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncation: TruncationName | None = None,
        prompt_name: str = "",
        prompt: str = "",
        timeout: float | None = None,
        tls: TLS | bool | None = None,
        token_variable: str = TOKEN_VARIABLE,
    ) -> None:
        self.address = address
        self.model = model
        self.dimensions = dimensions
        self.normalize = normalize
        self.truncation = truncation
        self.prompt_name = prompt_name
        self.prompt = prompt
        self.timeout = timeout
        self.tls = tls
        self.token_variable = token_variable

    def fit(self, X: Iterable[str], y: Any = None) -> Self:  # noqa: N803  (scikit-learn's name)
        """Asks the server for the size of a vector. Nothing is learned from the texts.

        Raises:
            LayertapError: the call failed.
            TypeError, ValueError: a parameter is invalid; the message names it.
        """
        _arguments.check_inputs(X)
        found = self._embed([])
        # The size is not known of every model.
        self._n_features_out = found.shape[1] or self._embed(["a"]).shape[1]
        return self

    def transform(self, X: Iterable[str]) -> Array:  # noqa: N803
        """The vectors of the texts, (N, D) float32.

        Raises:
            LayertapError: the call failed; `input_index` is the index of the text that caused it, or None.
            TypeError, ValueError: a parameter or a text is invalid; the message names it.
        """
        _arguments.check_inputs(X)
        return self._embed([str(text) if isinstance(text, np.str_) else text for text in X])

    def _embed(self, texts: list[str]) -> Array:
        options = embed_options(
            self.model, self.dimensions, self.normalize, self.truncation, self.prompt, self.prompt_name
        )
        with Client(self.address, token=token_of(self.token_variable), tls=self.tls) as client:
            return client.embed(texts, timeout=self.timeout, **options)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.requires_fit = False
        return tags

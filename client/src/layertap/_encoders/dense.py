"""A served model with the methods of `sentence_transformers.SentenceTransformer`."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np

from layertap import _arguments
from layertap._client import DEFAULT_ADDRESS, Client
from layertap._encoders.base import VectorEncoder, as_input, as_inputs, check_call, listed
from layertap._encoders.quantization import PrecisionName, check_precision, quantized
from layertap._encoders.similarity import SimilarityName
from layertap._requests import is_single
from layertap._torch import load_torch
from layertap._transport import TLSLike
from layertap._types import Array

OutputValue = Literal["sentence_embedding", "token_embeddings"]


class SentenceEncoder(VectorEncoder):
    """A served model with the methods of a `SentenceTransformer`: same calls, same shapes and types.

    `address` is the address of a server, or an open `Client`, which `close` leaves open. `truncate_dim` is
    the default of `encode`. `similarity_fn_name` is "cosine", "dot", "euclidean" or "manhattan"; the server
    does not say which one is configured with the model. `timeout` is the time limit of a call in seconds
    (None: no limit). `token` and `tls` are as in `Client`.

    Like a `SentenceTransformer`, it cuts texts at `max_seq_length` tokens, applies the model's default prompt,
    and returns the embedding that is configured with the model.

    Example:
        >>> with SentenceEncoder("127.0.0.1:50051") as model:
        ...     vectors = model.encode(["a text", "another"])
        ...     print(model.similarity(vectors, vectors))

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    def __init__(
        self,
        address: str | Client = DEFAULT_ADDRESS,
        model: str = "",
        *,
        truncate_dim: int | None = None,
        similarity_fn_name: SimilarityName = "cosine",
        token: str | None = None,
        tls: TLSLike = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(address, model, similarity_fn_name, token=token, tls=tls, timeout=timeout)
        self.truncate_dim = _dimensions(truncate_dim)

    def encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: OutputValue = "sentence_embedding",
        precision: PrecisionName = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any:
        """Returns the embeddings of `inputs`: (D,) for one text, (N, D) for a list of N texts.

        A list or tuple of two texts within the list is a pair. `prompt` is put before each text, or the
        configured prompt of the name `prompt_name`. `normalize_embeddings` divides each vector by its L2
        norm. `truncate_dim` keeps that many leading dimensions. `device` is that of the returned tensor.
        `batch_size` is not used: the server makes its own batches.

        The result is a float32 numpy array; a torch tensor with `convert_to_tensor`; a list of tensors if
        `convert_to_numpy` is False as well. With `precision`, it is quantized as by sentence-transformers:
        "int8" and "uint8" by the ranges of these vectors, "ubinary" and "binary" with one bit for each
        dimension, as uint8 and as int8.

        With `output_value="token_embeddings"`, the result is the last hidden state of each text, (T, H): a
        tensor, or a list of tensors, of different T.

        Raises:
            ValueError, TypeError: an argument is invalid; the message names it.
            LayertapError: the call failed; `input_index` is the index of the text that caused it, or None.
        """
        check_call(batch_size)
        check_precision(precision)
        texts, one = _texts(inputs)
        text, name = self._prompt(prompt, prompt_name)
        truncate_dim = self.truncate_dim if truncate_dim is None else _dimensions(truncate_dim)
        if output_value == "token_embeddings":
            if precision != "float32":
                raise ValueError(f"precision={precision!r} is not available for token_embeddings")
            torch = load_torch('output_value="token_embeddings"')
            # The embedding is requested too, because its limit of tokens and its default prompt apply then.
            found = {
                index: torch.from_numpy(np.array(result.last_hidden_state))
                for index, result in self._results(
                    texts,
                    show_progress_bar,
                    last_hidden_state=True,
                    embeddings=True,
                    truncation="end",
                    max_tokens=self._max_tokens,
                    prompt=text,
                    prompt_name=name,
                )
            }
            tensors = [found[index].to(device or "cpu") for index in range(len(texts))]
            return tensors[0] if one else tensors
        if output_value != "sentence_embedding":
            raise _arguments.wrong_value(
                "output_value", output_value, "give 'sentence_embedding' or 'token_embeddings'"
            )
        if not texts:
            vectors: Array = np.array([], np.float32 if convert_to_tensor else np.float64)
        else:
            vectors = self.client.embed(
                texts,
                model=self.model,
                normalize=True if normalize_embeddings else None,
                # The server cuts a vector before it normalizes it. Without `normalize_embeddings`, a vector is
                # cut after all, as in sentence-transformers.
                dimensions=(truncate_dim or 0) if normalize_embeddings else 0,
                truncation="end",
                max_tokens=self._max_tokens,
                prompt=text,
                prompt_name=name,
                show_progress_bar=show_progress_bar,
                timeout=self._timeout,
            )
            vectors = quantized(vectors[:, :truncate_dim], precision)
        if convert_to_tensor:
            tensor = load_torch("convert_to_tensor").from_numpy(vectors).to(device or "cpu")
            return tensor[0] if one else tensor
        if not convert_to_numpy:
            tensors = list(load_torch("convert_to_numpy=False").from_numpy(vectors))
            return tensors[0] if one else tensors
        return vectors[0] if one else vectors

    def tokenize(self, texts: Any) -> dict[str, Any]:
        """The `input_ids`, `token_type_ids` and `attention_mask` of the texts, each (N, T), cut at
        `max_seq_length` and padded at the end. Torch tensors if torch is installed, otherwise numpy arrays."""
        return self._tokenized(as_inputs(listed(texts)), "", "", self.max_seq_length)

    @cached_property
    def _default_length(self) -> int:
        return self._embedding_length()

    def get_embedding_dimension(self) -> int:
        """The D of `encode`."""
        size = self.facts.embedding_size or self._found_dimension
        return size if self.truncate_dim is None else min(size, self.truncate_dim)

    @cached_property
    def _found_dimension(self) -> int:
        return int(self.client.embed("a", model=self.model).shape[0])


def _texts(inputs: Any) -> tuple[list[Any], bool]:
    """The inputs as a list, and whether they are one input."""
    if is_single(inputs) or isinstance(inputs, np.str_):
        return [as_input(inputs)], True
    return as_inputs(listed(inputs)), False


def _dimensions(value: Any) -> int | None:
    return None if value is None else _arguments.whole_number("truncate_dim", value, 1, (1 << 31) - 1)

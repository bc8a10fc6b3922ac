"""A served model with the methods of `sentence_transformers.SparseEncoder`."""

from __future__ import annotations

from typing import Any

import numpy as np

from layertap import _arguments
from layertap._client import DEFAULT_ADDRESS, Client
from layertap._encoders.base import VectorEncoder, as_inputs, check_call, listed
from layertap._encoders.similarity import SimilarityName
from layertap._requests import is_single
from layertap._torch import load_torch
from layertap._transport import TLSLike
from layertap._types import Sparse, TokenIds
from layertap.errors import FailedPrecondition

# Token ids in one input of `decode`.
_DECODED_IDS = 256


class SparseEncoder(VectorEncoder):
    """A served model with the methods of a sentence-transformers `SparseEncoder`. It needs torch.

    The model must give sparse vectors (`Model.has_sparse`). `max_active_dims` is the default of `encode`.
    `similarity_fn_name` is "dot", "cosine", "euclidean" or "manhattan". `address`, `token`, `tls` and
    `timeout` are as in `SentenceEncoder`.

    Example:
        >>> with SparseEncoder("127.0.0.1:50051", "splade") as model:
        ...     vectors = model.encode(["how do bees fly", "Bees beat their wings."])
        ...     print(model.sparsity(vectors), model.decode(vectors[0], top_k=5))

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    def __init__(
        self,
        address: str | Client = DEFAULT_ADDRESS,
        model: str = "",
        *,
        max_active_dims: int | None = None,
        similarity_fn_name: SimilarityName = "dot",
        token: str | None = None,
        tls: TLSLike = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(address, model, similarity_fn_name, token=token, tls=tls, timeout=timeout)
        self.max_active_dims = _count(max_active_dims)

    def encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = True,
        convert_to_sparse_tensor: bool = True,
        save_to_cpu: bool = False,
        device: Any = None,
        max_active_dims: int | None = None,
    ) -> Any:
        """Returns the sparse vectors of `inputs` over the vocabulary: (V,) for one text, (N, V) for a list of N
        texts, as a sparse (COO) torch tensor.

        With `convert_to_sparse_tensor=False`, the tensor is dense; with `convert_to_tensor=False`, the result
        is a list of tensors. `max_active_dims` keeps only that many of the highest weights of each text.
        `batch_size` and `save_to_cpu` are not used.

        Raises:
            FailedPrecondition: the model gives no sparse vectors.
            LayertapError: the call failed; `input_index` is the index of the text that caused it, or None.
        """
        check_call(batch_size)
        if not self.facts.has_sparse:
            raise FailedPrecondition(
                f"a SparseEncoder needs sparse vectors, and {self.facts.name!r} gives none"
            )
        torch = load_torch("SparseEncoder")
        one = is_single(inputs)
        texts = [inputs] if one else as_inputs(listed(inputs))
        text, name = self._prompt(prompt, prompt_name)
        limit = self.max_active_dims if max_active_dims is None else _count(max_active_dims)
        found = dict(
            self._results(
                texts,
                show_progress_bar,
                sparse=Sparse(top_k=limit or 0),
                truncation="end",
                max_tokens=self._max_tokens,
                prompt=text,
                prompt_name=name,
            )
        )
        counts = [len(found[index].sparse_ids) for index in range(len(texts))]
        rows = np.repeat(np.arange(len(texts)), counts)
        columns = np.concatenate([found[index].sparse_ids for index in range(len(texts))] or [rows])
        weights = np.concatenate([found[index].sparse_weights for index in range(len(texts))] or [rows])
        matrix = torch.sparse_coo_tensor(
            torch.from_numpy(np.stack([rows, columns.astype(np.int64)])),
            torch.from_numpy(weights.astype(np.float32)),
            (len(texts), self.get_embedding_dimension()),
            check_invariants=True,
        ).coalesce()
        matrix = matrix.to(device or "cpu")
        if not convert_to_sparse_tensor:
            matrix = matrix.to_dense()
        if one:
            return matrix[0]
        return matrix if convert_to_tensor else [matrix[index] for index in range(len(texts))]

    @staticmethod
    def sparsity(embeddings: Any) -> dict[str, float]:
        """The mean over the vectors, (V,) or (N, V), of `active_dims`, the number of entries, and of
        `sparsity_ratio`, the share of the vocabulary without an entry."""
        torch = load_torch("sparsity")
        if not isinstance(embeddings, torch.Tensor):
            raise TypeError("embeddings: give a tensor, as `encode` returns it")
        if embeddings.ndim not in (1, 2):
            raise ValueError(f"embeddings has {embeddings.ndim} dimensions: give (V,) or (N, V)")
        num_rows, size = (1, *embeddings.shape)[-2:]
        if not num_rows or not size:
            return {"active_dims": 0.0, "sparsity_ratio": 1.0}
        values = embeddings.coalesce().values() if embeddings.is_sparse else embeddings
        active = int((values != 0).sum()) / num_rows
        return {"active_dims": active, "sparsity_ratio": 1.0 - active / size}

    @staticmethod
    def intersection(embeddings_1: Any, embeddings_2: Any) -> Any:
        """The product of a vector, (V,), with another one or with each of (N, V): sparse, with the entries
        above zero, which are those that both have."""
        torch = load_torch("intersection")
        if embeddings_1.ndim != 1:
            raise ValueError(f"embeddings_1 has {embeddings_1.ndim} dimensions: give (V,)")
        dense = embeddings_1.to_dense() if embeddings_1.is_sparse else embeddings_1
        other = (embeddings_2 if embeddings_2.is_sparse else embeddings_2.to_sparse()).coalesce()
        products = other.values() * dense[other.indices()[-1]]
        kept = products > 0
        return torch.sparse_coo_tensor(
            other.indices()[:, kept], products[kept], other.shape, check_invariants=True
        ).coalesce()

    def decode(self, embeddings: Any, top_k: int | None = None) -> Any:
        """The entries of a vector, (V,), as a list of (token, weight), highest weight first; for (N, V), a
        list of such lists. `top_k` keeps only the first entries.

        The server is asked for the tokens of the ids.
        """
        torch = load_torch("decode")
        if not isinstance(embeddings, torch.Tensor):
            raise TypeError("embeddings: give a tensor, as `encode` returns it")
        limit = _count(top_k, "top_k")
        rows = embeddings[None] if embeddings.ndim == 1 else embeddings
        matrix = (rows if rows.is_sparse else rows.to_sparse()).coalesce()
        (samples, ids), values = matrix.indices().numpy(), matrix.values().numpy()
        chosen = []
        for row in range(rows.shape[0]):
            (places,) = np.nonzero(samples == row)
            chosen.append(places[np.argsort(-values[places], kind="stable")][:limit])
        wanted = np.unique(np.concatenate([ids[places] for places in chosen]))
        names = dict(zip(wanted.tolist(), self._names(wanted), strict=True))
        decoded = [[(names[int(ids[one])], float(values[one])) for one in places] for places in chosen]
        return decoded[0] if embeddings.ndim == 1 else decoded

    def _names(self, ids: Any) -> list[str]:
        parts = [TokenIds(ids[start : start + _DECODED_IDS]) for start in range(0, len(ids), _DECODED_IDS)]
        found = self.client.tokenize(parts, model=self.model)
        return [name for tokens in found for name in tokens.tokens]

    def get_embedding_dimension(self) -> int:
        """The V of `encode`: the size of the vocabulary."""
        return self.facts.vocab_size


def _count(value: Any, argument: str = "max_active_dims") -> int | None:
    return None if value is None else _arguments.whole_number(argument, value, 1, (1 << 31) - 1)

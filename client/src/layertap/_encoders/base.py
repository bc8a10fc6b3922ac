"""What the three classes share: the connection, the model's facts, prompts, limits and inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from layertap import _arguments, _requests
from layertap._arguments import Timeout
from layertap._client import DEFAULT_ADDRESS, Client
from layertap._encoders.similarity import (
    SimilarityName,
    similarity,
    similarity_name,
    similarity_pairwise,
)
from layertap._progress import progress
from layertap._results import Model, Result
from layertap._torch import has_torch, load_torch
from layertap._transport import TLSLike
from layertap._types import EncodeOptions, Input, Pair
from layertap.errors import InvalidArgument

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

# Repeated, this is a text of more tokens than a model takes.
_FILLER = "a b c d "
_MAX_FILLER_CHARACTERS = 1 << 20


class RemoteEncoder:
    """A served model; `address` is the address of a server, or an open `Client`, which `close` leaves open.

    `timeout` is the time limit of a call in seconds; None, the default, is no limit, because calls take any
    number of texts.
    """

    def __init__(
        self,
        address: str | Client = DEFAULT_ADDRESS,
        model: str = "",
        *,
        token: str | None = None,
        tls: TLSLike = None,
        timeout: float | None = None,
    ) -> None:
        self.model = _arguments.optional_text("model", model)
        self._timeout: Timeout = _arguments.seconds("timeout", timeout)
        self._owns_client = not isinstance(address, Client)
        if isinstance(address, Client):
            if token is not None or tls is not None:
                raise ValueError("token and tls are those of the Client that is given: leave them out")
            self.client = address
        else:
            self.client = Client(address, token=token, tls=tls)
        self._max_tokens = 0  # 0: as configured

    def close(self) -> None:
        """Closes the connection, unless the encoder was created with an open `Client`."""
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._owns_client:
            self.client.__exit__(*error)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.client!r}, {self.model!r})"

    @cached_property
    def facts(self) -> Model:
        """The description of the served model, which is requested from the server once."""
        return self.client.model(self.model)

    @property
    def max_seq_length(self) -> int:
        """The number of tokens at which inputs are cut; may be set, up to the model's limit."""
        return self._max_tokens or self._default_length

    @max_seq_length.setter
    def max_seq_length(self, number: int) -> None:
        self._max_tokens = _arguments.whole_number("max_seq_length", number, 1, self.facts.max_tokens)

    @cached_property
    def _default_length(self) -> int:
        """`max_seq_length` if it is not set."""
        return self.facts.max_tokens

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts that are configured with the model, by name."""
        return dict(self.facts.prompts)

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> tuple[str, str]:
        """The `prompt` and the `prompt_name` of a request. A prompt takes precedence over a name."""
        if prompt is not None:
            prompt = _arguments.text("prompt", prompt)
            return (prompt, "") if prompt else ("", self._empty_prompt)
        if prompt_name is None:
            return "", ""
        prompts = self.facts.prompts
        if prompt_name not in prompts:
            raise ValueError(f"prompt_name={prompt_name!r}: the model has the prompts {sorted(prompts)}")
        # The name of an empty prompt would be sent as it is: it leaves the default prompt out.
        return "", prompt_name

    @cached_property
    def _empty_prompt(self) -> str:
        """The name of an empty prompt, which leaves a default prompt out; "" if there is no default prompt.

        Raises:
            ValueError: the model has a default prompt, and no empty one.
        """
        prompts = self.facts.prompts
        for name, text in prompts.items():
            if not text:
                return name
        if prompts:
            # The server does not say whether one of them is the default, but its tokens are counted.
            with_default = self.client.encode("a", model=self.model, embeddings=True)
            if with_default.token_count != len(self.client.tokenize("a", model=self.model)):
                raise ValueError(
                    'prompt="": the model has a default prompt and no empty one in its place; configure an '
                    "empty prompt with the model"
                )
        return ""

    def _results(
        self, inputs: Sequence[Input], show_progress_bar: bool | None, **options: Unpack[EncodeOptions]
    ) -> Iterator[tuple[int, Result]]:
        """(index, result) for each input, in any order."""
        options["model"] = self.model
        template = _requests.encode_request(**options)
        limit = self.client._calls.time_limit(self._timeout)
        with progress(len(inputs), show_progress_bar) as advance:
            for index, result in self.client._outcomes(template, inputs, "raise", limit):
                assert isinstance(result, Result)
                yield index, result
                advance()

    def _tokenized(
        self, texts: Sequence[Input], prompt: str, prompt_name: str, max_tokens: int
    ) -> dict[str, Any]:
        """The padded `input_ids`, `token_type_ids` and `attention_mask`, each (N, T)."""
        found: dict[int, Result] = dict(
            self._results(
                texts,
                False,
                tokens=True,
                truncation="end",
                max_tokens=max_tokens,
                prompt=prompt,
                prompt_name=prompt_name,
            )
        )
        lengths = [found[index].token_count for index in range(len(texts))]
        shape = (len(texts), max(lengths, default=0))
        ids = np.full(shape, self._pad_token_id, np.int64)
        type_ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for index, length in enumerate(lengths):
            tokens = found[index].tokens
            ids[index, :length], type_ids[index, :length] = tokens.ids, tokens.type_ids
            mask[index, :length] = 1
        named = {"input_ids": ids, "token_type_ids": type_ids, "attention_mask": mask}
        if not has_torch():
            return named
        torch = load_torch("tokenize")
        return {name: torch.from_numpy(array) for name, array in named.items()}

    @cached_property
    def _pad_token_id(self) -> int:
        from layertap.remote_model import RemoteModel

        return int(getattr(RemoteModel(self.client, self.model).config, "pad_token_id", 0))

    def _embedding_length(self) -> int:
        """The number of tokens at which the server cuts a text whose configured embedding is requested."""
        text = _FILLER * max(self.facts.max_tokens, 1)
        while len(text) <= _MAX_FILLER_CHARACTERS:
            try:
                result = self.client.encode(text, model=self.model, embeddings=True, truncation="end")
            except InvalidArgument:
                break
            if result.truncated_tokens:
                return result.token_count
            text *= 4
        return self.facts.max_tokens


class VectorEncoder(RemoteEncoder):
    """A served model that gives each text one vector. Subclasses have `encode`."""

    def __init__(
        self,
        address: str | Client,
        model: str,
        similarity_fn_name: SimilarityName,
        *,
        token: str | None,
        tls: TLSLike,
        timeout: float | None,
    ) -> None:
        super().__init__(address, model, token=token, tls=tls, timeout=timeout)
        self.similarity_fn_name = similarity_fn_name

    def encode(self, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """The vectors of the inputs."""
        raise NotImplementedError

    def get_embedding_dimension(self) -> int:
        """The size of a vector."""
        raise NotImplementedError

    def get_sentence_embedding_dimension(self) -> int:
        """As `get_embedding_dimension`, under its older name."""
        return self.get_embedding_dimension()

    def encode_query(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Any:
        """As `encode`, with the prompt "query" if the model has one and no other is given."""
        if prompt_name is None and prompt is None:
            prompt_name = query_prompt_name(self.facts.prompts)
        return self.encode(inputs, prompt_name, prompt, **options)

    def encode_document(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Any:
        """As `encode`, with the first of the prompts "document", "passage" and "corpus" that the model has,
        if no other is given."""
        if prompt_name is None and prompt is None:
            prompt_name = document_prompt_name(self.facts.prompts)
        return self.encode(inputs, prompt_name, prompt, **options)

    @property
    def similarity_fn_name(self) -> SimilarityName:
        """The function of `similarity` and `similarity_pairwise`."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, name: SimilarityName) -> None:
        self._similarity_fn_name = similarity_name(name)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(N, M): the similarity of each of N vectors with each of M, arrays or tensors. A torch tensor if
        torch is installed, otherwise a numpy array."""
        return similarity(self.similarity_fn_name, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(N,): the similarity of each of N vectors with the one at the same place. As for `similarity`, a
        tensor or an array."""
        return similarity_pairwise(self.similarity_fn_name, embeddings1, embeddings2)


def query_prompt_name(prompts: Mapping[str, str]) -> str | None:
    """The name of the prompt for queries, of those that are configured with a model."""
    return "query" if "query" in prompts else None


def document_prompt_name(prompts: Mapping[str, str]) -> str | None:
    """As `query_prompt_name`, for documents."""
    return next((name for name in ("document", "passage", "corpus") if name in prompts), None)


def check_call(batch_size: object) -> None:
    """Checks the size of a batch, which is otherwise not used: the server makes its own batches."""
    _arguments.whole_number("batch_size", batch_size, 1, (1 << 31) - 1)


def listed(inputs: Any) -> list[Any]:
    """A list of the inputs, from any iterable."""
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist()
    _arguments.check_inputs(inputs)
    return list(inputs)


def as_input(value: Any) -> Any:
    """An input for the client; a list or tuple of two texts is a pair."""
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(one, str) for one in value):
        return Pair(*value)
    if isinstance(value, np.str_):
        return str(value)
    return value


def as_inputs(values: Sequence[Any]) -> list[Any]:
    """As `as_input`, for each of several inputs."""
    return [value if type(value) is str else as_input(value) for value in values]

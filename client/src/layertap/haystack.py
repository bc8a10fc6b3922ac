"""Embedders for Haystack: `pip install 'layertap[haystack]'`."""

# Without `from __future__ import annotations`: Haystack reads the types of `run` where they are objects.

from dataclasses import replace
from typing import Any, TypeVar

from layertap import _arguments
from layertap._client import DEFAULT_ADDRESS
from layertap._extras import missing
from layertap._text_vectors import TOKEN_VARIABLE, Role, TextVectors, VectorSettings, plain_tls, tls_of
from layertap._transport import TLS
from layertap._types import TruncationName

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.utils import Secret
except ModuleNotFoundError as error:
    raise missing(error, __name__, "haystack", "haystack-ai", "haystack") from error

__all__ = ["LayertapDocumentEmbedder", "LayertapTextEmbedder"]

_Embedder = TypeVar("_Embedder", bound="_EmbedderBase")


class _EmbedderBase:
    """What both embedders share: the connection, and how they are written down."""

    _role: Role

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        model: str = "",
        *,
        token: Secret | None = Secret.from_env_var(TOKEN_VARIABLE, strict=False),  # noqa: B008  (it is immutable)
        tls: TLS | bool | None = None,
        timeout: float | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncation: TruncationName | None = None,
        prompt: str | None = None,
    ) -> None:
        self.address = address
        self.model = model
        self.token = token
        self.tls = tls
        self.timeout = timeout
        self.dimensions = dimensions
        self.normalize = normalize
        self.truncation = truncation
        self.prompt = prompt
        self._vectors = TextVectors(self._settings())

    def _settings(self) -> VectorSettings:
        return VectorSettings(
            address=self.address,
            model=self.model,
            token=_no_token if self.token is None else self.token.resolve_value,
            tls=self.tls,
            timeout=self.timeout,
            dimensions=self.dimensions,
            normalize=self.normalize,
            truncation=self.truncation,
            query_prompt=self.prompt,
            document_prompt=self.prompt,
        )

    def _connected(self) -> TextVectors:
        """The connection for the attributes as they are now."""
        self._vectors = self._vectors.following(self._settings())
        return self._vectors

    def warm_up(self) -> None:
        """Opens the connection and asks for the model's prompts.

        Raises:
            LayertapError: the server does not answer, or has no such model.
        """
        self._connected().prepare(self._role)

    async def warm_up_async(self) -> None:
        """As `warm_up`, for `run_async`."""
        await self._connected().aprepare(self._role)

    def close(self) -> None:
        """Closes the connection. A later run opens another one."""
        self._vectors.close()

    async def close_async(self) -> None:
        """As `close`; closes that of the running event loop too."""
        await self._vectors.aclose()

    def _meta(self) -> dict[str, Any]:
        return {"model": self._vectors.model_name}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, with the same condition as `to_dict`."""
        if self.token is not None:
            self.token.to_dict()
        return self.__dict__

    def _to_dict(self, **others: Any) -> dict[str, Any]:
        return default_to_dict(  # type: ignore[no-any-return]
            self,
            address=self.address,
            model=self.model,
            token=None if self.token is None else self.token.to_dict(),
            tls=plain_tls(self.tls),
            timeout=self.timeout,
            dimensions=self.dimensions,
            normalize=self.normalize,
            truncation=self.truncation,
            prompt=self.prompt,
            **others,
        )

    @classmethod
    def from_dict(cls: type[_Embedder], data: dict[str, Any]) -> _Embedder:
        """The embedder of which `to_dict` made this form."""
        parameters = dict(data.get("init_parameters", {}))
        parameters["tls"] = tls_of(parameters.get("tls"))
        if isinstance(token := parameters.get("token"), dict):
            parameters["token"] = Secret.from_dict(token)
        return default_from_dict(cls, {**data, "init_parameters": parameters})  # type: ignore[no-any-return]


def _no_token() -> None:
    return None


@component
class LayertapTextEmbedder(_EmbedderBase):
    """Embeds a text, such as a query, by a served model.

    The text gets the prompt that is configured with the model for queries, as in `SentenceEncoder.encode_query`;
    `prompt` is a text to put before it instead, "" for none. `dimensions` keeps that many leading dimensions;
    `normalize` divides by the L2 norm, or not (None: as the model is configured). A text over the model's limit
    is rejected, unless `truncation` says at which end to cut it: "end" or "start". `timeout` is the time limit
    of a call in seconds (None: no limit). `address`, `model` and `tls` are as in `SentenceEncoder`, but `tls`
    is True or a `TLS`. `token` is sent with every call; the default is that of the environment variable
    LAYERTAP_TOKEN, if it is set.

    Example:
        >>> LayertapTextEmbedder("127.0.0.1:50051").run("a query")["embedding"]

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    _role: Role = "query"

    def to_dict(self) -> dict[str, Any]:
        """A form that YAML knows. Of the token, it has the name of the environment variable.

        Raises:
            ValueError: `token` is a secret that holds the token itself.
        """
        return self._to_dict()

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """`embedding`: the vector of the text; `meta`: the name of the model.

        Raises:
            LayertapError: the call failed.
        """
        return {"embedding": self._connected().embed_one(text, self._role), "meta": self._meta()}

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str) -> dict[str, Any]:
        """As `run`, on the event loop."""
        return {"embedding": await self._connected().aembed_one(text, self._role), "meta": self._meta()}


@component
class LayertapDocumentEmbedder(_EmbedderBase):
    """Embeds documents by a served model.

    The text of a document is its `meta_fields_to_embed` and its content, joined by `embedding_separator`. It
    gets the prompt that is configured with the model for documents, as in `SentenceEncoder.encode_document`.
    `progress_bar` shows a bar. All documents are sent in one call, and the server makes its own batches. The
    other arguments are those of `LayertapTextEmbedder`.

    Example:
        >>> LayertapDocumentEmbedder("127.0.0.1:50051").run([Document(content="a text")])["documents"]

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    _role: Role = "document"

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        model: str = "",
        *,
        token: Secret | None = Secret.from_env_var(TOKEN_VARIABLE, strict=False),  # noqa: B008
        tls: TLS | bool | None = None,
        timeout: float | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncation: TruncationName | None = None,
        prompt: str | None = None,
        progress_bar: bool = True,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        # `super()` would not do: `component` makes another class of this one.
        _EmbedderBase.__init__(
            self,
            address,
            model,
            token=token,
            tls=tls,
            timeout=timeout,
            dimensions=dimensions,
            normalize=normalize,
            truncation=truncation,
            prompt=prompt,
        )
        self.progress_bar = progress_bar
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator

    def to_dict(self) -> dict[str, Any]:
        """As `LayertapTextEmbedder.to_dict`."""
        return self._to_dict(
            progress_bar=self.progress_bar,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
        )

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """`documents`: copies of the documents with their embeddings; `meta`: the name of the model.

        Raises:
            LayertapError: the call failed; `input_index` is the index of the document that caused it, or None.
        """
        vectors = self._connected().embed(self._texts(documents), self._role, self.progress_bar)
        return self._embedded(documents, vectors)

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """As `run`, on the event loop."""
        vectors = await self._connected().aembed(self._texts(documents), self._role, self.progress_bar)
        return self._embedded(documents, vectors)

    def _texts(self, documents: list[Document]) -> list[str]:
        if not isinstance(documents, list) or not all(isinstance(one, Document) for one in documents):
            raise _arguments.wrong_type("documents", documents, "give a list of Documents")
        return [self._text(document) for document in documents]

    def _text(self, document: Document) -> str:
        fields = [document.meta.get(name) for name in self.meta_fields_to_embed]
        parts = [str(value) for value in fields if value is not None]
        return self.embedding_separator.join([*parts, document.content or ""])

    def _embedded(self, documents: list[Document], vectors: list[list[float]]) -> dict[str, Any]:
        embedded = [replace(one, embedding=vector) for one, vector in zip(documents, vectors, strict=True)]
        return {"documents": embedded, "meta": self._meta() if documents else {}}

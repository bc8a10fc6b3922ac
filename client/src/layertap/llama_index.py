"""An embedding model for LlamaIndex: `pip install 'layertap[llama-index]'`."""

from __future__ import annotations

from typing import Any

from layertap._client import DEFAULT_ADDRESS
from layertap._extras import missing
from layertap._text_vectors import TextVectors, Token, VectorSettings, plain_tls, tls_of
from layertap._transport import TLS
from layertap._types import TruncationName

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import (
        Field,
        PrivateAttr,
        SecretStr,
        field_serializer,
        field_validator,
    )
except ModuleNotFoundError as error:
    raise missing(error, __name__, "llama_index", "llama-index-core", "llama-index") from error

__all__ = ["LayertapEmbedding"]


class LayertapEmbedding(BaseEmbedding):
    """The embeddings of a served model as LlamaIndex's `BaseEmbedding`.

    Queries and texts get the prompts that are configured with the model for queries and documents, as in
    `SentenceEncoder.encode_query` and `encode_document`; `query_prompt` and `document_prompt` are texts to put
    before them instead, "" for none. `dimensions` keeps that many leading dimensions; `normalize` divides by
    the L2 norm, or not (None: as the model is configured). Texts over the model's limit are rejected, unless
    `truncation` says at which end to cut them: "end" or "start". `timeout` is the time limit of a call in
    seconds (None: no limit). `address`, `model_name` and `tls` are as `address`, `model` and `tls` in
    `SentenceEncoder`, but `tls` is True or a `TLS`. The server makes its own batches: `embed_batch_size` is
    how many texts a call has. Other arguments are those of `BaseEmbedding`.

    `token` is sent with every call; None is the one in the environment variable LAYERTAP_TOKEN, if it is set.
    A given token is in neither `to_dict` nor a pickle. The first call opens the connection.

    Example:
        >>> index = VectorStoreIndex(nodes, embed_model=LayertapEmbedding("127.0.0.1:50051"))

    Raises:
        ValueError: an argument is invalid; the message names it.
    """

    address: str = Field(default=DEFAULT_ADDRESS, description='The address of the server: "host:port".')
    model_name: str = Field(
        default="", description="The name of a served model; empty: the server's default."
    )
    tls: Any = Field(default=None, description="True for TLS, or a layertap.TLS with files.")
    timeout: float | None = Field(default=None, description="The time limit of a call in seconds.")
    dimensions: int | None = Field(default=None, description="How many leading dimensions to keep.")
    normalize: bool | None = Field(default=None, description="Whether to divide by the L2 norm.")
    truncation: TruncationName | None = Field(default=None, description="At which end to cut long texts.")
    query_prompt: str | None = Field(default=None, description="A text to put before each query.")
    document_prompt: str | None = Field(default=None, description="A text to put before each document.")
    embed_batch_size: int = Field(default=1024, description="How many texts a call has.", gt=0, le=2048)

    _token: Token = PrivateAttr()
    _vectors: TextVectors = PrivateAttr()

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        model_name: str = "",
        *,
        token: SecretStr | str | None = None,
        tls: TLS | bool | None = None,
        timeout: float | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncation: TruncationName | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__(
            address=address,
            model_name=model_name,
            tls=tls,
            timeout=timeout,
            dimensions=dimensions,
            normalize=normalize,
            truncation=truncation,
            query_prompt=query_prompt,
            document_prompt=document_prompt,
            **others,
        )
        self._token = Token(token.get_secret_value() if isinstance(token, SecretStr) else token)
        self._vectors = TextVectors(self._settings())

    @field_validator("tls", mode="before")
    @classmethod
    def _read_tls(cls, value: Any) -> Any:
        return tls_of(value)

    @field_serializer("tls")
    def _write_tls(self, value: Any) -> Any:
        return plain_tls(value)

    @classmethod
    def class_name(cls) -> str:
        """The name of the class in serialized forms."""
        return "LayertapEmbedding"

    def _settings(self) -> VectorSettings:
        return VectorSettings(
            address=self.address,
            model=self.model_name,
            token=self._token,
            tls=self.tls,
            timeout=self.timeout,
            dimensions=self.dimensions,
            normalize=self.normalize,
            truncation=self.truncation,
            query_prompt=self.query_prompt,
            document_prompt=self.document_prompt,
        )

    def _connected(self) -> TextVectors:
        """The connection for the fields as they are now: LlamaIndex allows to set them."""
        self._vectors = self._vectors.following(self._settings())
        return self._vectors

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._connected().embed_one(query, "query")

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await self._connected().aembed_one(query, "query")

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._connected().embed_one(text, "document")

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await self._connected().aembed_one(text, "document")

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._connected().embed(texts, "document")

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await self._connected().aembed(texts, "document")

    def close(self) -> None:
        """Closes the connection. A later call opens another one."""
        self._vectors.close()

    async def aclose(self) -> None:
        """As `close`; closes that of the running event loop too."""
        await self._vectors.aclose()

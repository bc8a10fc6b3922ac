"""Embeddings for LangChain: `pip install 'layertap[langchain]'`."""

from __future__ import annotations

from layertap._client import DEFAULT_ADDRESS
from layertap._extras import missing
from layertap._text_vectors import TextVectors, Token, VectorSettings
from layertap._transport import TLSLike
from layertap._types import TruncationName

try:
    from langchain_core.embeddings import Embeddings
    from pydantic import SecretStr
except ModuleNotFoundError as error:
    raise missing(error, __name__, "langchain_core", "langchain-core", "langchain") from error

__all__ = ["LayertapEmbeddings"]


class LayertapEmbeddings(Embeddings):
    """The embeddings of a served model as LangChain's `Embeddings`.

    Queries and documents get the prompts that are configured with the model for them, as in
    `SentenceEncoder.encode_query` and `encode_document`; `query_prompt` and `document_prompt` are texts to put
    before them instead, "" for none. `dimensions` keeps that many leading dimensions; `normalize` divides by
    the L2 norm, or not (None: as the model is configured). Texts over the model's limit are rejected, unless
    `truncation` says at which end to cut them: "end" or "start". `timeout` is the time limit of a call in
    seconds (None: no limit). `address`, `model` and `tls` are as in `SentenceEncoder`.

    `token` is sent with every call; None is the one in the environment variable LAYERTAP_TOKEN, if it is set.
    A given token is not pickled. The first call opens the connection.

    Example:
        >>> embeddings = LayertapEmbeddings("127.0.0.1:50051")
        >>> store = InMemoryVectorStore.from_texts(texts, embeddings)

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        model: str = "",
        *,
        token: SecretStr | str | None = None,
        tls: TLSLike = None,
        timeout: float | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncation: TruncationName | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
    ) -> None:
        self._vectors = TextVectors(
            VectorSettings(
                address=address,
                model=model,
                token=Token(token.get_secret_value() if isinstance(token, SecretStr) else token),
                tls=tls,
                timeout=timeout,
                dimensions=dimensions,
                normalize=normalize,
                truncation=truncation,
                query_prompt=query_prompt,
                document_prompt=document_prompt,
            )
        )

    def __repr__(self) -> str:
        settings = self._vectors.settings
        return f"{type(self).__name__}({settings.address!r}, {settings.model!r})"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each document. They are streamed, so that there may be any number.

        Raises:
            LayertapError: the call failed; `input_index` is the index of the text that caused it, or None.
        """
        return self._vectors.embed(texts, "document")

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query.

        Raises:
            LayertapError: the call failed.
        """
        return self._vectors.embed_one(text, "query")

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """As `embed_documents`, on the event loop."""
        return await self._vectors.aembed(texts, "document")

    async def aembed_query(self, text: str) -> list[float]:
        """As `embed_query`, on the event loop."""
        return await self._vectors.aembed_one(text, "query")

    def close(self) -> None:
        """Closes the connection. A later call opens another one."""
        self._vectors.close()

    async def aclose(self) -> None:
        """As `close`; closes that of the running event loop too."""
        await self._vectors.aclose()

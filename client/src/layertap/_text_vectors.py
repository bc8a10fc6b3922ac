"""Vectors of queries and documents, for the classes that other libraries embed texts with."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from layertap import _arguments
from layertap._aio import AsyncClient
from layertap._client import DEFAULT_ADDRESS
from layertap._embed import EmbedOptions, embed_request
from layertap._encoders.base import document_prompt_name, query_prompt_name
from layertap._encoders.dense import SentenceEncoder
from layertap._transport import TLS, TLSLike
from layertap._types import Array, TruncationName

Role: TypeAlias = Literal["query", "document"]
TOKEN_VARIABLE = "LAYERTAP_TOKEN"  # as of the command


class Token:
    """The token that was given, or else the one in the environment variable LAYERTAP_TOKEN, if it is set.

    A given token is neither in the `repr` nor in a pickle: unpickled, only the environment counts.
    """

    def __init__(self, given: str | None = None) -> None:
        self.__given = _arguments.token(given)

    def __call__(self) -> str | None:
        return self.__given or token_of(TOKEN_VARIABLE)

    def __reduce__(self) -> tuple[type[Token], tuple[()]]:
        return Token, ()

    def __deepcopy__(self, memo: object) -> Token:
        return self


def token_of(variable: str) -> str | None:
    """The token in an environment variable; None if it is not set, or empty."""
    return os.environ.get(variable) or None


def plain_tls(tls: TLSLike) -> Any:
    """`tls` in a form that JSON and YAML know: the paths of the files, not their contents.

    Raises:
        ValueError: it holds credentials themselves, which cannot be written down.
    """
    if tls is None or isinstance(tls, bool):
        return tls
    if not isinstance(tls, TLS):
        raise ValueError("tls: gRPC channel credentials cannot be serialized; give True, or a TLS with files")
    paths = {name: getattr(tls, name) for name in ("ca", "certificate", "key")}
    named = {name: None if path is None else os.fspath(path) for name, path in paths.items()}
    return {**named, "server_name": tls.server_name}


def tls_of(plain: Any) -> Any:
    """The `tls` of which `plain_tls` made this form; anything else as it is."""
    return TLS(**plain) if isinstance(plain, dict) else plain


@dataclass(frozen=True)
class VectorSettings:
    """Which vectors are asked for, of which server. `token` is called when a connection is opened.

    A prompt of None is the one that is configured with the model for queries or documents, if there is one; an
    empty prompt is none.

    Raises:
        TypeError, ValueError: a setting is invalid; the message names it.
    """

    address: str = DEFAULT_ADDRESS
    model: str = ""
    token: Callable[[], str | None] = field(default_factory=Token, repr=False)
    tls: TLSLike = None
    timeout: float | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    truncation: TruncationName | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None

    def __post_init__(self) -> None:
        _arguments.address(self.address)
        _arguments.seconds("timeout", self.timeout)
        for name in ("query_prompt", "document_prompt"):
            _arguments.optional_text(name, getattr(self, name))
        embed_request(**self.options())

    def options(self, prompt: str = "", prompt_name: str = "") -> EmbedOptions:
        """The options of `embed`."""
        return embed_options(
            self.model, self.dimensions, self.normalize, self.truncation, prompt, prompt_name
        )


def embed_options(
    model: str,
    dimensions: int | None,
    normalize: bool | None,
    truncation: TruncationName | None,
    prompt: str,
    prompt_name: str,
) -> EmbedOptions:
    """The options of `embed`. Unlike there, `dimensions` is None for all, and 0 is refused."""
    if dimensions is not None:
        dimensions = _arguments.whole_number("dimensions", dimensions, 1, (1 << 31) - 1)
    return {
        "model": _arguments.optional_text("model", model),
        "dimensions": dimensions or 0,
        "normalize": normalize,
        "truncation": truncation,
        "prompt": prompt,
        "prompt_name": prompt_name,
    }


class TextVectors:
    """A connection to a server, which is opened by the first call, and the vectors of texts. Thread-safe.

    Coroutines may run in any number of event loops, one after the other as well: each loop has a client of
    its own. A copy or a pickle has the settings alone.
    """

    def __init__(self, settings: VectorSettings) -> None:
        self.settings = settings
        # Guards what follows. It is not held during a call.
        self._lock = threading.Lock()
        self._encoder: SentenceEncoder | None = None
        self._async_clients: dict[asyncio.AbstractEventLoop, AsyncClient] = {}
        self._prompts: dict[Role, tuple[str, str]] = {}

    def __reduce__(self) -> tuple[type[TextVectors], tuple[VectorSettings]]:
        return TextVectors, (self.settings,)

    def following(self, settings: VectorSettings) -> TextVectors:
        """This connection, or another one if its settings are not these."""
        return self if self.settings == settings else TextVectors(settings)

    def embed(self, texts: Sequence[str], role: Role, show_progress_bar: bool = False) -> list[list[float]]:
        """A vector of D numbers for each text. The texts are streamed, so that there may be any number.

        Raises:
            LayertapError: the call failed; `input_index` is the index of the text that caused it, or None.
            TypeError: `texts` is not a list of texts.
        """
        _arguments.check_inputs(texts)
        if not len(texts):
            return []
        options = self.settings.options(*self._prompt(role))
        vectors: Array = self._opened().client.embed(
            texts,
            show_progress_bar=show_progress_bar,
            timeout=self.settings.timeout,
            **options,
        )
        return vectors.tolist()  # type: ignore[no-any-return]

    async def aembed(
        self, texts: Sequence[str], role: Role, show_progress_bar: bool = False
    ) -> list[list[float]]:
        """As `embed`, on the running event loop."""
        _arguments.check_inputs(texts)
        if not len(texts):
            return []
        options = self.settings.options(*await self.aprepare(role))
        vectors: Array = await self._async_client().embed(
            texts,
            show_progress_bar=show_progress_bar,
            timeout=self.settings.timeout,
            **options,
        )
        return vectors.tolist()  # type: ignore[no-any-return]

    def embed_one(self, text: str, role: Role) -> list[float]:
        """As `embed`, for one text."""
        return self.embed([_arguments.text("text", text)], role)[0]

    async def aembed_one(self, text: str, role: Role) -> list[float]:
        """As `embed_one`, on the running event loop."""
        return (await self.aembed([_arguments.text("text", text)], role))[0]

    @property
    def model_name(self) -> str:
        """The name of the served model."""
        return self._opened().facts.name

    def prepare(self, role: Role) -> None:
        """Opens the connection and asks for the model's prompts, unless that is done already."""
        self._prompt(role)

    async def aprepare(self, role: Role) -> tuple[str, str]:
        """As `prepare`; returns the `prompt` and the `prompt_name` of a request."""
        if role in self._prompts:
            return self._prompts[role]
        return await asyncio.to_thread(self._prompt, role)

    def _prompt(self, role: Role) -> tuple[str, str]:
        if role not in self._prompts:
            encoder = self._opened()
            settings, prompts = self.settings, encoder.prompts
            if role == "query":
                given, name = settings.query_prompt, query_prompt_name(prompts)
            else:
                given, name = settings.document_prompt, document_prompt_name(prompts)
            self._prompts[role] = encoder._prompt(given, name)
        return self._prompts[role]

    def _opened(self) -> SentenceEncoder:
        with self._lock:
            if self._encoder is None:
                settings = self.settings
                self._encoder = SentenceEncoder(
                    settings.address,
                    settings.model,
                    token=settings.token(),
                    tls=settings.tls,
                    timeout=settings.timeout,
                )
            return self._encoder

    def _async_client(self) -> AsyncClient:
        """The client of the running event loop."""
        loop, settings = asyncio.get_running_loop(), self.settings
        with self._lock:
            if loop not in self._async_clients:
                for other in [one for one in self._async_clients if one.is_closed()]:
                    del self._async_clients[other]
                self._async_clients[loop] = AsyncClient(
                    settings.address, token=settings.token(), tls=settings.tls
                )
            return self._async_clients[loop]

    def close(self) -> None:
        """Closes the connection of calls that are no coroutines. A later call opens another one."""
        with self._lock:
            encoder, self._encoder = self._encoder, None
            self._prompts.clear()
        if encoder is not None:
            encoder.close()

    async def aclose(self) -> None:
        """As `close`, and closes the connection of the running event loop too."""
        with self._lock:
            client = self._async_clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()
        self.close()

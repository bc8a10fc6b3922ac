"""What the classes for other libraries share, without these libraries: prompts, connections, tokens, imports."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from layertap import TLS, Client, InvalidArgument, Unavailable
from layertap._text_vectors import TextVectors, Token, VectorSettings, plain_tls, tls_of
from layertap.v1 import encoder_pb2 as pb

from .fake_server import FakeEncoder, serving

TEXTS = ["ab", "abcdef", "a"]
EXTRAS = {
    "langchain": ("langchain_core", "langchain"),
    "llama_index": ("llama_index", "llama-index"),
    "haystack": ("haystack", "haystack"),
    "sklearn": ("sklearn", "sklearn"),
}


@pytest.fixture
def vectors(address: str) -> TextVectors:
    return TextVectors(VectorSettings(address=address))


class Prompted(FakeEncoder):
    """Has these prompts, and keeps the `prompt` and the `prompt_name` of each request."""

    def __init__(self, prompts: dict[str, str]) -> None:
        super().__init__()
        self.prompts = prompts
        self.asked: list[tuple[str, str]] = []

    def _model(self, name: str) -> pb.Model:
        model = super()._model(name)
        model.prompts.clear()
        model.prompts.update(self.prompts)
        return model

    def _results(self, request: pb.EncodeRequest, context: Any) -> list[pb.EncodeResult]:
        self.asked.append((request.prompt, request.prompt_name))
        return super()._results(request, context)


@pytest.mark.parametrize(
    ("prompts", "given", "query", "document"),
    [
        ({}, {}, ("", ""), ("", "")),
        ({"query": "q: ", "passage": "p: "}, {}, ("", "query"), ("", "passage")),
        ({"query": "q: ", "corpus": "c", "document": "d"}, {}, ("", "query"), ("", "document")),
        ({"query": "q: "}, {"query_prompt": "find: "}, ("find: ", ""), ("", "")),
        ({"query": "q: "}, {"document_prompt": "text: "}, ("", "query"), ("text: ", "")),
        ({"query": "q: ", "none": ""}, {"query_prompt": ""}, ("", "none"), ("", "")),
        ({}, {"query_prompt": "", "document_prompt": ""}, ("", ""), ("", "")),
    ],
)
def test_prompts(
    prompts: dict[str, str], given: dict[str, str], query: tuple[str, str], document: tuple[str, str]
) -> None:
    with serving(fake := Prompted(prompts)) as address:
        vectors = TextVectors(VectorSettings(address=address, **given))
        vectors.embed_one("a", "query")
        vectors.embed(["a"], "document")
        asyncio.run(vectors.aembed_one("a", "query"))
        asyncio.run(vectors.aembed(["a"], "document"))
    assert fake.asked == [query, document, query, document]


def test_the_model_is_described_once(vectors: TextVectors, fake: FakeEncoder) -> None:
    for _ in range(3):
        vectors.embed(TEXTS, "document")
        vectors.embed_one("a", "query")
        asyncio.run(vectors.aembed_one("a", "query"))
    assert [rpc for rpc, _ in fake.calls].count("GetModel") == 1


def test_nothing_is_opened_before_the_first_call_nor_for_no_texts(fake: FakeEncoder, address: str) -> None:
    vectors = TextVectors(VectorSettings(address=address))
    assert vectors.embed([], "document") == asyncio.run(vectors.aembed([], "document")) == []
    assert fake.calls == []


def test_any_number_of_event_loops(vectors: TextVectors, address: str) -> None:
    with Client(address) as client:
        expected = client.embed(TEXTS).tolist()
    assert vectors.embed(TEXTS, "document") == expected

    async def twice() -> None:
        both = await asyncio.gather(vectors.aembed(TEXTS, "document"), vectors.aembed(TEXTS, "document"))
        assert both == [expected, expected]

    for _ in range(4):
        asyncio.run(twice())
    # Those of closed loops are dropped when the next one comes.
    assert len(vectors._async_clients) == 1


async def test_close(vectors: TextVectors) -> None:
    await vectors.aembed_one("a", "query")
    client, (async_client,) = vectors._opened().client, vectors._async_clients.values()
    await vectors.aclose()
    assert client._calls.connections.is_closed
    assert async_client._calls.connections.is_closed
    assert vectors.embed_one("a", "query") == await vectors.aembed_one("a", "query")
    await vectors.aclose()
    await vectors.aclose()


def test_copies_and_pickles_have_the_settings_alone(vectors: TextVectors) -> None:
    expected = vectors.embed_one("a", "query")
    for again in (copy.deepcopy(vectors), pickle.loads(pickle.dumps(vectors))):
        assert (again.settings.address, again._encoder) == (vectors.settings.address, None)
        assert again.embed_one("a", "query") == expected


def test_other_settings_are_another_connection(vectors: TextVectors) -> None:
    settings = vectors.settings
    assert vectors.following(copy.copy(settings)) is vectors
    other = vectors.following(VectorSettings(address=settings.address, dimensions=2))
    assert len(other.embed_one("a", "query")) == 2


def test_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERTAP_TOKEN", raising=False)
    given = Token("secret")
    assert (given(), Token()()) == ("secret", None)
    assert "secret" not in repr(given)
    assert b"secret" not in pickle.dumps(given)
    assert (pickle.loads(pickle.dumps(given))(), copy.deepcopy(given)()) == (None, "secret")
    monkeypatch.setenv("LAYERTAP_TOKEN", "")
    assert Token()() is None
    monkeypatch.setenv("LAYERTAP_TOKEN", "of the environment")
    assert (given(), Token()()) == ("secret", "of the environment")
    assert "secret" not in repr(VectorSettings(token=given))
    with pytest.raises(ValueError, match="token is empty"):
        Token("")


def test_tls_in_plain_form() -> None:
    tls = TLS(ca=Path("ca.pem"), certificate="c.pem", key="k.pem", server_name="somewhere")
    plain = plain_tls(tls)
    assert plain == {"ca": "ca.pem", "certificate": "c.pem", "key": "k.pem", "server_name": "somewhere"}
    assert plain_tls(tls_of(plain)) == plain
    assert [tls_of(plain_tls(one)) for one in (None, True, False)] == [None, True, False]
    with pytest.raises(ValueError, match="cannot be serialized"):
        plain_tls(grpc.ssl_channel_credentials())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("address", 3),
        ("model", 3),
        ("timeout", -1),
        ("dimensions", 0),
        ("normalize", "yes"),
        ("truncation", "middle"),
        ("query_prompt", 3),
        ("document_prompt", b"p"),
    ],
)
def test_wrong_settings_are_named_at_once(setting: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=setting):
        VectorSettings(**{setting: value})


def test_errors(vectors: TextVectors) -> None:
    with pytest.raises(InvalidArgument) as caught:
        vectors.embed(["a", "poison"], "document")
    assert caught.value.input_index == 1
    with pytest.raises(TypeError, match="it is one input"):
        vectors.embed("a text", "document")
    with pytest.raises(TypeError, match="text is a list"):
        vectors.embed_one(["a"], "query")  # type: ignore[arg-type]
    nowhere = TextVectors(VectorSettings(address="unix:/nowhere"))
    for _ in range(2):
        with pytest.raises(Unavailable):
            nowhere.prepare("query")


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_package_is_named_with_its_extra(module: str) -> None:
    package, extra = EXTRAS[module]
    code = f"import sys; sys.modules[{package!r}] = None; import layertap.{module}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"pip install 'layertap[{extra}]'" in ended.stderr.splitlines()[-1]

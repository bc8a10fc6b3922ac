"""`layertap.langchain` with the real langchain-core: its own standard tests, a vector store, prompts, secrets."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("langchain_core", reason="langchain-core is not installed: make test-ecosystem")
pytest.importorskip("langchain_tests", reason="langchain-tests is not installed: make test-ecosystem")

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from pydantic import SecretStr

from layertap import Client, InvalidArgument, Unauthenticated
from layertap.langchain import LayertapEmbeddings

from .conftest import KeepingEncoder

TEXTS = ["ab", "abcdef", "zzzz"]


@pytest.fixture
def embeddings(address: str) -> Iterator[LayertapEmbeddings]:
    embeddings = LayertapEmbeddings(address)
    yield embeddings
    embeddings.close()


class TestStandardUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return LayertapEmbeddings


class TestStandardIntegration(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _server(self, address: str) -> None:
        self.address = address

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return LayertapEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"address": self.address}


def test_vectors_are_those_of_the_client(embeddings: LayertapEmbeddings, address: str) -> None:
    with Client(address) as client:
        expected = client.embed(TEXTS)
    assert embeddings.embed_documents(TEXTS) == expected.tolist()
    assert embeddings.embed_query("ab") == expected[0].tolist()
    assert embeddings.embed_documents([]) == []
    many = [str(number) for number in range(1100)]
    assert len(embeddings.embed_documents(many)) == 1100


def test_queries_and_documents_get_their_prompts(
    embeddings: LayertapEmbeddings, fake: KeepingEncoder, address: str
) -> None:
    embeddings.embed_query("a")
    embeddings.embed_documents(["a"])
    asyncio.run(embeddings.aembed_query("a"))
    asyncio.run(embeddings.aembed_documents(["a"]))
    assert fake.prompts_asked == [("", "query"), ("", "passage")] * 2
    fake.requests.clear()
    own = LayertapEmbeddings(address, query_prompt="find: ", document_prompt="")
    fake.prompts["none"] = ""
    own.embed_query("a")
    own.embed_documents(["a"])
    assert fake.prompts_asked == [("find: ", ""), ("", "none")]


def test_options_reach_the_server(fake: KeepingEncoder, address: str) -> None:
    embeddings = LayertapEmbeddings(address, "fake", dimensions=2, normalize=False, truncation="end")
    assert len(embeddings.embed_query("ab")) == 2
    (request,) = fake.requests
    (spec,) = request.outputs.embeddings
    assert (request.model, spec.dimensions, spec.HasField("normalize"), spec.normalize) == (
        "fake",
        2,
        True,
        False,
    )
    assert request.truncation


def test_a_vector_store(embeddings: LayertapEmbeddings) -> None:
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    ((document, score),) = store.similarity_search_with_score("abcdef", k=1)
    assert document.page_content == "abcdef"
    assert score == pytest.approx(1)
    assert store.as_retriever(search_kwargs={"k": 1}).invoke("zzzz")[0].page_content == "zzzz"


async def test_a_vector_store_on_the_event_loop(embeddings: LayertapEmbeddings) -> None:
    store = await InMemoryVectorStore.afrom_texts(TEXTS, embeddings)
    found = await asyncio.gather(*(store.asimilarity_search(text, k=1) for text in TEXTS))
    assert [one[0].page_content for one in found] == TEXTS
    await embeddings.aclose()


def test_errors_are_those_of_the_sdk(embeddings: LayertapEmbeddings) -> None:
    with pytest.raises(InvalidArgument) as caught:
        embeddings.embed_documents(["a", "poison"])
    assert caught.value.input_index == 1
    with pytest.raises(TypeError, match="it is one input"):
        embeddings.embed_documents("a text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text is a list: give a str"):
        embeddings.embed_query(["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dimensions=0"):
        LayertapEmbeddings(dimensions=0)
    with pytest.raises(ValueError, match="timeout=-1"):
        LayertapEmbeddings(timeout=-1)


@pytest.mark.parametrize("kind", [str, SecretStr])
def test_the_token_is_sent_but_not_shown(
    kind: type, fake: KeepingEncoder, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.token = "secret-of-mine"
    embeddings = LayertapEmbeddings(address, token=kind("secret-of-mine"))
    embeddings.embed_query("a")
    asyncio.run(copy.deepcopy(embeddings).aembed_query("a"))
    assert "secret" not in repr(embeddings)
    assert "secret" not in repr(vars(embeddings))
    pickled = pickle.dumps(embeddings)
    assert b"secret" not in pickled
    with pytest.raises(Unauthenticated):
        pickle.loads(pickled).embed_query("a")
    monkeypatch.setenv("LAYERTAP_TOKEN", "secret-of-mine")
    pickle.loads(pickled).embed_query("a")
    LayertapEmbeddings(address).embed_query("a")

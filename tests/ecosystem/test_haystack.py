"""`layertap.haystack` with the real haystack-ai: pipelines, sync and async, to YAML and back, secrets."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("haystack", reason="haystack-ai is not installed: make test-ecosystem")

import haystack
from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.core.errors import PipelineRuntimeError
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import Secret

from layertap import TLS, Client, InvalidArgument, Unauthenticated, Unavailable
from layertap.haystack import LayertapDocumentEmbedder, LayertapTextEmbedder

from .conftest import KeepingEncoder

TEXTS = ["ab", "abcdef", "zzzz"]
DOCUMENTS = [Document(content=text) for text in TEXTS]


@pytest.fixture
def embedder(address: str) -> Iterator[LayertapDocumentEmbedder]:
    embedder = LayertapDocumentEmbedder(address, progress_bar=False)
    yield embedder
    embedder.close()


@pytest.fixture
def text_embedder(address: str) -> Iterator[LayertapTextEmbedder]:
    embedder = LayertapTextEmbedder(address)
    yield embedder
    embedder.close()


def test_the_real_haystack_is_imported() -> None:
    import layertap.haystack

    assert Path(haystack.__file__).parent.name == "haystack"
    assert layertap.haystack.__file__ != haystack.__file__


def test_vectors_are_those_of_the_client(
    embedder: LayertapDocumentEmbedder, text_embedder: LayertapTextEmbedder, address: str
) -> None:
    with Client(address) as client:
        expected = client.embed(TEXTS).tolist()
    for reply in (embedder.run(DOCUMENTS), asyncio.run(embedder.run_async(DOCUMENTS))):
        assert [one.embedding for one in reply["documents"]] == expected
        assert [one.content for one in reply["documents"]] == TEXTS
        assert reply["meta"] == {"model": "fake"}
    for reply in (text_embedder.run("ab"), asyncio.run(text_embedder.run_async("ab"))):
        assert reply == {"embedding": expected[0], "meta": {"model": "fake"}}
    assert [one.embedding for one in DOCUMENTS] == [None] * 3  # copies are returned
    assert embedder.run([]) == {"documents": [], "meta": {}}


def test_texts_of_documents(embedder: LayertapDocumentEmbedder, fake: KeepingEncoder, address: str) -> None:
    documents = [
        Document(content="text", meta={"title": "T", "page": 3, "other": "no"}),
        Document(content=None, meta={"title": None}),
    ]
    embedder = LayertapDocumentEmbedder(
        address, meta_fields_to_embed=["title", "page"], embedding_separator=" | ", progress_bar=False
    )
    embedder.run(documents)
    assert [one.text for one in fake.requests[0].inputs] == ["T | 3 | text", ""]


def test_each_embedder_has_its_prompt(
    embedder: LayertapDocumentEmbedder,
    text_embedder: LayertapTextEmbedder,
    fake: KeepingEncoder,
    address: str,
) -> None:
    text_embedder.run("a")
    embedder.run(DOCUMENTS)
    asyncio.run(text_embedder.run_async("a"))
    asyncio.run(embedder.run_async(DOCUMENTS))
    assert fake.prompts_asked == [("", "query"), ("", "passage")] * 2
    fake.requests.clear()
    LayertapTextEmbedder(address, prompt="find: ").run("a")
    LayertapDocumentEmbedder(address, prompt="text: ", progress_bar=False).run(DOCUMENTS)
    assert fake.prompts_asked == [("find: ", ""), ("text: ", "")]


def test_attributes_that_are_set_count(text_embedder: LayertapTextEmbedder) -> None:
    assert len(text_embedder.run("a")["embedding"]) == 4
    text_embedder.dimensions = 2
    assert len(text_embedder.run("a")["embedding"]) == 2
    text_embedder.close()
    assert len(text_embedder.run("a")["embedding"]) == 2


def indexing(embedder: LayertapDocumentEmbedder, store: InMemoryDocumentStore) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("embedder", embedder)
    pipeline.add_component("writer", DocumentWriter(store))
    pipeline.connect("embedder.documents", "writer.documents")
    return pipeline


def querying(embedder: LayertapTextEmbedder, store: InMemoryDocumentStore) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("embedder", embedder)
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    return pipeline


def test_pipelines_to_yaml_and_back(
    embedder: LayertapDocumentEmbedder, text_embedder: LayertapTextEmbedder
) -> None:
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    first, second = indexing(embedder, store), querying(text_embedder, store)
    for again in (False, True):
        if again:
            written = second.dumps()
            second = Pipeline.loads(written, allowed_modules=["layertap.haystack"])
            assert second.dumps() == written
            assert (
                Pipeline.loads(first.dumps(), allowed_modules=["layertap.haystack"]).dumps() == first.dumps()
            )
        else:
            first.run({"embedder": {"documents": DOCUMENTS}})
        (found,) = second.run({"embedder": {"text": "abcdef"}})["retriever"]["documents"]
        assert found.content == "abcdef"
        reply = asyncio.run(second.run_async({"embedder": {"text": "zzzz"}}))
        assert reply["retriever"]["documents"][0].content == "zzzz"
    second.close()


def test_written_down_and_read(address: str, tmp_path: Path) -> None:
    tls = TLS(ca=str(tmp_path / "ca.pem"), server_name="somewhere")
    embedder = LayertapDocumentEmbedder(
        address,
        "fake",
        tls=tls,
        timeout=3.5,
        dimensions=2,
        normalize=True,
        truncation="end",
        prompt="p: ",
        progress_bar=False,
        meta_fields_to_embed=["title"],
        embedding_separator=" ",
    )
    again = LayertapDocumentEmbedder.from_dict(embedder.to_dict())
    assert type(again) is LayertapDocumentEmbedder
    for name in embedder.to_dict()["init_parameters"]:
        assert getattr(again, name) == getattr(embedder, name), name
    assert again.tls == tls
    text = LayertapTextEmbedder(address, dimensions=3)
    assert LayertapTextEmbedder.from_dict(text.to_dict()).to_dict() == text.to_dict()


def test_errors_are_those_of_the_sdk(
    embedder: LayertapDocumentEmbedder, text_embedder: LayertapTextEmbedder
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        embedder.run([*DOCUMENTS, Document(content="poison")])
    assert caught.value.input_index == 3
    with pytest.raises(TypeError, match="documents='a text': give a list of Documents"):
        embedder.run("a text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="give a list of Documents"):
        embedder.run(["a text"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="text is a list"):
        text_embedder.run(["a text"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dimensions=0"):
        LayertapTextEmbedder(dimensions=0)
    with pytest.raises(Unavailable):
        LayertapTextEmbedder("unix:/nowhere").warm_up()


def test_errors_of_pipelines_have_that_of_the_sdk_as_their_cause(text_embedder: LayertapTextEmbedder) -> None:
    pipeline = querying(text_embedder, InMemoryDocumentStore())
    with pytest.raises(PipelineRuntimeError, match=r"inputs\[0\]") as caught:
        pipeline.run({"embedder": {"text": "poison"}})
    assert isinstance(caught.value.__cause__, InvalidArgument)


def test_the_token_is_sent_but_not_shown(
    fake: KeepingEncoder, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.token = "secret-of-mine"
    embedder = LayertapTextEmbedder(address, token=Secret.from_token("secret-of-mine"))
    embedder.run("a")
    assert "secret-of-mine" not in repr(embedder)
    for write in (embedder.to_dict, lambda: pickle.dumps(embedder)):
        with pytest.raises(ValueError, match="Cannot serialize token-based secret"):
            write()
    monkeypatch.setenv("LAYERTAP_TOKEN", "secret-of-mine")
    of_environment: Any = LayertapTextEmbedder(address)
    of_environment.run("a")
    pickled = pickle.dumps(of_environment)
    for form in (str(of_environment.to_dict()), repr(of_environment), repr(pickled)):
        assert "secret-of-mine" not in form
    pickle.loads(pickled).run("a")
    copy.deepcopy(of_environment).run("a")
    with pytest.raises(Unauthenticated):
        LayertapTextEmbedder(address, token=None).run("a")

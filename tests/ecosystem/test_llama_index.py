"""`layertap.llama_index` with the real llama-index-core: sync, async and batches, an index in memory, secrets."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from typing import Any

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed: make test-ecosystem")

from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from pydantic import SecretStr, ValidationError

from layertap import TLS, Client, InvalidArgument, Unauthenticated
from layertap.llama_index import LayertapEmbedding

from .conftest import KeepingEncoder

TEXTS = ["ab", "abcdef", "zzzz"]


@pytest.fixture
def embedding(address: str) -> LayertapEmbedding:
    return LayertapEmbedding(address)


def test_vectors_are_those_of_the_client(embedding: LayertapEmbedding, address: str) -> None:
    with Client(address) as client:
        expected = client.embed(TEXTS).tolist()
    assert embedding.get_text_embedding_batch(TEXTS) == expected
    assert embedding.get_text_embedding("abcdef") == expected[1]
    assert embedding.get_query_embedding("ab") == expected[0]
    assert embedding.get_text_embedding_batch([]) == []

    async def both() -> list[Any]:
        return [
            await embedding.aget_text_embedding_batch(TEXTS),
            await embedding.aget_text_embedding("abcdef"),
            await embedding.aget_query_embedding("ab"),
        ]

    assert asyncio.run(both()) == [expected, expected[1], expected[0]]
    assert asyncio.run(both()) == [expected, expected[1], expected[0]]  # in another event loop


def test_batches_and_their_size(address: str, fake: KeepingEncoder) -> None:
    small = LayertapEmbedding(address, embed_batch_size=2)
    assert len(small.get_text_embedding_batch(TEXTS)) == 3
    assert [len(request.inputs) for request in fake.requests] == [2, 1]
    assert LayertapEmbedding(address).embed_batch_size == 1024


def test_queries_and_texts_get_their_prompts(
    embedding: LayertapEmbedding, fake: KeepingEncoder, address: str
) -> None:
    embedding.get_query_embedding("a")
    embedding.get_text_embedding("a")
    embedding.get_text_embedding_batch(["a"])
    asyncio.run(embedding.aget_query_embedding("a"))
    assert fake.prompts_asked == [("", "query"), ("", "passage"), ("", "passage"), ("", "query")]
    fake.requests.clear()
    own = LayertapEmbedding(address, query_prompt="find: ", document_prompt="text: ")
    own.get_query_embedding("a")
    own.get_text_embedding("a")
    assert fake.prompts_asked == [("find: ", ""), ("text: ", "")]


def test_fields_that_are_set_count(embedding: LayertapEmbedding, address: str) -> None:
    assert len(embedding.get_query_embedding("a")) == 4
    embedding.dimensions = 2
    assert len(embedding.get_query_embedding("a")) == 2
    copied = embedding.model_copy(update={"dimensions": 3})
    assert len(copied.get_query_embedding("a")) == 3
    assert len(embedding.get_query_embedding("a")) == 2
    assert len(copy.deepcopy(embedding).get_query_embedding("a")) == 2


def test_an_index_in_memory(embedding: LayertapEmbedding) -> None:
    nodes = [TextNode(text=text, id_=text) for text in TEXTS]
    index = VectorStoreIndex(nodes, embed_model=embedding)
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("abcdef")
    assert found.node.node_id == "abcdef"
    assert found.score == pytest.approx(1)
    (found,) = asyncio.run(index.as_retriever(similarity_top_k=1).aretrieve("zzzz"))
    assert found.node.node_id == "zzzz"


def test_a_pipeline_and_a_cache(embedding: LayertapEmbedding, fake: KeepingEncoder) -> None:
    nodes = IngestionPipeline(transformations=[embedding]).run(nodes=[TextNode(text=text) for text in TEXTS])
    assert [node.embedding for node in nodes] == embedding.get_text_embedding_batch(TEXTS)
    embedding.embeddings_cache = SimpleKVStore()
    first = embedding.get_text_embedding("ab")
    num_requests = len(fake.requests)
    assert embedding.get_text_embedding("ab") == first
    assert len(fake.requests) == num_requests


def test_errors_are_those_of_the_sdk(embedding: LayertapEmbedding) -> None:
    with pytest.raises(InvalidArgument) as caught:
        embedding.get_text_embedding_batch(["a", "poison"])
    assert caught.value.input_index == 1
    with pytest.raises(ValueError, match="dimensions=0"):
        LayertapEmbedding(dimensions=0)
    with pytest.raises(ValidationError, match="truncation"):
        LayertapEmbedding(truncation="middle")  # type: ignore[arg-type]


def test_it_is_written_down_without_the_token(fake: KeepingEncoder, address: str) -> None:
    fake.token = "secret-of-mine"
    for token in ("secret-of-mine", SecretStr("secret-of-mine")):
        embedding = LayertapEmbedding(address, token=token, dimensions=2, num_workers=3)
        assert len(embedding.get_query_embedding("a")) == 2
        pickled, written = pickle.dumps(embedding), embedding.to_json()
        for form in (
            repr(embedding),
            str(embedding),
            str(embedding.to_dict()),
            written,
            repr(vars(embedding)),
        ):
            assert "secret" not in form
        assert b"secret" not in pickled
        for again in (pickle.loads(pickled), LayertapEmbedding.from_json(written)):
            assert (again.dimensions, again.num_workers, again.address) == (2, 3, address)
            with pytest.raises(Unauthenticated):
                again.get_query_embedding("a")
        for copied in (copy.deepcopy(embedding), embedding.model_copy()):
            assert len(copied.get_query_embedding("a")) == 2


def test_the_token_of_the_environment(
    fake: KeepingEncoder, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.token = "secret-of-mine"
    monkeypatch.setenv("LAYERTAP_TOKEN", "secret-of-mine")
    assert LayertapEmbedding.from_dict(LayertapEmbedding(address).to_dict()).get_query_embedding("a")


def test_tls_is_written_down_as_paths(tmp_path: Any) -> None:
    tls = TLS(ca=tmp_path / "ca.pem", server_name="somewhere")
    written = LayertapEmbedding(tls=tls).to_dict()
    assert json.loads(json.dumps(written)) == written
    assert LayertapEmbedding.from_dict(written).tls == TLS(
        ca=str(tmp_path / "ca.pem"), server_name="somewhere"
    )
    assert LayertapEmbedding.from_dict(LayertapEmbedding(tls=True).to_dict()).tls is True

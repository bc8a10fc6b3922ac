"""Spans in characters: which tokens are theirs, and what is said of those that have none."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from families import FAMILIES
from layertap_server.api.embedding_validation import Span
from layertap_server.api.planning import resolve_spans
from layertap_server.errors import RequestError
from layertap_server.tokenization.inputs import Encoded, Text, Truncation
from layertap_server.tokenization.tokenizer_loading import load_tokenizer
from layertap_server.tokenization.worker import Tokenization
from tiny_tokenizers import MAX_TOKENS, sentences

# WordPiece, byte-level BPE that keeps spaces out of offsets and that does not, and two of unigram.
KINDS = ("bert", "roberta", "modernbert", "xlm_roberta", "deberta_v2")
Encode = Callable[..., Encoded]


@pytest.fixture(scope="module", params=KINDS)
def encode(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encode:
    folder = tmp_path_factory.mktemp(request.param)
    return encoder_of(request.param, folder)


@pytest.fixture(scope="module")
def encode_wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Encode:
    return encoder_of("bert", tmp_path_factory.mktemp("wordpiece"))


def encoder_of(family: str, folder: Path) -> Encode:
    FAMILIES[family].tokenizer().save_pretrained(folder)
    tokenization = Tokenization(load_tokenizer(str(folder)), max_tokens=MAX_TOKENS)

    def encode(one: Text, truncation: Truncation = Truncation.END) -> Encoded:
        [[encoded]] = tokenization.encode_many([([one], truncation)])  # type: ignore[misc]
        return encoded

    return encode


def segment_of(one: Text, encoded: Encoded, start: int, end: int) -> tuple[int, int]:
    """Of one span; where it has none, an empty one."""
    try:
        [segment] = resolve_spans([Span(start, end, True)], one, encoded, "embeddings[0]", "inputs[0]")
    except RequestError:
        return (0, 0)
    return segment


def segments_of(one: Text, encoded: Encoded, *spans: tuple[int, int]) -> list[tuple[int, int]]:
    return [segment_of(one, encoded, *span) for span in spans]


def error_of(encode: Encode, text: str, start: int, end: int, **encoding: Truncation) -> RequestError:
    one = Text(text)
    with pytest.raises(RequestError) as caught:
        resolve_spans([Span(start, end, True)], one, encode(one, **encoding), "embeddings[0]", "inputs[0]")
    return caught.value


TEXTS = [
    "two words",
    "  spaces   before\tand\n\nbetween ",
    "a𝒳é ß 让我们 BERT, don't",
    " ".join(sentences()[40:42]),
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("prompt", ["", "query: ", "query:"])
def test_spans_that_part_a_text_part_its_tokens(encode: Encode, text: str, prompt: str) -> None:
    one = Text(prompt + text, len(prompt))
    encoded = encode(one)
    special = encoded.table().special
    own = [i for i in range(encoded.num_prompt_tokens, encoded.num_tokens) if not special[i]]
    chance = random.Random(1)
    for _ in range(30):
        cuts = sorted(chance.sample(range(1, len(text)), min(chance.randint(1, 8), len(text) - 1)))
        edges = [0, *cuts, len(text)]
        segments = segments_of(one, encoded, *itertools.pairwise(edges))
        assert [i for start, end in segments for i in range(start, end)] == own


def test_a_space_before_a_word_is_of_its_token_and_not_of_its_span(encode: Encode) -> None:
    one = Text("the the")
    encoded = encode(one)
    first, second = segments_of(one, encoded, (0, 3), (4, 7))
    assert segments_of(one, encoded, (0, 4), (3, 7)) == [first, second]
    assert (first[1], second[1] - second[0]) == (second[0], 1)


def test_what_is_said_of_a_span_without_tokens(encode_wordpiece: Encode) -> None:
    encode = encode_wordpiece
    assert "it is white space" in error_of(encode, "a  b", 1, 3).message
    dropped = error_of(encode, "a \u0007\u0001 b", 2, 4).message
    assert "the tokenizer drops its characters" in dropped
    assert "it is white space" not in dropped
    long = "a " * 98
    assert "it was truncated" in error_of(encode, long, 190, 191).message
    assert "it was truncated" in error_of(encode, long, 0, 1, truncation=Truncation.START).message
    rest = error_of(encode, "the the", 5, 7).message
    assert "in the token 'the' of characters 4 to 7" in rest

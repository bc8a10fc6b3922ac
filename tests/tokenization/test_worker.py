"""Text to ids: what `transformers` would give, each kind of input, cut where asked, many at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from families import EXAMPLE, FAMILIES, sentences
from layertap_server.tokenization import worker as tokenization
from layertap_server.tokenization.inputs import Encoded, Input, Pair, Text, TokenIds, Truncation, Words
from layertap_server.tokenization.tokenizer_loading import TokenizerLoadError, load_tokenizer
from layertap_server.tokenization.worker import Tokenization, TokenizerBusyError
from server.support import WAIT_S

MAX_TOKENS = 64
RESIDUES = "MKTAYIAKQRQISFVKSHFSRQ"
SAME_TOKENIZER = {"distilbert", "electra", "nomic_bert", "ernie", "esm_absolute", "jina_embeddings_v3"}
SIDES = {Truncation.END: "right", Truncation.START: "left"}

Make = Callable[[str], tuple[Tokenization, Any]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """(ours, the one of transformers) by family; made once."""
    root = tmp_path_factory.mktemp("tokenizers")
    made: dict[str, tuple[Tokenization, Any]] = {}

    def tokenizers_of(family: str) -> tuple[Tokenization, Any]:
        if family not in made:
            FAMILIES[family].tokenizer().save_pretrained(root / family)
            ours = Tokenization(load_tokenizer(str(root / family)), max_tokens=MAX_TOKENS)
            made[family] = (ours, AutoTokenizer.from_pretrained(root / family))
        return made[family]

    return tokenizers_of


def encode(ours: Tokenization, one: Input, truncation: Truncation = Truncation.NONE) -> Encoded:
    [[encoded]] = ours.encode_many([([one], truncation)])  # type: ignore[misc]
    return encoded


def text_for(family: str, num_words: int, start: int = 0) -> str:
    if FAMILIES[family].model_type == "esm":
        return (RESIDUES * 10)[start : start + num_words]
    return " ".join(" ".join(sentences()[30:60]).split()[start : start + num_words])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in SAME_TOKENIZER])
@pytest.mark.parametrize("truncation", SIDES)
@pytest.mark.parametrize(
    ("num_first", "num_second"),
    [(5, None), (150, None), (4, 3), (150, 3), (3, 150), (149, 150), (150, 149), (40, 150), (150, 40)],
)
def test_it_is_what_transformers_gives(
    make: Make, family: str, truncation: Truncation, num_first: int, num_second: int | None
) -> None:
    ours, theirs = make(family)
    first = text_for(family, num_first)
    second = None if num_second is None else text_for(family, num_second, start=7)
    encoded = encode(ours, Text(first) if second is None else Pair(first, second), truncation)

    theirs.truncation_side = SIDES[truncation]
    expected = theirs(first, second, truncation=True, max_length=MAX_TOKENS)
    whole = theirs(first, second)
    assert encoded.input_ids.tolist() == expected["input_ids"]
    if FAMILIES[family].uses_type_ids:
        assert encoded.type_ids.tolist() == expected["token_type_ids"]
    assert encoded.num_truncated == len(whole["input_ids"]) - len(expected["input_ids"])
    if num_first > 100:
        assert encoded.num_truncated > 0
    uncut = encode(ours, Text(first) if second is None else Pair(first, second), Truncation.NONE)
    assert uncut.input_ids.tolist() == whole["input_ids"], "nothing is dropped unasked"
    assert uncut.num_truncated == 0


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm_roberta", "modernbert"])
def test_the_table_of_a_pair(make: Make, family: str) -> None:
    ours, theirs = make(family)
    first, second = f"{EXAMPLE} 𝒳é  ß", "second\ttext"
    table = encode(ours, Pair(first, second)).table()
    expected = theirs(first, second, return_offsets_mapping=True, return_special_tokens_mask=True)
    assert table.tokens == expected.tokens()
    assert list(zip(table.starts, table.ends, strict=True)) == expected["offset_mapping"]
    assert table.special == [bool(flag) for flag in expected["special_tokens_mask"]]
    assert table.word_ids == [-1 if word is None else word for word in expected.word_ids()]
    assert table.sequence_ids == [-1 if one is None else one for one in expected.sequence_ids()]


def test_offsets_are_characters_of_the_text(make: Make) -> None:
    ours, _ = make("bert")
    text = "𝒳让我们 BERT, don't"
    table = encode(ours, Text(text)).table()
    covered = [text[start:end] for start, end in zip(table.starts, table.ends, strict=True)]
    assert covered[0] == covered[-1] == ""
    assert table.special == [True, *[False] * (len(covered) - 2), True]
    assert "".join(covered) == text.replace(" ", "")
    assert covered[2:5] == ["让", "我", "们"]


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_offsets_and_words_are_counted_from_behind_the_prompt(make: Make, family: str) -> None:
    ours, _ = make(family)
    prompt, text = "query: the ", "random words of one text"
    prompted = encode(ours, Text(prompt + text, len(prompt)))
    table = prompted.table()
    behind = slice(prompted.num_prompt_tokens, prompted.num_tokens)
    covered = [
        text[start:end].strip() for start, end in zip(table.starts[behind], table.ends[behind], strict=True)
    ]
    assert "".join(covered) == text.replace(" ", "")
    assert table.word_ids[behind][0] == 0
    assert max(table.word_ids) == 4
    in_prompt = slice(0, prompted.num_prompt_tokens)
    assert set(zip(table.starts[in_prompt], table.ends[in_prompt], strict=True)) == {(0, 0)}
    assert set(table.word_ids[in_prompt]) == {-1}
    assert prompted.num_prompt_tokens > 3
    # The ids are those of both texts together, as in sentence-transformers.
    assert prompted.input_ids.tolist() == encode(ours, Text(prompt + text)).input_ids.tolist()
    assert encode(ours, Text(text)).num_prompt_tokens == 0


def test_a_prompt_goes_before_the_first_of_a_pair(make: Make) -> None:
    ours, _ = make("bert")
    prompt = "query: "
    encoded = encode(ours, Pair(prompt + "the text", "the other", len(prompt)))
    table = encoded.table()
    firsts = [i for i, one in enumerate(table.sequence_ids) if one == 0 and i >= encoded.num_prompt_tokens]
    seconds = [i for i, one in enumerate(table.sequence_ids) if one == 1]
    assert (table.starts[firsts[0]], table.ends[firsts[-1]]) == (0, len("the text"))
    assert (table.starts[seconds[0]], table.ends[seconds[-1]]) == (0, len("the other"))


def test_a_prompt_that_is_cut_away_covers_nothing(make: Make) -> None:
    ours, _ = make("bert")
    prompt = "query: "
    encoded = encode(ours, Text(prompt + "the " * 100, len(prompt)), Truncation.START)
    assert (encoded.num_tokens, encoded.num_prompt_tokens) == (MAX_TOKENS, 0)
    assert encoded.table().ends[-2] == len("the " * 100) - 1


@pytest.mark.parametrize("truncation", SIDES)
@pytest.mark.parametrize("num_words", [0, 1, 8, 100])
def test_words(make: Make, num_words: int, truncation: Truncation) -> None:
    ours, theirs = make("bert")
    words = ["randomize", "the", "BERT", "让我"] * (num_words // 4) + ["one"] * (num_words % 4)
    encoded = encode(ours, Words(words), truncation)
    theirs.truncation_side = SIDES[truncation]
    expected = theirs(
        words,
        is_split_into_words=True,
        truncation=True,
        max_length=MAX_TOKENS,
        return_offsets_mapping=True,
    )
    assert encoded.input_ids.tolist() == expected["input_ids"]
    table = encoded.table()
    assert table.word_ids == [-1 if word is None else word for word in expected.word_ids()]
    assert list(zip(table.starts, table.ends, strict=True)) == expected["offset_mapping"]


def test_token_ids_are_taken_as_they_are(make: Make) -> None:
    ours, theirs = make("bert")
    ids = np.array(theirs("the text", "other")["input_ids"], np.int64)
    types = np.array(theirs("the text", "other")["token_type_ids"], np.int64)
    encoded = encode(ours, TokenIds(ids, types))
    assert encoded.input_ids.tolist() == ids.tolist()
    assert encoded.type_ids.tolist() == types.tolist()
    table = encoded.table()
    assert table.tokens == theirs.convert_ids_to_tokens(ids.tolist())
    assert [i for i, special in enumerate(table.special) if special] == [
        i for i, one in enumerate(ids) if one in theirs.all_special_ids
    ]
    assert set(table.starts + table.ends) == {0}
    assert set(table.word_ids) == {-1}
    assert encode(ours, TokenIds(ids, None)).type_ids.tolist() == [0] * len(ids)


def test_token_ids_are_cut_at_either_end(make: Make) -> None:
    ours, _ = make("bert")
    one = TokenIds(np.arange(5, 105), np.arange(100) % 2)
    for truncation, kept in ((Truncation.END, slice(0, 64)), (Truncation.START, slice(36, 100))):
        encoded = encode(ours, one, truncation)
        assert encoded.input_ids.tolist() == list(range(5, 105))[kept]
        assert encoded.type_ids.tolist() == [i % 2 for i in range(100)][kept]
        assert encoded.num_truncated == 36
        assert len(encoded.table().tokens) == 64
    assert encode(ours, one, Truncation.NONE).num_tokens == 100


# ------------------------------------------------------------------- a tokenizer in Python


def test_a_slow_tokenizer_gives_tokens_words_and_sequences_but_no_offsets(make: Make) -> None:
    ours, theirs = make("esm")
    pair = encode(ours, Pair("MKT", "AY"))
    assert not pair.has_offsets
    table = pair.table()
    assert table.tokens == theirs.convert_ids_to_tokens(theirs("MKT", "AY")["input_ids"])
    assert table.sequence_ids == [-1, 0, 0, 0, -1, 1, 1, -1]
    assert table.special == [True, False, False, False, True, False, False, True]
    words = encode(ours, Words(["MK", "T", "AY"])).table()
    assert words.word_ids == [-1, 0, 0, 1, 2, 2, -1]
    assert words.sequence_ids == [-1, 0, 0, 0, 0, 0, -1]
    assert encode(ours, Text("")).num_tokens == 2
    assert encode(ours, Text("MKTAY", 2)).num_prompt_tokens == 3
    assert encode(ours, Text("MK" + "T" * 61, 2), Truncation.START).num_prompt_tokens == 2
    assert encode(ours, Text("MK" + "T" * 70, 2), Truncation.START).num_prompt_tokens == 0
    assert encode(ours, Text("M" * 70, 70), Truncation.END).num_prompt_tokens == 63
    cut = encode(ours, Words(["MKT"] * 30), Truncation.START)
    assert (cut.num_tokens, cut.num_truncated) == (64, 28)
    assert cut.table().word_ids == [-1, *(i // 3 for i in range(28, 90)), -1]


def test_a_tokenizer_that_knows_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerLoadError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))
    FAMILIES["bert"].tokenizer().__class__(
        vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    ).save_pretrained(tmp_path / "empty")
    with pytest.raises(TokenizerLoadError, match="no tokens for letters and digits"):
        load_tokenizer(str(tmp_path / "empty"))


# ------------------------------------------------------------------------------ many at once


class Slowed:
    """Holds the worker thread, which all are given to, at its first call, and counts the requests of each."""

    def __init__(self, ours: Tokenization, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenization, "MAX_CHARS_AT_ONCE", -1)
        self.calls: list[int] = []
        self.entered, self.go = threading.Event(), threading.Event()
        encode_many = ours.encode_many

        def slowed(requests: Sequence[tuple[Sequence[Input], Truncation]]) -> list[list[Encoded] | Exception]:
            self.calls.append(len(requests))
            self.entered.set()
            assert self.go.wait(WAIT_S)
            return encode_many(requests)

        monkeypatch.setattr(ours, "encode_many", slowed)

    async def hold(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, WAIT_S)


async def test_short_ones_are_encoded_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = make("bert")
    monkeypatch.setattr(ours, "_worker", None)
    for asked, wanted in (
        (Text("one of them"), theirs("one of them")),
        (Pair("a", "pair"), theirs("a", "pair")),
        (Words(["two", "words"]), theirs(["two", "words"], is_split_into_words=True)),
    ):
        [encoded] = await ours.encode([asked], Truncation.NONE)
        assert encoded.input_ids.tolist() == wanted["input_ids"]
        assert encoded.type_ids.tolist() == wanted["token_type_ids"]
    with pytest.raises(TypeError):
        await ours.encode([Text("\ud800")], Truncation.NONE)


async def test_native_code_takes_longer_and_several_ones_at_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = make("bert")
    monkeypatch.setattr(ours, "_worker", None)
    several = [Text("a text " * 200), Pair("a", "pair"), TokenIds(np.arange(5), None), Text("")]
    answers = await ours.encode(several, Truncation.NONE)
    assert answers[0].input_ids.tolist() == theirs("a text " * 200)["input_ids"]
    assert answers[1].type_ids.tolist() == theirs("a", "pair")["token_type_ids"]
    assert [one.num_tokens for one in answers[2:]] == [5, 2]
    [one, _] = await ours.encode([Text("[MASK] text"), Text("a")], Truncation.NONE)
    assert one.input_ids.tolist() == theirs("[MASK] text")["input_ids"], "which native code leaves to Rust"


@pytest.mark.parametrize("truncation", Truncation)
@pytest.mark.parametrize("num_chars", [100, 500, 40_000])
@pytest.mark.parametrize("prompt", ["", "query: ", "query", " "])
def test_native_code_gives_what_rust_gives(
    make: Make, monkeypatch: pytest.MonkeyPatch, truncation: Truncation, num_chars: int, prompt: str
) -> None:
    """Ids, counts and tables, cut and prompted."""
    ours, _ = make("bert")
    text = (" ".join(sentences()) * 2)[:num_chars]
    one = Text(prompt + text, len(prompt))
    native = encode(ours, one, truncation)
    monkeypatch.setattr(ours._encoder, "_native", None)
    rust = encode(ours, one, truncation)
    assert native.input_ids.tolist() == rust.input_ids.tolist()
    assert native.type_ids.tolist() == rust.type_ids.tolist()
    assert native.num_truncated == rust.num_truncated
    assert native.num_prompt_tokens == rust.num_prompt_tokens
    monkeypatch.undo()
    assert native.table() == rust.table()


async def test_many_short_ones_are_not(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand of one letter would take the event loop ten milliseconds."""
    ours, _ = make("bert")
    threads = set()
    encode_many = ours.encode_many

    def seen(requests: Sequence[tuple[Sequence[Input], Truncation]]) -> list[list[Encoded] | Exception]:
        threads.add(threading.current_thread())
        return encode_many(requests)

    monkeypatch.setattr(ours, "encode_many", seen)
    assert len(await ours.encode([Text("a")] * 1000, Truncation.NONE)) == 1000
    assert threading.current_thread() not in threads


async def test_concurrent_requests_share_calls(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = make("bert")
    slowed = Slowed(ours, monkeypatch)
    wanted = [text_for("bert", 5, start) for start in range(40)]
    first = asyncio.create_task(ours.encode([Text(wanted[0])], Truncation.NONE))
    await slowed.hold()
    rest = [asyncio.create_task(ours.encode([Text(text), Text("a")], Truncation.NONE)) for text in wanted[1:]]
    await asyncio.sleep(0)  # each has asked
    slowed.go.set()
    answers = await asyncio.wait_for(asyncio.gather(first, *rest), WAIT_S)
    assert slowed.calls == [1, 39]
    for text, answer in zip(wanted, answers, strict=True):
        assert answer[0].input_ids.tolist() == theirs(text)["input_ids"]
        assert [one.num_tokens for one in answer[1:]] in ([], [3])


async def test_a_long_request_lets_short_ones_pass_and_rides_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = make("bert")
    monkeypatch.setattr(tokenization, "MAX_CALL_CHARS", 100)
    monkeypatch.setattr(tokenization, "LATER_S_PER_CHAR", 10.0)  # far more than the test takes
    slowed = Slowed(ours, monkeypatch)
    first = asyncio.create_task(ours.encode([Text("a")], Truncation.NONE))
    await slowed.hold()
    order: list[str] = []

    async def ask(name: str, text: str) -> None:
        await ours.encode([Text(text)], Truncation.END)
        order.append(name)

    rest = [
        asyncio.create_task(ask(*one)) for one in (("long", "b " * 50_000), ("short", "c"), ("shorter", "d"))
    ]
    await asyncio.sleep(0)
    slowed.go.set()
    await asyncio.wait_for(asyncio.gather(first, *rest), WAIT_S)
    assert order == ["short", "shorter", "long"]
    assert slowed.calls == [1, 2, 1]


async def test_a_large_request_is_encoded_in_parts_between_others(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = make("bert")
    monkeypatch.setattr(tokenization, "MAX_CALL_CHARS", 10)
    monkeypatch.setattr(tokenization, "LATER_S_PER_CHAR", 10.0)  # far more than the test takes
    slowed = Slowed(ours, monkeypatch)
    wanted = ["one", "of", "these", "a text longer than a call", "", "the last"]
    order: list[str] = []
    large = asyncio.create_task(ours.encode([Text(text) for text in wanted], Truncation.NONE))
    large.add_done_callback(lambda _: order.append("large"))
    await slowed.hold()
    small = asyncio.create_task(ours.encode([Text("small")], Truncation.NONE))
    small.add_done_callback(lambda _: order.append("small"))
    await asyncio.sleep(0)
    slowed.go.set()
    assert len(await asyncio.wait_for(small, WAIT_S)) == 1
    answer = await asyncio.wait_for(large, WAIT_S)
    assert [one.input_ids.tolist() for one in answer] == [theirs(text)["input_ids"] for text in wanted]
    assert order == ["small", "large"], "the small one rode with the next part"
    assert len(slowed.calls) == 4
    assert ours._waiting_chars == 0


async def test_of_a_large_request_that_fails_no_more_is_encoded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = make("bert")
    monkeypatch.setattr(tokenization, "MAX_CALL_CHARS", 1)
    slowed = Slowed(ours, monkeypatch)
    slowed.go.set()
    with pytest.raises(TypeError):
        await ours.encode([Text("a"), Text("\ud800"), Text("b"), Text("c")], Truncation.NONE)
    assert await ours.encode([Text("d")], Truncation.NONE)
    assert slowed.calls == [1, 1, 1]
    assert ours.num_cancelled == 0


async def test_no_inputs(make: Make) -> None:
    ours, _ = make("bert")
    assert await ours.encode([], Truncation.NONE) == []


async def test_what_waits_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = make("bert")
    monkeypatch.setattr(ours, "_max_queue_chars", 10)
    slowed = Slowed(ours, monkeypatch)
    first = asyncio.create_task(ours.encode([Text("a" * 50)], Truncation.END))
    await slowed.hold()
    large = asyncio.create_task(ours.encode([Words(["b" * 8, "c" * 8])], Truncation.END))
    await asyncio.sleep(0)
    with pytest.raises(TokenizerBusyError):
        await ours.encode([Text("d")], Truncation.NONE)
    slowed.go.set()
    await asyncio.wait_for(asyncio.gather(first, large), WAIT_S)
    assert await ours.encode([Pair("e", "f")], Truncation.NONE)


async def test_a_failing_request_fails_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = make("bert")
    slowed = Slowed(ours, monkeypatch)
    slowed.go.set()
    poison = Text("\ud800")  # a lone surrogate
    asked = [[Text("the first")], [Text("fine"), poison], [poison], [Text("the last")]]
    answers = await asyncio.wait_for(
        asyncio.gather(*(ours.encode(one, Truncation.NONE) for one in asked), return_exceptions=True), WAIT_S
    )
    assert slowed.calls[0] == 4
    assert [isinstance(answer, TypeError) for answer in answers] == [False, True, True, False]
    assert answers[0][0].input_ids.tolist() == theirs("the first")["input_ids"]
    assert answers[3][0].input_ids.tolist() == theirs("the last")["input_ids"]


async def test_who_left_is_not_encoded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = make("bert")
    slowed = Slowed(ours, monkeypatch)
    first = asyncio.create_task(ours.encode([Text("a")], Truncation.NONE))
    await slowed.hold()
    leaving, staying = (asyncio.create_task(ours.encode([Text("a")], Truncation.NONE)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    slowed.go.set()
    assert len(await asyncio.wait_for(first, WAIT_S)) == 1
    assert len(await asyncio.wait_for(staying, WAIT_S)) == 1
    assert leaving.cancelled()
    assert slowed.calls == [1, 1]


def test_what_a_tokenizer_has_and_its_model_not(tmp_path: Path) -> None:
    """Tokens that were added, and no embeddings for them; and types of a pair."""
    tokenizer = FAMILIES["bert"].tokenizer()
    num_embeddings = len(tokenizer)
    tokenizer.add_tokens(["newcomer", "othercomer"])
    tokenizer.save_pretrained(tmp_path)
    ours = Tokenization(load_tokenizer(str(tmp_path)), max_tokens=MAX_TOKENS)
    assert ours.misfit(num_embeddings + 2, 2) == ""
    assert ours.misfit(num_embeddings, 2) == (
        f"2 tokens from id {num_embeddings} on, the first of them 'newcomer'"
    )
    assert ours.misfit(num_embeddings + 2, 1) == "2 token types for a pair"
    assert ours.misfit(num_embeddings + 2, 0) == "", "a model without types ignores them"

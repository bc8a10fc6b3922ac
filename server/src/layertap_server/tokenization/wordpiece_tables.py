"""The tables of BERT's tokenizer, read from the tokenizer itself: characters, vocabulary, special tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from layertap_server.plan import Int64Array

UInt32Array = npt.NDArray[np.uint32]

# The constants of wordpiece.c: the longest word, the longest added token, and the layout of a character's
# entry (its kind, a flag, and where its value begins).
MAX_WORD = 512
MAX_ADDED_BYTES = 255
UNKNOWN, PART, ALONE, SPACE, SEVERAL = range(5)
MAY_BEGIN_ADDED = 8
VALUE_SHIFT = 4
# The code points in the table: the basic plane, and emoji, which are frequent.
NUM_CODE_POINTS = 0x1FB00
CODE_POINTS = (range(0x10000), range(0x1F000, NUM_CODE_POINTS))
# Unassigned, surrogate and private-use characters: their normalization may differ between Unicode versions.
UNCERTAIN = {"Cn", "Cs", "Co"}
# Separates characters that are normalized in one call: it stays as it is, and no other character becomes it.
SEPARATOR = "\N{SNOWMAN}"


class NotWordPieceError(Exception):
    """The tokenizer is of a kind that native code does not support; the message says why."""


@dataclass(frozen=True, slots=True)
class Template:
    """The special tokens around one text, or around each of two."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    # The token type of the second text and of all tokens after it; the others have type 0.
    second_type: int


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The pieces that begin a word, and those that continue one, the latter without their prefix."""

    pieces: list[str]
    ids: Int64Array  # (P,)
    continues: npt.NDArray[np.uint8]  # (P,), 1 for pieces that continue a word
    unknown_id: int
    max_word: int


@dataclass(frozen=True, slots=True)
class Characters:
    """The normalization of each code point, in the format of wordpiece.c."""

    entries: UInt32Array  # by code point
    several: UInt32Array  # code points that become several: their number, then an entry for each
    known: list[str]


@dataclass(frozen=True, slots=True)
class Tables:
    characters: Characters
    vocabulary: Vocabulary
    # Native code does not encode texts that contain one of these.
    added: list[str]
    single: Template
    # None if native code cannot encode pairs.
    pair: Template | None


def read_tables(tokenizer: Any) -> Tables:
    """The tables of a `tokenizers.Tokenizer` that neither pads nor truncates. Raises `NotWordPieceError`."""
    for part, wanted in (
        ("model", "WordPiece"),
        ("normalizer", "BertNormalizer"),
        ("pre_tokenizer", "BertPreTokenizer"),
    ):
        found = type(getattr(tokenizer, part)).__name__
        if found != wanted:
            raise NotWordPieceError(f"its {part} is {found}")
    added = list(tokenizer.get_added_tokens_decoder().values())
    if any(not 0 < len(token.content.encode()) <= MAX_ADDED_BYTES for token in added):
        raise NotWordPieceError("an added token is empty, or very long")
    characters = read_characters(tokenizer.normalizer, tokenizer.pre_tokenizer, added)
    single = read_template(tokenizer, None)
    if single is None:
        raise NotWordPieceError("its special tokens are not only before and after a text")
    return Tables(
        characters,
        read_vocabulary(tokenizer),
        [token.content for token in added if not token.normalized],
        single,
        read_template(tokenizer, "b"),
    )


def read_template(tokenizer: Any, second: str | None) -> Template | None:
    encoding = tokenizer.encode("a", second)
    sequences, ids, types = encoding.sequence_ids, encoding.ids, encoding.type_ids
    if 0 not in sequences or (second is not None and 1 not in sequences):
        return None
    first = sequences.index(0)
    num_first = sequences.count(0)
    between = after = first + num_first
    if second is not None:
        between = sequences.index(1)
        after = between + sequences.count(1)
    second_type = types[between] if second is not None else 0
    if types != [0] * between + [second_type] * (len(ids) - between):
        return None
    return Template(
        tuple(ids[:first]), tuple(ids[first + num_first : between]), tuple(ids[after:]), second_type
    )


def read_vocabulary(tokenizer: Any) -> Vocabulary:
    model = tokenizer.model
    vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=False)
    prefix: str = model.continuing_subword_prefix
    max_word: int = model.max_input_chars_per_word
    if not 0 < max_word <= MAX_WORD:
        raise NotWordPieceError(f"its words have up to {max_word} characters")
    if model.unk_token not in vocab:
        raise NotWordPieceError("its vocabulary has no unknown token")
    # Sorted by id: frequent pieces have low ids, and then lie together in memory.
    beginning = sorted(vocab, key=vocab.__getitem__)
    continuing = [piece for piece in beginning if piece.startswith(prefix)]
    ids = [vocab[piece] for piece in (*beginning, *continuing)]
    return Vocabulary(
        [*beginning, *(piece[len(prefix) :] for piece in continuing)],
        np.array(ids, np.int64),
        np.repeat(np.array([0, 1], np.uint8), (len(beginning), len(continuing))),
        vocab[model.unk_token],
        max_word,
    )


def read_characters(normalizer: Any, pre_tokenizer: Any, added: Iterable[Any]) -> Characters:
    """The table of characters, from a normalizer that takes each character by itself.

    BERT's normalizer does, except that it may reorder combining marks; see `shunned`.
    """
    asked = [char for char in map(chr, chain(*CODE_POINTS)) if unicodedata.category(char) not in UNCERTAIN]
    asked.remove(SEPARATOR)
    joined: str = normalizer.normalize_str(SEPARATOR.join([*asked, ""]))
    *answers, rest = joined.split(SEPARATOR)
    if len(answers) != len(asked) or rest or normalizer.normalize_str(SEPARATOR) != SEPARATOR:
        raise NotWordPieceError("its normalizer does not process characters one by one")
    asked.append(SEPARATOR)
    answers.append(SEPARATOR)

    normalized = sorted(set(joined))
    kinds = dict(zip(normalized, kinds_of(normalized, pre_tokenizer), strict=True))
    for char in shunned(normalized, normalizer, added):
        kinds[char] = UNKNOWN
    simple = {char: ord(char) << VALUE_SHIFT | kind for char, kind in kinds.items() if kind != UNKNOWN}
    entries = [UNKNOWN] * NUM_CODE_POINTS
    several = [0]  # the entry of characters that are removed: no characters follow
    places = {"": SEVERAL}
    for char, answer in zip(asked, answers, strict=True):
        if len(answer) == 1:
            entry = simple.get(answer, UNKNOWN)
        elif len(answer) == 3 and answer[0] == answer[2] == " " and kinds[answer[1]] == PART:
            entry = ord(answer[1]) << VALUE_SHIFT | ALONE  # spaces around a Chinese character
        elif answer in places:
            entry = places[answer]
        elif any(one not in simple for one in answer) or len(answer) > len(char.encode()):
            entry = UNKNOWN
        else:
            entry = places[answer] = len(several) << VALUE_SHIFT | SEVERAL
            several += [len(answer), *(simple[one] for one in answer)]
        entries[ord(char)] = entry
    if UNKNOWN in map(entries.__getitem__, b" abcdefghijklmnopqrstuvwxyz"):
        raise NotWordPieceError("an added token stands for a letter")
    known = [chr(code) for code, entry in enumerate(entries) if entry != UNKNOWN]
    for token in added:
        if not token.normalized and ord(token.content[0]) < NUM_CODE_POINTS:
            entries[ord(token.content[0])] |= MAY_BEGIN_ADDED
    return Characters(np.array(entries, np.uint32), np.array(several, np.uint32), known)


def shunned(normalized: Iterable[str], normalizer: Any, added: Iterable[Any]) -> set[str]:
    """Normalized characters that native code cannot handle one by one, so that texts with them are left to
    the model's own tokenizer: one of each added token that is matched in normalized text, and combining marks
    that the normalizer reorders."""
    found = {trigger(token.content, normalizer) for token in added if token.normalized}
    two_marks = "\N{COMBINING COMMA ABOVE RIGHT}\N{COMBINING GRAVE ACCENT}"
    if normalizer.normalize_str(two_marks) != two_marks:
        found |= {char for char in normalized if unicodedata.combining(char)}
    return found


def kinds_of(characters: Sequence[str], pre_tokenizer: Any) -> list[int]:
    """PART, ALONE or SPACE for each character, by how the pre-tokenizer treats it between two letters."""
    kinds = np.full(2 * len(characters) + 1, SPACE)
    for _, (start, end) in pre_tokenizer.pre_tokenize_str("x".join(["", *characters, ""])):
        kinds[start:end] = PART
        if end - start == 1:
            kinds[start] = ALONE
    found: list[int] = kinds[1::2].tolist()
    return found


def trigger(content: str, normalizer: Any) -> str:
    """A character that every normalized text with this added token has; no letter or digit if possible."""
    characters = "".join(normalizer.normalize_str(content).split())
    if not characters:
        raise NotWordPieceError(f"its added token '{content}' is white space")
    return next((char for char in characters if not char.isalnum()), characters[0])

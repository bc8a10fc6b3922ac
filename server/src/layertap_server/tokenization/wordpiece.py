"""BERT's tokenizer in native code. It is used only if it passes a comparison with the model's own at load."""

from __future__ import annotations

import ctypes
import logging
import random
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from layertap_server.compiling import (
    CompileError,
    NoCompilerError,
    check_structures,
    compile_once,
    warn_of_no_compiler,
)
from layertap_server.plan import Int64Array
from layertap_server.tokenization.wordpiece_tables import NotWordPieceError, Tables, read_tables

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-std=gnu11")
# Texts of up to so many bytes are encoded without releasing the interpreter lock: waiting to get the lock
# back could take longer than the work.
MAX_HELD_BYTES = 1 << 14
# The numbers of characters and vocabulary pieces in the trial texts, which both tokenizers encode at load
# (the model's own takes some 50 ms for it), and the characters and words in one text.
NUM_TRIED, NUM_TRIED_PIECES = 1 << 14, 1500
TRIAL_CHARS, TRIAL_WORDS = 128, 32


class TablesArgument(ctypes.Structure):
    """`tables` of wordpiece.c."""

    _fields_ = (
        ("characters", ctypes.c_void_p),
        ("num_characters", ctypes.c_int64),
        ("several", ctypes.c_void_p),
        ("added", ctypes.c_char_p),
        ("slots", ctypes.c_void_p),
        ("log2_slots", ctypes.c_int64),
        ("pieces", ctypes.c_void_p),
        ("max_piece", ctypes.c_int64),
        ("max_word", ctypes.c_int64),
        ("unknown_id", ctypes.c_int64),
    )


class SpecialArgument(ctypes.Structure):
    """`special` of wordpiece.c."""

    _fields_ = (
        ("before", ctypes.c_void_p),
        ("num_before", ctypes.c_int64),
        ("after", ctypes.c_void_p),
        ("num_after", ctypes.c_int64),
    )


# By the names in C. Loading compares the sizes with those of the compiled library.
STRUCTURES = {"tables": TablesArgument, "special": SpecialArgument}


class Scratch(threading.local):
    """A buffer for the ids of one short text, one for each thread: their number is known only afterwards."""

    def __init__(self) -> None:
        self.ids = np.empty(2 * MAX_HELD_BYTES, np.int64)
        self.address = self.ids.ctypes.data


class WordPiece:
    """Encodes texts; gives None for a text that only the model's own tokenizer can encode."""

    def __init__(self, tables: Tables, library: Path) -> None:
        self.single = tables.single
        self.pair = tables.pair
        self._alive: list[Any] = []  # the objects that C pointers refer to
        held, released = ctypes.PyDLL(str(library)), ctypes.CDLL(str(library))
        check_structures(released, STRUCTURES)
        self._tables = self._pointer(self._build(tables, held))
        self._around = self._special(self.single.before, self.single.after)
        if self.pair is not None:
            self._around_first = self._special(self.pair.before, self.pair.between)
            self._around_second = self._special((), self.pair.after)
        # Two variants of each function: the first holds the interpreter lock, the second releases it.
        self._one = held.layertap_wordpiece, released.layertap_wordpiece
        self._many = held.layertap_wordpiece_many, released.layertap_wordpiece_many
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for function in self._one:
            function.argtypes = (pointer, pointer, ctypes.c_char_p, number, pointer, number)
            function.restype = number
        for function in self._many:
            function.argtypes = (pointer, pointer, ctypes.c_char_p, pointer, number, pointer, number, pointer)
            function.restype = None
        self._scratch = Scratch()

    def encode(self, text: str) -> Int64Array | None:
        """The ids of a text, (T,), special tokens included."""
        return self._encode(self._around, text)

    def encode_pair(self, first: str, second: str) -> tuple[Int64Array, Int64Array] | None:
        """The ids and the token types of a pair, (T,) each."""
        if self.pair is None:
            return None
        ids_of_first = self._encode(self._around_first, first)
        ids_of_second = self._encode(self._around_second, second)
        if ids_of_first is None or ids_of_second is None:
            return None
        ids = np.concatenate((ids_of_first, ids_of_second))
        types = np.zeros_like(ids)
        types[len(ids_of_first) :] = self.pair.second_type
        return ids, types

    def encode_many(self, texts: Sequence[str]) -> list[Int64Array | None]:
        """As `encode`, for many texts in one call of native code."""
        encoded = [to_bytes(text) for text in texts]
        joined = b"".join(encoded)
        sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
        num_special = len(self.single.before) + len(self.single.after)
        ids = np.empty(len(joined) + len(encoded) * num_special, np.int64)
        counts = np.empty(len(encoded), np.int64)
        self._many[len(joined) > MAX_HELD_BYTES](
            self._tables,
            self._around,
            joined,
            sizes.ctypes.data,
            len(encoded),
            ids.ctypes.data,
            len(ids),
            counts.ctypes.data,
        )
        ends = np.maximum(counts, 0).cumsum()
        kept = ids[: ends[-1] if len(ends) else 0].copy()
        return [
            None if count < 0 else kept[end - count : end]
            for count, end in zip(counts.tolist(), ends.tolist(), strict=True)
        ]

    def _encode(self, around: int, text: str) -> Int64Array | None:
        encoded = to_bytes(text)
        size = len(encoded)
        scratch = self._scratch
        if size <= MAX_HELD_BYTES:
            count = self._one[0](self._tables, around, encoded, size, scratch.address, 2 * MAX_HELD_BYTES)
            return None if count < 0 else scratch.ids[:count].copy()
        ids = np.empty(2 * size, np.int64)
        count = self._one[1](self._tables, around, encoded, size, ids.ctypes.data, len(ids))
        return None if count < 0 else ids[:count].copy()

    def _build(self, tables: Tables, library: ctypes.PyDLL) -> ctypes.Structure:
        vocabulary, characters = tables.vocabulary, tables.characters
        lengths = np.fromiter(map(len, vocabulary.pieces), np.int64, len(vocabulary.pieces))
        joined = np.frombuffer("".join(vocabulary.pieces).encode("utf-32-le"), np.uint32)
        log2_slots = (2 * len(lengths)).bit_length()
        slots = np.zeros(1 << log2_slots, np.uint64)
        pieces = np.empty(len(joined) + 2 * len(lengths), np.uint32)
        library.layertap_wordpiece_build(
            self._address(joined),
            self._address(lengths),
            self._address(vocabulary.ids),
            self._address(vocabulary.continues),
            ctypes.c_int64(len(lengths)),
            self._address(slots),
            ctypes.c_int64(log2_slots),
            self._address(pieces),
        )
        added = [one.encode() for one in tables.added]
        return TablesArgument(
            self._address(characters.entries),
            len(characters.entries),
            self._address(characters.several),
            b"".join(bytes([len(one)]) + one for one in added),
            self._address(slots),
            log2_slots,
            self._address(pieces),
            min(int(lengths.max()), vocabulary.max_word),
            vocabulary.max_word,
            vocabulary.unknown_id,
        )

    def _special(self, before: Sequence[int], after: Sequence[int]) -> int:
        ids = [np.array(side, np.int64) for side in (before, after)]
        argument = SpecialArgument(self._address(ids[0]), len(before), self._address(ids[1]), len(after))
        return self._pointer(argument)

    def _address(self, array: npt.NDArray[Any]) -> ctypes.c_void_p:
        self._alive.append(array)
        return ctypes.c_void_p(array.ctypes.data)

    def _pointer(self, structure: ctypes.Structure) -> int:
        self._alive.append(structure)
        return ctypes.addressof(structure)


def to_bytes(text: str) -> bytes:
    # Lone surrogates are encoded, not refused here. No table has them: the model's own tokenizer gets them.
    return text.encode("utf-8", "surrogatepass")


def wordpiece_of(tokenizer: Any) -> WordPiece | None:
    """The native code for a `tokenizers.Tokenizer` without padding and truncation; None if unusable."""
    try:
        tables = read_tables(tokenizer)
        native = WordPiece(tables, compile_once(SOURCE, FLAGS))
    except NoCompilerError:
        warn_of_no_compiler()
        return None
    except NotWordPieceError as error:
        logger.debug("using the model's own tokenizer: %s", error)
        return None
    except (CompileError, OSError) as error:
        logger.warning("cannot use the native tokenizer (%s); using the model's own", error)
        return None
    differing = first_difference(native, tokenizer, tables)
    if differing is not None:
        logger.warning(
            "using the model's own tokenizer, because native code gives different tokens for %r",
            differing,
        )
        return None
    return native


def first_difference(native: WordPiece, tokenizer: Any, tables: Tables) -> str | None:
    """A trial text for which the two give different tokens; None if there is none."""
    texts = trial_texts(tables)
    wanted = tokenizer.encode_batch(texts)
    for text, encoding, ids in zip(texts, wanted, native.encode_many(texts), strict=True):
        if ids is None or ids.tolist() != encoding.ids:
            return text
    for first, second in zip(texts[:8], texts[8:16], strict=True):
        encoding, given = tokenizer.encode(first, second), native.encode_pair(first, second)
        if given is not None and [one.tolist() for one in given] != [encoding.ids, encoding.type_ids]:
            return f"{first}', '{second}"
    return None


def trial_texts(tables: Tables) -> list[str]:
    """Texts with every kind of character and word, each of a natural length."""
    dice = random.Random(0)
    known, max_word = tables.characters.known, tables.vocabulary.max_word
    letters = dice.sample(known, min(NUM_TRIED, len(known)))
    sure = set(known)
    pieces = [one for one in tables.vocabulary.pieces if sure.issuperset(one) and one not in tables.added]
    pieces = dice.sample(pieces, min(NUM_TRIED_PIECES, len(pieces)))
    words = [*pieces, *map("".join, pairwise(pieces))]
    texts = ["", " ", "\t \n", "x", "?!...", "b" * max_word, "b" * (max_word + 1), "x" * 2 * max_word]
    texts += ("".join(letters[i : i + TRIAL_CHARS]) for i in range(0, len(letters), TRIAL_CHARS))
    texts += ("x".join(letters[i : i + TRIAL_CHARS // 2]) for i in range(0, len(letters), TRIAL_CHARS))
    texts += (" ".join(words[i : i + TRIAL_WORDS]) for i in range(0, len(words), TRIAL_WORDS))
    return [text for text in texts if sure.issuperset(text) and not any(one in text for one in tables.added)]

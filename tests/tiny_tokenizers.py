"""Real text that every machine has, and small tokenizers of every kind, made from it in code."""

import argparse
import heapq
import inspect
import json
import logging
import math
import random
import statistics
import subprocess
import tarfile
import tempfile
import textwrap
import threading
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 64
"""The longest input that every tiny model takes, special tokens included."""

EXAMPLE = "让我们来看一下bert的输出都有哪些"

# ------------------------------------------------------------------------------------ text


@cache
def sentences() -> tuple[str, ...]:
    """English of natural length that is on every machine: paragraphs of the standard library's docstrings."""
    found: dict[str, None] = {}
    for module in (argparse, heapq, logging, random, statistics, subprocess, tarfile, textwrap, threading):
        named = [value for _, value in sorted(vars(module).items())]
        classes = [value for value in named if inspect.isclass(value)]
        methods = [value for owner in classes for _, value in sorted(vars(owner).items())]
        for thing in [module, *named, *methods]:
            if inspect.ismodule(thing) or inspect.isclass(thing) or inspect.isfunction(thing):
                for paragraph in (inspect.getdoc(thing) or "").split("\n\n"):
                    words = paragraph.split()
                    if len(words) > 3:
                        found.setdefault(" ".join(words))
    return tuple(found)


@cache
def _pieces() -> tuple[list[str], list[str], list[str]]:
    """Characters, frequent words and frequent endings of `sentences()`, in a fixed order."""
    words = Counter("".join(c if c.isalnum() else " " for c in " ".join(sentences())).lower().split())
    endings: Counter[str] = Counter()
    for word, count in words.items():
        endings.update({word[-size:]: count for size in (2, 3, 4) if len(word) > size})
    ascii_printable = [chr(code) for code in range(33, 127)]
    by_count = [sorted(counter, key=lambda piece: (-counter[piece], piece)) for counter in (words, endings)]
    long_words = [word for word in by_count[0] if len(word) > 1]
    return [*ascii_printable, *dict.fromkeys(EXAMPLE + "éß")], long_words[:200], by_count[1][:80]


# ------------------------------------------------------------------------------ tokenizers


def wordpiece(special: list[str], name: str = "BertTokenizer") -> PreTrainedTokenizerBase:
    """`name` is the tokenizer class of transformers; `special` tokens have the first ids."""
    characters, words, endings = _pieces()
    pieces = [*special, *characters, *words, *(f"##{piece}" for piece in [*characters, *endings])]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return getattr(transformers, name)(vocab=vocab, model_max_length=MAX_TOKENS)


def unigram(
    special: list[str], name: str, *, model_max_length: int = MAX_TOKENS, **options: Any
) -> PreTrainedTokenizerBase:
    """`name` is the tokenizer class of transformers; `special` tokens have the first ids."""
    characters, words, endings = _pieces()
    # Whole words are likelier than their parts, and parts than single characters.
    scores = dict.fromkeys(special, 0.0)
    scores |= {"▁": -6.0} | dict.fromkeys(characters, -9.0)
    scores |= {f"▁{word}": -3.0 - math.log1p(rank) for rank, word in enumerate(words)}
    scores |= {ending: -6.0 - math.log1p(rank) / 2 for rank, ending in enumerate(endings)}
    vocab = list(scores.items())
    return getattr(transformers, name)(vocab=vocab, model_max_length=model_max_length, **options)


@cache
def _merges() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of byte-level BPE trained on `sentences()` (that trainer is deterministic)."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(sentences(), trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return pieces, [tuple(merge) for merge in model["merges"]]


def _byte_vocab(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    pieces, merges = _merges()
    return {piece: index for index, piece in enumerate([*special, *pieces])}, merges


def byte_level(special: list[str], name: str) -> PreTrainedTokenizerBase:
    """`name` is the tokenizer class of transformers; `special` tokens have the first ids."""
    vocab, merges = _byte_vocab(special)
    return getattr(transformers, name)(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def plain_byte_level(special: dict[str, str], first: str, last: str) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with no class of its own, as ModernBERT and EuroBERT have it."""
    vocab, merges = _byte_vocab(list(special.values()))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B {last}",
        special_tokens=[(first, vocab[first]), (last, vocab[last])],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


def residues() -> PreTrainedTokenizerBase:
    """The vocabulary of ESM-2: one letter an amino acid. Its tokenizer is the one written in Python."""
    special = ["<cls>", "<pad>", "<eos>", "<unk>"]
    vocab = [*special, *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_text("\n".join(vocab), encoding="utf-8")
        return transformers.EsmTokenizer(str(path), model_max_length=MAX_TOKENS)

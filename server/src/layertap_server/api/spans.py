"""Resolves the spans of an embedding to ranges of an input's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layertap_server import errors
from layertap_server.api.embedding_validation import Span, SpanUnit
from layertap_server.plan import Int64Array
from layertap_server.tokenization.inputs import Encoded, Input, Pair, Text, Words


def without_special(
    segments: Sequence[tuple[int, int]], encoded: Encoded, spans_field: str, input_field: str
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...] | None]:
    """The ranges of tokens without special tokens, and the positions that they are ranges of, if special
    tokens lie within them. Raises a `RequestError` for a range of nothing else."""
    kept = np.flatnonzero(~np.array(encoded.table().special, bool))
    ranges = [(int(first), int(last)) for first, last in np.searchsorted(kept, np.array(segments))]
    for i, (first, last) in enumerate(ranges):
        if first == last:
            if spans_field:
                raise errors.invalid_argument(
                    f"{spans_field}[{i}]", "it has no token that is not special", reason="EMPTY_SPAN"
                )
            raise errors.invalid_argument(
                input_field, "it has no tokens that are not special; give some text", reason="EMPTY_INPUT"
            )
    if all(kept[last - 1] - kept[first] == last - 1 - first for first, last in ranges):
        return tuple([(int(kept[first]), int(kept[last - 1]) + 1) for first, last in ranges]), None
    return tuple(ranges), tuple(kept.tolist())


def resolve_spans(
    spans: Sequence[Span], one: Input, encoded: Encoded, field: str, input_field: str
) -> tuple[tuple[int, int], ...]:
    """The token ranges of the spans; a span in characters covers the tokens that begin in it.

    A token begins at its first character that is not white space, since some tokenizers include the space
    before a word in its token. So if spans divide a text, each of its tokens belongs to exactly one of them.
    """
    segments = []
    begins: Int64Array | None = None
    for i, span in enumerate(spans):
        span_field = f"{field}.spans[{i}]"
        if span.unit is SpanUnit.WORD:
            segments.append(tokens_of_words(span, encoded, span_field, one, input_field))
            continue
        if span.unit is SpanUnit.TOKEN:
            if span.end > encoded.num_tokens:
                raise errors.invalid_argument(
                    span_field,
                    f"it ends at token {span.end}, and {input_field} has {encoded.num_tokens}",
                    reason="SPAN_OUTSIDE",
                )
            segments.append((span.start, span.end))
            continue
        if not isinstance(one, Text):
            raise errors.invalid_argument(
                span_field,
                f"{input_field} is not a single text; give this span in tokens (UNIT_TOKEN)",
                reason="SPAN_NEEDS_TEXT",
            )
        if not encoded.has_offsets:
            raise errors.output_unavailable(
                "NO_OFFSETS",
                span_field,
                "the model's tokenizer has no character offsets; give spans in tokens (UNIT_TOKEN)",
            )
        num_chars = len(one.text) - one.prompt_chars
        if span.end > num_chars:
            raise errors.invalid_argument(
                span_field,
                f"it ends at character {span.end}, and {input_field} has {num_chars}",
                reason="SPAN_OUTSIDE",
            )
        if begins is None:
            begins = token_begins(one, encoded)
        inside = np.flatnonzero((begins >= span.start) & (begins < span.end))
        if not len(inside):
            raise errors.invalid_argument(
                span_field,
                f"it covers no token of {input_field}: {why_empty(span, one, encoded)}",
                reason="EMPTY_SPAN",
            )
        segments.append((int(inside[0]), int(inside[-1]) + 1))
    return tuple(segments)


def tokens_of_words(
    span: Span, encoded: Encoded, span_field: str, one: Input, input_field: str
) -> tuple[int, int]:
    """The range of tokens of a span in words: those given as `words`, or those that the tokenizer finds."""
    if not isinstance(one, Text | Words):
        why = (
            "is a pair, and both of its texts have words from 0" if isinstance(one, Pair) else "has no words"
        )
        raise errors.invalid_argument(
            span_field,
            f"{input_field} {why}; give this span in tokens (UNIT_TOKEN)",
            reason="SPAN_NEEDS_TEXT",
        )
    if isinstance(one, Text) and not encoded.has_offsets:
        raise errors.output_unavailable(
            "NO_OFFSETS",
            span_field,
            "the model's tokenizer finds no words; give the input as words, or spans in tokens (UNIT_TOKEN)",
        )
    word_ids = np.array(encoded.table().word_ids, np.int64)
    num_words = len(one.words) if isinstance(one, Words) else int(word_ids.max(initial=-1)) + 1
    if span.end > num_words:
        left = " left after truncation" if encoded.num_truncated and isinstance(one, Text) else ""
        raise errors.invalid_argument(
            span_field,
            f"it ends at word {span.end}, and {input_field} has {num_words}{left}",
            reason="SPAN_OUTSIDE",
        )
    inside = np.flatnonzero((word_ids >= span.start) & (word_ids < span.end))
    if not len(inside):
        why = "it was truncated" if encoded.num_truncated else "the tokenizer drops its characters"
        raise errors.invalid_argument(
            span_field, f"it covers no token of {input_field}: {why}", reason="EMPTY_SPAN"
        )
    return int(inside[0]), int(inside[-1]) + 1


def token_begins(one: Text, encoded: Encoded) -> Int64Array:
    """(T,) the offset in the caller's text at which each token begins; -1 for special and prompt tokens."""
    table, text = encoded.table(), one.text[one.prompt_chars :]
    begins = np.full(encoded.num_tokens, -1, np.int64)
    for i in range(encoded.num_prompt_tokens, encoded.num_tokens):
        if not table.special[i]:
            start, covered = table.starts[i], text[table.starts[i] : table.ends[i]]
            word = covered.lstrip()
            begins[i] = min(start + len(covered) - len(word) if word else start, len(text) - 1)
    return begins


def why_empty(span: Span, one: Text, encoded: Encoded) -> str:
    """The reason, for an error message, why no token begins in the span."""
    table, text = encoded.table(), one.text[one.prompt_chars :]
    if text[span.start : span.end].isspace():
        return "it is white space"
    begins = token_begins(one, encoded)
    kept = np.flatnonzero(begins >= 0)
    for i in kept:
        if begins[i] < span.start < table.ends[i]:
            return (
                f"its characters are in the token {errors.quoted(table.tokens[i])} of characters {begins[i]} to "
                f"{table.ends[i]}, which belongs to the span with its first character"
            )
    if encoded.num_truncated and (
        not len(kept) or span.end <= begins[kept[0]] or span.start >= table.ends[kept[-1]]
    ):
        return "it was truncated"
    return "the tokenizer drops its characters"

"""Turns a valid request and the tokens of one of its inputs into the `Work` that the engine computes.

Positions and spans are resolved to token rows here. Those that match no token are refused with the name of
their field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from layertap_server import errors
from layertap_server.api.input_validation import TokenLimit, model_limit
from layertap_server.api.validation import EmbeddingRequest, Selection, Span, indices_in
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import (
    EmbeddingPlan,
    Int64Array,
    OutputCost,
    OutputPlan,
    Pooling,
    TensorSpec,
    Work,
    distinct,
)
from layertap_server.scheduling.output_cost import output_cost
from layertap_server.tokenization.inputs import Encoded, Input, Pair, Text, TokenIds, Truncation, Words


def check_length(
    one: Input,
    encoded: Encoded,
    index: int,
    limit: TokenLimit,
    truncation: Truncation = Truncation.NONE,
) -> None:
    """Refuses an input over the limit if truncation is off, or its special tokens alone are over it."""
    if encoded.num_tokens <= limit.max_tokens:
        return
    if truncation is Truncation.NONE:
        said = f"are more than {limit.whose} {limit.max_tokens}; shorten it"
        if limit.remedy:
            said += f", {limit.remedy}"
        said += ", or set truncation to END or START"
    else:
        said = f"cannot be truncated to {limit.whose} {limit.max_tokens}: there are more special tokens than that"
        said += f"; {limit.remedy or 'the server allows too few'}"
    raise errors.invalid_argument(
        content_field(one, index), f"{encoded.num_tokens} tokens {said}", reason="TOO_MANY_TOKENS"
    )


def check_ids(one: Input, encoded: Encoded, index: int, facts: ModelFacts) -> None:
    """Refuses an input if the tokenizer gave ids or token types that the model has no embeddings for."""
    if facts.text_ids_fit or not encoded.num_tokens or isinstance(one, TokenIds):
        return
    field = content_field(one, index)
    at = int(encoded.input_ids.argmax())
    if encoded.input_ids[at] >= facts.vocab_size:
        raise errors.invalid_argument(
            field,
            f"the model has no embedding for the token {errors.quoted(encoded.table().tokens[at])}, id "
            f"{encoded.input_ids[at]}: its ids are 0 to {facts.vocab_size - 1}; remove the token, or resize the "
            "model's embeddings to its tokenizer",
            reason="OUT_OF_RANGE",
        )
    at = int(encoded.type_ids.argmax())
    if 0 < facts.type_vocab_size <= encoded.type_ids[at]:
        raise errors.invalid_argument(
            field,
            f"token {at} has the token type {encoded.type_ids[at]}, and the model has 0 to "
            f"{facts.type_vocab_size - 1}; give the parts as separate texts",
            reason="OUT_OF_RANGE",
        )


def content_field(one: Input, index: int) -> str:
    name = {Text: "text", Pair: "pair", Words: "words", TokenIds: "token_ids"}[type(one)]
    return f"inputs[{index}].{name}"


Plan = tuple[OutputPlan, tuple[TensorSpec, ...], OutputCost]
# Most plans cached for one selection. A plan takes half a KiB; that of a long selection up to half a MiB.
MAX_KNOWN_PLANS = 1024
MAX_KNOWN_LONG_PLANS = 4
# A selection with more query positions than this is a long one.
MANY_ROWS = 256


@dataclass(slots=True)
class Resolver:
    """Makes plans for one selection of one model's outputs.

    It caches plans by the number of tokens, since clients send the same selection thousands of times.
    """

    selection: Selection
    facts: ModelFacts
    # Plans by the number of tokens, where the plan depends on nothing else.
    _plans: dict[int, Plan] = field(default_factory=dict)
    _is_uniform: bool = field(init=False)
    _max_known_plans: int = MAX_KNOWN_PLANS

    def __post_init__(self) -> None:
        attentions, embeddings = self.selection.attentions, self.selection.embeddings
        self._is_uniform = not any(span.in_characters for one in embeddings for span in one.spans)
        if attentions is not None and len(attentions.query_positions or ()) > MANY_ROWS:
            self._max_known_plans = MAX_KNOWN_LONG_PLANS

    def resolve(
        self,
        one: Input,
        encoded: Encoded,
        index: int,
        limit: TokenLimit | None = None,
        truncation: Truncation = Truncation.NONE,
        prompt_tokens: int = 0,
    ) -> Work:
        """The work of one input, with positions and spans as rows of its tokens. Raises a `RequestError`.

        `prompt_tokens` is the number of leading tokens that the configured pooling leaves out.
        """
        check_length(one, encoded, index, limit or model_limit(self.facts), truncation)
        check_ids(one, encoded, index, self.facts)
        num_tokens = encoded.num_tokens
        if num_tokens == 0:  # an empty text, if the tokenizer adds no special tokens
            raise errors.invalid_argument(
                content_field(one, index), "it has no tokens; give some text", reason="EMPTY_INPUT"
            )
        if not self._is_uniform or encoded.num_prompt_tokens:
            plan, specs, cost = self._plan(one, encoded, index, prompt_tokens)
        elif (known := self._plans.get(num_tokens)) is not None:
            plan, specs, cost = known
        else:
            if len(self._plans) == self._max_known_plans:
                self._plans.clear()
            plan, specs, cost = self._plans[num_tokens] = self._plan(one, encoded, index)
        type_ids = encoded.type_ids if self.facts.type_vocab_size > 1 else None
        return Work(encoded.input_ids, type_ids, plan, specs, cost)

    def _plan(self, one: Input, encoded: Encoded, index: int, prompt_tokens: int = 0) -> Plan:
        selection, num_tokens = self.selection, encoded.num_tokens
        attentions = selection.attentions
        if attentions is not None and attentions.query_positions is not None:
            positions = indices_in(
                attentions.query_positions,
                num_tokens,
                "outputs.attentions.query_positions",
                f"tokens in inputs[{index}]",
            )
            rows, places = distinct(positions)
            attentions = replace(attentions, query_positions=rows, query_places=places)
        plan = OutputPlan(
            wire_dtype=selection.wire_dtype,
            last_hidden_state=selection.last_hidden_state,
            pooler_output=selection.pooler_output,
            hidden_states=selection.hidden_states,
            hidden_places=selection.hidden_places,
            attentions=attentions,
            embeddings=tuple(
                EmbeddingPlan(
                    pooling=asked.pooling,
                    layers=asked.layers,
                    layer_merge=asked.layer_merge,
                    normalize=asked.normalize,
                    dimensions=asked.dimensions,
                    encoding=asked.encoding,
                    segments=(
                        resolve_spans(
                            asked.spans, one, encoded, f"outputs.embeddings[{i}]", f"inputs[{index}]"
                        )
                        if asked.spans
                        else (self._whole_segment(asked, one, encoded, index, prompt_tokens),)
                    ),
                    has_spans=bool(asked.spans),
                    is_projected=asked.is_projected,
                    cuts_normalized=asked.cuts_normalized,
                    layer_counts=asked.layer_counts,
                    layer_places=asked.layer_places,
                )
                for i, asked in enumerate(selection.embeddings)
            ),
        )
        specs = plan.specs(num_tokens, self.facts.hidden_size)
        return plan, specs, output_cost(plan, num_tokens, self.facts)

    def _whole_segment(
        self, asked: EmbeddingRequest, one: Input, encoded: Encoded, index: int, prompt_tokens: int
    ) -> tuple[int, int]:
        """The range of tokens that is pooled without spans.

        CLS pooling that a request names takes the first token, before any prompt. CLS pooling of the
        configured embedding takes the first token after the prompt, if that is left out, as in
        sentence-transformers.
        """
        if self.facts.pool_prompt:
            return (0, encoded.num_tokens)
        if not asked.is_configured:
            is_cls = asked.pooling is Pooling.CLS
            start = 0 if is_cls else min(encoded.num_prompt_tokens, encoded.num_tokens - 1)
            return (start, encoded.num_tokens)
        if prompt_tokens >= encoded.num_tokens:
            raise errors.invalid_argument(
                content_field(one, index),
                "it has no tokens other than those of its prompt, which the model's embedding leaves out; give some text",
                reason="EMPTY_INPUT",
            )
        return (prompt_tokens, encoded.num_tokens)


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
        if not span.in_characters:
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

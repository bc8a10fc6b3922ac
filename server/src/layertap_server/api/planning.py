"""Turns a valid request and the tokens of one of its inputs into the `Work` that the engine computes.

Positions and spans are resolved to token rows here. Those that match no token are refused with the name of
their field.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from layertap_server import errors
from layertap_server.api.embedding_validation import EmbeddingRequest
from layertap_server.api.field_values import indices_in
from layertap_server.api.input_validation import TokenLimit, content_field, model_limit
from layertap_server.api.spans import resolve_spans, without_special
from layertap_server.api.validation import Selection
from layertap_server.enums import Pooling
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import EmbeddingPlan, distinct
from layertap_server.plan import NUM_OUTER_TOKENS, OutputCost, OutputPlan, TensorSpec, Work
from layertap_server.scheduling.output_cost import output_cost
from layertap_server.tokenization.inputs import Encoded, Input, TokenIds, Truncation


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


Plan = tuple[OutputPlan, tuple[TensorSpec, ...], OutputCost]
# Most plans cached for one selection. A plan takes half a KiB; that of a long selection up to half a MiB.
MAX_KNOWN_PLANS = 1024
MAX_KNOWN_LONG_PLANS = 4
# A selection with more positions than this is a long one.
MANY_POSITIONS = 256


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
        self._is_uniform = not any(one.depends_on_text for one in self.selection.embeddings)
        if self.selection.num_positions > MANY_POSITIONS:
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

        def tokens(positions: tuple[int, ...] | None, field: str) -> tuple[int, ...] | None:
            if positions is None:
                return None
            return indices_in(positions, num_tokens, f"outputs.{field}", f"tokens in inputs[{index}]")

        if selection.contacts and num_tokens <= NUM_OUTER_TOKENS:
            raise errors.invalid_argument(
                content_field(one, index),
                "it has no residues besides its special tokens, so there is no contact map; give some",
                reason="EMPTY_INPUT",
            )
        attentions = selection.attentions
        if attentions is not None:
            asked = tokens(attentions.query_positions, "attentions.query_positions")
            rows, places = (None, None) if asked is None else distinct(asked)
            attentions = replace(
                attentions,
                query_positions=rows,
                query_places=places,
                key_positions=tokens(attentions.key_positions, "attentions.key_positions"),
            )
        logits = selection.logits
        if logits is not None:
            logits = replace(logits, positions=tokens(logits.positions, "logits.positions"))
        plan = OutputPlan(
            wire_dtype=selection.wire_dtype,
            last_hidden_state=selection.last_hidden_state,
            last_positions=tokens(selection.last_positions, "last_hidden_state_positions"),
            pooler_output=selection.pooler_output,
            hidden_states=selection.hidden_states,
            hidden_places=selection.hidden_places,
            hidden_positions=tokens(selection.hidden_positions, "hidden_states.positions"),
            attentions=attentions,
            embeddings=tuple(
                [
                    self._embedding(asked, f"outputs.embeddings[{i}]", one, encoded, index, prompt_tokens)
                    for i, asked in enumerate(selection.embeddings)
                ]
            ),
            logits=logits,
            sparse=selection.sparse,
            contacts=selection.contacts,
        )
        specs = plan.specs(num_tokens, self.facts.hidden_size)
        return plan, specs, output_cost(plan, num_tokens, self.facts)

    def _embedding(
        self,
        asked: EmbeddingRequest,
        field: str,
        one: Input,
        encoded: Encoded,
        index: int,
        prompt_tokens: int,
    ) -> EmbeddingPlan:
        segments: tuple[tuple[int, int], ...]
        if asked.spans:
            segments = resolve_spans(asked.spans, one, encoded, field, f"inputs[{index}]")
        else:
            segments = (self._whole_segment(asked, one, encoded, index, prompt_tokens),)
        kept = None
        if asked.excludes_special:
            segments, kept = without_special(
                segments, encoded, f"{field}.spans" if asked.spans else "", content_field(one, index)
            )
        return EmbeddingPlan(
            pooling=asked.pooling,
            layers=asked.layers,
            layer_merge=asked.layer_merge,
            normalize=asked.normalize,
            dimensions=asked.dimensions,
            encoding=asked.encoding,
            segments=segments,
            has_spans=bool(asked.spans),
            is_projected=asked.is_projected,
            projects_tokens=asked.projects_tokens,
            cuts_normalized=asked.cuts_normalized,
            layer_counts=asked.layer_counts,
            layer_places=asked.layer_places,
            kept=kept,
        )

    def _whole_segment(
        self, asked: EmbeddingRequest, one: Input, encoded: Encoded, index: int, prompt_tokens: int
    ) -> tuple[int, int]:
        """The range of tokens that is pooled without spans. Without pooling, all tokens have a vector.

        CLS pooling that a request names takes the first token, before any prompt. CLS pooling of the
        configured embedding takes the first token after the prompt, if that is left out, as in
        sentence-transformers.
        """
        if self.facts.pool_prompt or (asked.pooling is Pooling.NONE and not asked.is_configured):
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

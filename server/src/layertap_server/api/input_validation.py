"""Checks the inputs of a request against the model's facts and converts them to plain data: texts, token ids,
prompts, and the limit of tokens. The outputs are checked in `validation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors
from layertap_server.api.cooperative import map_with_yields
from layertap_server.api.field_values import known_enum
from layertap_server.api.validation import Selection
from layertap_server.errors import RequestError
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import Int64Array
from layertap_server.tokenization.inputs import Input, Pair, Text, TokenIds, Truncation, Words

# The limit for a request's prompt, which is put before each of its texts: they may be thousands.
MAX_PROMPT_CHARS = 2**12


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """The most tokens of an input, and words for an error: whose limit it is, and a further remedy."""

    max_tokens: int
    whose: str
    remedy: str = ""


def default_prompt(request: pb.EncodeRequest, selection: Selection, facts: ModelFacts) -> str:
    """The model's default prompt, if the request names none and wants the configured embedding; else empty.

    sentence-transformers' `encode` puts the default prompt before each text.
    """
    named = request.prompt_name or request.prompt
    if named or not facts.default_prompt_name or not selection.wants_configured:
        return ""
    return facts.prompts[facts.default_prompt_name]


async def parse_inputs(
    request: pb.EncodeRequest | pb.TokenizeRequest,
    inputs: Sequence[pb.Input | RequestError],
    facts: ModelFacts,
    default_prompt: str = "",
    *,
    each_alone: bool = False,
) -> Sequence[Input | RequestError]:
    """The inputs of a request. Raises the error of an invalid input; with `each_alone`, it takes its place.

    The prompt that the request names is put before each input, and raises an error for an input that cannot
    have a prompt. Without one, `default_prompt` is put before the inputs that can.
    """
    if not inputs:
        raise errors.invalid_argument("inputs", "it is empty; give at least one", reason="NO_INPUTS")
    prompt, prompt_field = parse_prompt(request, facts)
    if prompt_field:
        default_prompt = ""

    def parse(index: int, one: pb.Input | RequestError) -> Input:
        return parse_input(one, index, facts, prompt or default_prompt, prompt_field if prompt else "")

    return await map_with_yields(errors.kept(parse) if each_alone else parse, inputs)


def parse_prompt(request: pb.EncodeRequest | pb.TokenizeRequest, facts: ModelFacts) -> tuple[str, str]:
    """The prompt that the request names or gives, and the name of its field; both empty without one."""
    given = request.prompt if isinstance(request, pb.EncodeRequest) else ""
    name = request.prompt_name
    if given and name:
        raise errors.conflicting("prompt", "it is in place of prompt_name; leave one of the two empty")
    if len(given) > MAX_PROMPT_CHARS:
        raise errors.invalid_argument(
            "prompt",
            f"{len(given)} characters exceed {MAX_PROMPT_CHARS}, the limit for what is put before each text; "
            "shorten it, or put it into the texts",
            reason="TOO_MANY",
        )
    if given:
        return given, "prompt"
    if not name:
        return "", ""
    if name not in facts.prompts:
        known = errors.listed(sorted(facts.prompts)) or "none"
        raise errors.invalid_argument(
            "prompt_name",
            f"the model has no prompt {errors.quoted(name)}; it has {known}",
            reason="UNKNOWN_PROMPT",
        )
    return facts.prompts[name], "prompt_name"


def parse_input(
    one: pb.Input | RequestError, index: int, facts: ModelFacts, before: str = "", prompt_field: str = ""
) -> Input:
    """`before` is put before texts. If it comes from a field of the request, other inputs are refused."""
    if isinstance(one, RequestError):  # its bytes could not be parsed
        raise one
    content = one.WhichOneof("content")
    if content == "text":
        return Text(before + one.text, len(before))
    field = f"inputs[{index}]"
    if content == "pair":
        return Pair(before + one.pair.first, one.pair.second, len(before))
    if content is None:
        raise errors.invalid_argument(
            field, "it is empty; set text, pair, token_ids or words", reason="EMPTY_INPUT"
        )
    if prompt_field:
        raise errors.invalid_argument(
            f"{field}.{content}",
            f"a prompt can be put only before text; leave {prompt_field} empty",
            reason="PROMPT_NEEDS_TEXT",
        )
    if content == "words":
        return Words(list(one.words.words))
    return parse_token_ids(one.token_ids, f"{field}.token_ids", facts)


def parse_token_ids(token_ids: pb.TokenIds, field: str, facts: ModelFacts) -> TokenIds:
    ids = np.array(token_ids.ids[:], np.int64)
    if not len(ids):
        raise errors.invalid_argument(f"{field}.ids", "it is empty; give at least one", reason="EMPTY_INPUT")
    check_below(ids, facts.vocab_size, f"{field}.ids", "the vocabulary")
    if not token_ids.type_ids:
        return TokenIds(ids, None)
    type_ids = np.array(token_ids.type_ids[:], np.int64)
    if len(type_ids) != len(ids):
        raise errors.invalid_argument(
            f"{field}.type_ids",
            f"there are {len(type_ids)} for {len(ids)} ids; give one for each id, or none",
            reason="LENGTH_MISMATCH",
        )
    num_types = max(facts.type_vocab_size, 1)
    check_below(type_ids, num_types, f"{field}.type_ids", "the model's token types")
    return TokenIds(ids, type_ids)


def check_below(values: Int64Array, size: int, field: str, what: str) -> None:
    """Raises a `RequestError` for the first value that is not below `size`."""
    if values.max() >= size:
        i = int((values >= size).argmax())
        raise errors.invalid_argument(
            f"{field}[{i}]", f"{values[i]} is outside {what}: 0 to {size - 1}", reason="OUT_OF_RANGE"
        )


def parse_truncation(value: int) -> Truncation:
    return known_enum(Truncation, value, Truncation.NONE, "truncation")


def model_limit(facts: ModelFacts) -> TokenLimit:
    return TokenLimit(facts.max_tokens, "the model's")


def parse_limit(request: pb.EncodeRequest, selection: Selection, facts: ModelFacts) -> TokenLimit:
    """The limit of tokens: the request's own, else the configured embedding's if wanted, else the model's."""
    most = facts.max_tokens
    if request.max_tokens > most:
        raise errors.invalid_argument(
            "max_tokens", f"{request.max_tokens} is more than the model's {most}", reason="OUT_OF_RANGE"
        )
    if request.max_tokens:
        remedy = f"raise max_tokens (the model takes {most})" if request.max_tokens < most else ""
        return TokenLimit(request.max_tokens, "the request's max_tokens of", remedy)
    configured = facts.max_embedding_tokens or most
    if selection.wants_configured and configured < most:
        return TokenLimit(
            configured,
            "the configured embedding's (max_seq_length)",
            f"set max_tokens to what it needs (the model takes {most})",
        )
    return model_limit(facts)


def content_field(one: Input, index: int) -> str:
    name = {Text: "text", Pair: "pair", Words: "words", TokenIds: "token_ids"}[type(one)]
    return f"inputs[{index}].{name}"

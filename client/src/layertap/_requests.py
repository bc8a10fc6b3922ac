"""Makes the messages of requests from inputs and options. No I/O; shared by both clients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from layertap import _arguments
from layertap._enums import (
    ENCODINGS,
    LAYER_MERGES,
    POOLINGS,
    PRIORITIES,
    TRUNCATIONS,
    UNITS,
    WIRE_DTYPES,
    number_of,
)
from layertap._types import Attentions, DtypeName, Embedding, Input, Pair, Span, TokenIds, Words
from layertap.v1 import encoder_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import TypeIs

_Request = TypeVar("_Request", pb.EncodeRequest, pb.TokenizeRequest)


def is_single(inputs: Input | Iterable[Input]) -> TypeIs[Input]:
    """Whether this is a single input, not several."""
    return isinstance(inputs, str | Pair | TokenIds | Words)


def input_message(value: Input, index: int) -> pb.Input:
    """The protobuf message of one input; `index` is used in error messages.

    Raises:
        TypeError: the input, or a part of it, has a wrong type.
        ValueError: a token id is negative or exceeds 32 bits, or a text cannot be encoded as UTF-8.
    """
    if isinstance(value, str):
        try:
            return pb.Input(text=value)
        except UnicodeEncodeError as error:
            raise _arguments.lone_surrogate(f"inputs[{index}]", value, error) from None
    name = f"inputs[{index}]"
    match value:
        case Pair():
            first = _arguments.text(f"{name}.first", value.first)
            return pb.Input(
                pair=pb.TextPair(first=first, second=_arguments.text(f"{name}.second", value.second))
            )
        case TokenIds():
            ids = _arguments.token_ids(f"{name}.ids", value.ids)
            type_ids = () if value.type_ids is None else value.type_ids
            type_ids = _arguments.token_ids(f"{name}.type_ids", type_ids)
            return pb.Input(token_ids=pb.TokenIds(ids=ids, type_ids=type_ids))
        case Words():
            return pb.Input(words=pb.Words(words=_arguments.words(f"{name}.words", value.words)))
        case _:
            raise _arguments.wrong_input(index, value)


def filled(template: _Request, inputs: Iterable[Input]) -> _Request:
    """A copy of the request with these inputs."""
    request = type(template)()
    request.CopyFrom(template)
    request.inputs.extend(input_message(value, index) for index, value in enumerate(inputs))
    return request


def encode_request(
    *,
    model: str = "",
    last_hidden_state: bool = False,
    pooler_output: bool = False,
    hidden_states: bool | Sequence[int] | None = None,
    attentions: bool | Sequence[int] | Attentions | None = None,
    embeddings: bool | Embedding | Sequence[Embedding] | None = None,
    tokens: bool = False,
    dtype: DtypeName = "float32",
    truncation: Literal["end", "start"] | None = None,
    max_tokens: int = 0,
    prompt_name: str = "",
    priority: Literal["low", "normal", "high"] | None = None,
) -> pb.EncodeRequest:
    """A request for these outputs, without its inputs. See `EncodeOptions` for each option.

    Raises:
        TypeError, ValueError: an option has a wrong type, a name is unknown (the message lists the known
            ones), or a selection is empty.
    """
    outputs = pb.OutputSelection(
        last_hidden_state=_arguments.flag("last_hidden_state", last_hidden_state),
        pooler_output=_arguments.flag("pooler_output", pooler_output),
        tokens=_arguments.flag("tokens", tokens),
        embeddings=[_embedding_spec(one) for one in _embedding_list(embeddings)],
    )
    if _is_wanted(hidden_states):
        outputs.hidden_states.CopyFrom(
            pb.HiddenStateSelection(layers=_layers("hidden_states", hidden_states))
        )
    if _is_wanted(attentions):
        outputs.attentions.CopyFrom(_attention_selection(attentions))
    return pb.EncodeRequest(
        model=_arguments.optional_text("model", model),
        outputs=outputs,
        wire_dtype=number_of("dtype", dtype, WIRE_DTYPES),
        truncation=number_of("truncation", truncation, TRUNCATIONS),
        max_tokens=_arguments.whole_number("max_tokens", max_tokens, 0, 2**32 - 1),
        prompt_name=_arguments.optional_text("prompt_name", prompt_name),
        priority=number_of("priority", priority, PRIORITIES),
    )


def tokenize_request(
    *, model: str = "", truncation: Literal["end", "start"] | None = None, prompt_name: str = ""
) -> pb.TokenizeRequest:
    """A request for tokens, without its inputs."""
    return pb.TokenizeRequest(
        model=_arguments.optional_text("model", model),
        truncation=number_of("truncation", truncation, TRUNCATIONS),
        prompt_name=_arguments.optional_text("prompt_name", prompt_name),
    )


def model_request(name: str) -> pb.GetModelRequest:
    """A request for the description of a model."""
    return pb.GetModelRequest(model=_arguments.optional_text("name", name))


def _is_wanted(selection: object) -> bool:
    return selection is not None and not (isinstance(selection, bool | np.bool_) and not selection)


def _layers(argument: str, layers: Any) -> Sequence[int]:
    if isinstance(layers, bool | np.bool_):
        return ()
    if isinstance(layers, int):
        # An int is ambiguous: 1 could also mean True, and 12 the last twelve layers.
        raise _arguments.wrong_value(
            argument, layers, f"give True for all, or a list of layers such as [{layers}]"
        )
    if isinstance(layers, str):
        raise _arguments.wrong_type(
            argument, layers, "give True for all, or a list of layers such as [0, -1]"
        )
    chosen = _arguments.numbers(argument, layers)
    if not chosen:  # in the contract, no layers means all; a caller who computed an empty list means none
        raise ValueError(f"{argument} names no layer: give True for all, None for none, or a list")
    return chosen


def _attention_selection(attentions: Any) -> pb.AttentionSelection:
    if not isinstance(attentions, Attentions):
        return pb.AttentionSelection(layers=_layers("attentions", attentions))
    return pb.AttentionSelection(
        layers=_arguments.numbers("attentions.layers", attentions.layers),
        heads=_arguments.numbers("attentions.heads", attentions.heads),
        mean_over_heads=_arguments.flag("attentions.mean_over_heads", attentions.mean_over_heads),
        query_positions=_arguments.numbers("attentions.query_positions", attentions.query_positions),
    )


def _embedding_list(embeddings: Any) -> Sequence[Embedding]:
    if isinstance(embeddings, Embedding):
        return [embeddings]
    if isinstance(embeddings, bool | np.bool_) or embeddings is None:
        return [Embedding()] if embeddings else []
    remedy = "give True, an Embedding such as Embedding(pooling='mean'), or a list of them"
    found = _arguments.sequence("embeddings", embeddings, remedy)
    if not all(isinstance(one, Embedding) for one in found):
        raise ValueError(f"embeddings={embeddings!r}: {remedy}")
    return found


def _embedding_spec(embedding: Embedding) -> pb.EmbeddingSpec:
    spans = _arguments.sequence("spans", embedding.spans, "give a list of Span, or of (start, end)")
    normalize = embedding.normalize
    return pb.EmbeddingSpec(
        pooling=number_of("pooling", embedding.pooling, POOLINGS),
        layers=_arguments.numbers("layers", embedding.layers),
        layer_merge=number_of("layer_merge", embedding.layer_merge, LAYER_MERGES),
        # With None, protobuf leaves the field unset.
        normalize=None if normalize is None else _arguments.flag("normalize", normalize),  # type: ignore[arg-type]
        dimensions=_arguments.whole_number("dimensions", embedding.dimensions, 0, (1 << 32) - 1),
        encoding=number_of("encoding", embedding.encoding, ENCODINGS),
        spans=[_span(f"spans[{index}]", one) for index, one in enumerate(spans)],
    )


def _span(name: str, span: Any) -> pb.Span:
    if not isinstance(span, Span):
        remedy = "give a Span, or (start, end)"
        parts = _arguments.sequence(name, span, remedy)
        if len(parts) not in (2, 3):
            raise _arguments.wrong_value(name, span, remedy)
        span = Span(*parts)
    return pb.Span(
        start=_arguments.whole_number(f"{name}.start", span.start, 0, (1 << 32) - 1),
        end=_arguments.whole_number(f"{name}.end", span.end, 0, (1 << 32) - 1),
        unit=number_of("unit", span.unit, UNITS),
    )

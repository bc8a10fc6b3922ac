"""Makes the messages of requests from inputs and options. No I/O; shared by both clients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from layertap import _arguments
from layertap._enums import (
    ACTIVATIONS,
    ENCODINGS,
    LAYER_MERGES,
    POOLINGS,
    PRIORITIES,
    TRUNCATIONS,
    UNITS,
    WIRE_DTYPES,
    number_of,
)
from layertap._types import (
    Attentions,
    DtypeName,
    Embedding,
    HiddenStates,
    Input,
    Logits,
    Pair,
    PriorityName,
    Span,
    Sparse,
    TokenIds,
    TruncationName,
    Words,
)
from layertap.v1 import encoder_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import TypeIs

_MAX_UINT32 = (1 << 32) - 1
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
    last_hidden_state_positions: Sequence[int] | None = None,
    pooler_output: bool = False,
    hidden_states: bool | Sequence[int] | HiddenStates | None = None,
    attentions: bool | Sequence[int] | Attentions | None = None,
    embeddings: bool | Embedding | Sequence[Embedding] | None = None,
    tokens: bool = False,
    logits: bool | Logits | None = None,
    sparse: bool | Sparse | None = None,
    contacts: bool = False,
    dtype: DtypeName = "float32",
    truncation: TruncationName | None = None,
    max_tokens: int = 0,
    prompt_name: str = "",
    prompt: str = "",
    priority: PriorityName | None = None,
) -> pb.EncodeRequest:
    """A request for these outputs, without its inputs. See `EncodeOptions` for each option.

    Raises:
        TypeError, ValueError: an option has a wrong type, a name is unknown (the message lists the known
            ones), a selection is empty, or two options contradict each other.
    """
    prompt_name = _arguments.optional_text("prompt_name", prompt_name)
    prompt = _arguments.optional_text("prompt", prompt)
    if prompt and prompt_name:
        raise ValueError("prompt and prompt_name are both given: leave one of them out")
    outputs = pb.OutputSelection(
        last_hidden_state=_arguments.flag("last_hidden_state", last_hidden_state),
        pooler_output=_arguments.flag("pooler_output", pooler_output),
        tokens=_arguments.flag("tokens", tokens),
        embeddings=[_embedding_spec(one) for one in _embedding_list(embeddings)],
        contacts=_arguments.flag("contacts", contacts),
    )
    if last_hidden_state_positions is not None:
        if not outputs.last_hidden_state:
            raise ValueError("last_hidden_state_positions needs last_hidden_state=True")
        outputs.last_hidden_state_positions.extend(_rows(last_hidden_state_positions))
    if _is_wanted(hidden_states):
        outputs.hidden_states.CopyFrom(_hidden_state_selection(hidden_states))
    if _is_wanted(attentions):
        outputs.attentions.CopyFrom(_attention_selection(attentions))
    if _is_wanted(logits):
        outputs.logits.CopyFrom(_logits_selection(logits))
    if _is_wanted(sparse):
        outputs.sparse.CopyFrom(_sparse_selection(sparse))
    return pb.EncodeRequest(
        model=_arguments.optional_text("model", model),
        outputs=outputs,
        wire_dtype=number_of("dtype", dtype, WIRE_DTYPES),
        truncation=number_of("truncation", truncation, TRUNCATIONS),
        max_tokens=_arguments.whole_number("max_tokens", max_tokens, 0, _MAX_UINT32),
        prompt_name=prompt_name,
        prompt=prompt,
        priority=number_of("priority", priority, PRIORITIES),
    )


def tokenize_request(
    *,
    model: str = "",
    truncation: TruncationName | None = None,
    prompt_name: str = "",
    without_special_tokens: bool = False,
) -> pb.TokenizeRequest:
    """A request for tokens, without its inputs."""
    return pb.TokenizeRequest(
        model=_arguments.optional_text("model", model),
        truncation=number_of("truncation", truncation, TRUNCATIONS),
        prompt_name=_arguments.optional_text("prompt_name", prompt_name),
        without_special_tokens=_arguments.flag("without_special_tokens", without_special_tokens),
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


def _rows(positions: Any) -> list[int]:
    chosen = _arguments.numbers("last_hidden_state_positions", positions)
    if not chosen:  # as in `_layers`
        raise ValueError(
            "last_hidden_state_positions names no position: leave it out for all, or give a list"
        )
    return chosen


def _hidden_state_selection(hidden_states: Any) -> pb.HiddenStateSelection:
    if not isinstance(hidden_states, HiddenStates):
        return pb.HiddenStateSelection(layers=_layers("hidden_states", hidden_states))
    return pb.HiddenStateSelection(
        layers=_arguments.numbers("hidden_states.layers", hidden_states.layers),
        positions=_arguments.numbers("hidden_states.positions", hidden_states.positions),
    )


def _attention_selection(attentions: Any) -> pb.AttentionSelection:
    if not isinstance(attentions, Attentions):
        return pb.AttentionSelection(layers=_layers("attentions", attentions))
    selection = pb.AttentionSelection(
        layers=_arguments.numbers("attentions.layers", attentions.layers),
        heads=_arguments.numbers("attentions.heads", attentions.heads),
        mean_over_heads=_arguments.flag("attentions.mean_over_heads", attentions.mean_over_heads),
        query_positions=_arguments.numbers("attentions.query_positions", attentions.query_positions),
        key_positions=_arguments.numbers("attentions.key_positions", attentions.key_positions),
        pairs=_head_refs("attentions.pairs", attentions.pairs),
    )
    if selection.pairs and (selection.layers or selection.heads or selection.mean_over_heads):
        raise ValueError(
            "attentions.pairs names single heads, in place of layers, heads and mean_over_heads: leave those out"
        )
    return selection


def _head_refs(argument: str, pairs: Any) -> list[pb.HeadRef]:
    remedy = "give (layer, head)"
    refs = []
    for index, pair in enumerate(_arguments.sequence(argument, pairs, "give a list of (layer, head)")):
        name = f"{argument}[{index}]"
        numbers = _arguments.numbers(name, _arguments.sequence(name, pair, remedy))
        if len(numbers) != 2:
            raise _arguments.wrong_value(name, pair, remedy)
        refs.append(pb.HeadRef(layer=numbers[0], head=numbers[1]))
    return refs


def _logits_selection(logits: Any) -> pb.LogitsSelection:
    if isinstance(logits, bool | np.bool_):
        return pb.LogitsSelection()
    if not isinstance(logits, Logits):
        raise _arguments.wrong_type("logits", logits, "give True, or a Logits such as Logits(top_k=5)")
    return pb.LogitsSelection(
        positions=_arguments.numbers("logits.positions", logits.positions),
        top_k=_arguments.whole_number("logits.top_k", logits.top_k, 0, _MAX_UINT32),
        activation=number_of("logits.activation", logits.activation, ACTIVATIONS),
    )


def _sparse_selection(sparse: Any) -> pb.SparseSelection:
    if isinstance(sparse, bool | np.bool_):
        return pb.SparseSelection()
    if not isinstance(sparse, Sparse):
        raise _arguments.wrong_type("sparse", sparse, "give True, or a Sparse such as Sparse(top_k=64)")
    return pb.SparseSelection(top_k=_arguments.whole_number("sparse.top_k", sparse.top_k, 0, _MAX_UINT32))


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
    pooling, poolings = _poolings(embedding.pooling)
    return pb.EmbeddingSpec(
        pooling=pooling,
        poolings=poolings,
        layers=_arguments.numbers("layers", embedding.layers),
        layer_merge=number_of("layer_merge", embedding.layer_merge, LAYER_MERGES),
        # With None, protobuf leaves the field unset.
        normalize=None if normalize is None else _arguments.flag("normalize", normalize),  # type: ignore[arg-type]
        dimensions=_arguments.whole_number("dimensions", embedding.dimensions, 0, _MAX_UINT32),
        encoding=number_of("encoding", embedding.encoding, ENCODINGS),
        spans=[_span(f"spans[{index}]", one) for index, one in enumerate(spans)],
        exclude_special_tokens=_arguments.flag("exclude_special_tokens", embedding.exclude_special_tokens),
        without_projection=_arguments.flag("without_projection", embedding.without_projection),
    )


def _poolings(pooling: Any) -> tuple[Any, list[Any]]:
    """One pooling, or several; the other is unset."""
    if pooling is None or isinstance(pooling, str):
        return number_of("pooling", pooling, POOLINGS), []
    remedy = "give the name of a pooling, or a list of names"
    names = _arguments.sequence("pooling", pooling, remedy)
    if not names:
        raise ValueError(f"pooling names no pooling: give None for the configured one, or {remedy[5:]}")
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise _arguments.wrong_type(f"pooling[{index}]", name, "give the name of a pooling")
    return 0, [number_of(f"pooling[{index}]", name, POOLINGS) for index, name in enumerate(names)]


def _span(name: str, span: Any) -> pb.Span:
    if not isinstance(span, Span):
        remedy = "give a Span, or (start, end)"
        parts = _arguments.sequence(name, span, remedy)
        if len(parts) not in (2, 3):
            raise _arguments.wrong_value(name, span, remedy)
        span = Span(*parts)
    return pb.Span(
        start=_arguments.whole_number(f"{name}.start", span.start, 0, _MAX_UINT32),
        end=_arguments.whole_number(f"{name}.end", span.end, 0, _MAX_UINT32),
        unit=number_of("unit", span.unit, UNITS),
    )

"""Converts between protobuf messages and plain Python and numpy. No I/O; shared by both clients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from layertap import _arguments
from layertap._types import (
    Array,
    Attentions,
    DtypeName,
    Embedding,
    Input,
    Model,
    ModelLimits,
    Pair,
    Quantized,
    Result,
    Span,
    Timing,
    TokenIds,
    Tokens,
    Words,
)
from layertap._wire import Buffer, parse_reply, tensors
from layertap.errors import InternalError, LayertapError, of_input
from layertap.v1 import encoder_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Request = TypeVar("_Request", pb.EncodeRequest, pb.TokenizeRequest)


def _names(enum: EnumTypeWrapper, prefix: str) -> dict[str, int]:
    """The values of an enum of the contract by the names that callers use, e.g. "mean" for POOLING_MEAN."""
    names = {name.removeprefix(prefix).lower(): number for name, number in enum.items()}
    return {name: number for name, number in names.items() if number}


_POOLINGS = _names(pb.Pooling, "POOLING_")
_LAYER_MERGES = _names(pb.LayerMerge, "LAYER_MERGE_")
_ENCODINGS = _names(pb.EmbeddingEncoding, "EMBEDDING_ENCODING_")
_PRIORITIES = _names(pb.Priority, "PRIORITY_")
_UNITS = _names(pb.Span.Unit, "UNIT_")
_DTYPES = _names(pb.DataType, "DATA_TYPE_")
_WIRE_DTYPES = {name: _DTYPES[name] for name in ("float32", "float16", "bfloat16")}
_TRUNCATIONS = {"end": pb.TRUNCATION_END, "start": pb.TRUNCATION_START}

_NUMPY_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_BFLOAT16: np.dtype("<u2"),
    pb.DATA_TYPE_INT8: np.dtype("i1"),
    pb.DATA_TYPE_UINT8: np.dtype("u1"),
}


def _number(argument: str, name: str | None, known: Mapping[str, int]) -> Any:
    """The enum value for a name; 0 ("unspecified") for None."""
    if name is None:
        return 0
    try:
        return known[name]
    except (KeyError, TypeError):
        raise ValueError(f"{argument}={name!r} is not known; one of {', '.join(map(repr, known))}") from None


def _name(number: int, known: Mapping[str, int]) -> str:
    return next((name for name, value in known.items() if value == number), "")


# -------------------------------------------------------------------- requests


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
        wire_dtype=_number("dtype", dtype, _WIRE_DTYPES),
        truncation=_number("truncation", truncation, _TRUNCATIONS),
        max_tokens=_arguments.whole_number("max_tokens", max_tokens, 0, 2**32 - 1),
        prompt_name=_arguments.optional_text("prompt_name", prompt_name),
        priority=_number("priority", priority, _PRIORITIES),
    )


def tokenize_request(
    *, model: str = "", truncation: Literal["end", "start"] | None = None, prompt_name: str = ""
) -> pb.TokenizeRequest:
    """A request for tokens, without its inputs."""
    return pb.TokenizeRequest(
        model=_arguments.optional_text("model", model),
        truncation=_number("truncation", truncation, _TRUNCATIONS),
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
        pooling=_number("pooling", embedding.pooling, _POOLINGS),
        layers=_arguments.numbers("layers", embedding.layers),
        layer_merge=_number("layer_merge", embedding.layer_merge, _LAYER_MERGES),
        # With None, protobuf leaves the field unset.
        normalize=None if normalize is None else _arguments.flag("normalize", normalize),  # type: ignore[arg-type]
        dimensions=_arguments.whole_number("dimensions", embedding.dimensions, 0, (1 << 32) - 1),
        encoding=_number("encoding", embedding.encoding, _ENCODINGS),
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
        unit=_number("unit", span.unit, _UNITS),
    )


# --------------------------------------------------------------------- replies


def decode_reply(message: bytes) -> list[Result | LayertapError]:
    """The results of a serialized EncodeResponse; their arrays may be views of `message`.

    An input that failed has its error in its place.

    Raises:
        InternalError: the message does not follow the contract.
    """
    reply, buffers = parse_reply(message)
    timing = decode_timing(reply.timing)
    pairs = zip(reply.results, buffers, strict=True)
    return [decode_outcome(*pair, timing, index) for index, pair in enumerate(pairs)]


def decode_results(reply: pb.EncodeResponse, first_input: int = 0) -> list[Result | LayertapError]:
    """The results of a small reply whose tensors still hold their data. The first belongs to the caller's
    input `first_input`."""
    timing = decode_timing(reply.timing)
    return [
        decode_outcome(result, [tensor.data for tensor in tensors(result)], timing, index)
        for index, result in enumerate(reply.results, first_input)
    ]


def decode_outcome(
    result: pb.EncodeResult, buffers: Sequence[Buffer | Bytes], timing: Timing, index: int
) -> Result | LayertapError:
    """The result of the caller's input `index`, or the error with which it failed."""
    if result.status.code:
        return of_input(result.status, index)
    return decode_result(result, buffers, timing)


def decode_result(result: pb.EncodeResult, buffers: Sequence[Buffer | Bytes], timing: Timing) -> Result:
    """A result; `buffers` are the data of its tensors, in the order of `_wire.tensors`.

    Raises:
        InternalError: the size of a buffer does not match the tensor's shape.
    """
    arrays = iter([decode_tensor(*pair) for pair in zip(tensors(result), buffers, strict=True)])
    return Result(
        token_count=result.token_count,
        truncated_tokens=result.truncated_tokens,
        tokens=decode_tokens(result.tokens) if result.HasField("tokens") else None,
        last_hidden_state=next(arrays) if result.HasField("last_hidden_state") else None,
        pooler_output=next(arrays) if result.HasField("pooler_output") else None,
        hidden_states=next(arrays) if result.HasField("hidden_states") else None,
        attentions=next(arrays) if result.HasField("attentions") else None,
        embeddings=tuple(arrays),
        timing=timing,
    )


def num_bytes(tensor: pb.Tensor) -> int:
    """The size of a tensor's data in bytes, by its shape and dtype.

    Raises:
        InternalError: the dtype is not in the contract.
    """
    if tensor.dtype not in _NUMPY_DTYPES:
        raise InternalError(f"the server sent a tensor of the unknown dtype {tensor.dtype}")
    return int(math.prod(tensor.shape) * _NUMPY_DTYPES[tensor.dtype].itemsize)


def decode_tensor(tensor: pb.Tensor, buffer: Buffer | Bytes) -> Any:
    """An array that is a view of `buffer`; `Quantized` for int8.

    bfloat16 is copied, since it is converted, and so is unaligned data, since numpy is slow on it.
    """
    if len(buffer) != num_bytes(tensor):
        raise InternalError(f"the server sent {len(buffer)} bytes for a tensor of {num_bytes(tensor)}")
    array: Array = np.frombuffer(buffer, _NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)
    array = np.require(array, requirements=["ALIGNED"])
    if tensor.dtype == pb.DATA_TYPE_BFLOAT16:
        # bfloat16 has the bits of the upper half of a float32.
        wide = array.astype("<u4")
        wide <<= 16
        return wide.view("<f4")
    if tensor.dtype == pb.DATA_TYPE_INT8:
        return Quantized(array, np.array(tensor.scale, np.float32).reshape(array.shape[:-1]))
    return array


def decode_tokens(tokens: pb.Tokens) -> Tokens:
    """The parallel arrays of one input's tokens."""

    def ints(values: Sequence[int]) -> Any:
        return np.fromiter(values, np.int64, len(values))

    return Tokens(
        ids=ints(tokens.ids),
        tokens=tuple(tokens.tokens),
        type_ids=ints(tokens.type_ids),
        starts=ints(tokens.starts),
        ends=ints(tokens.ends),
        special=np.fromiter(tokens.special, np.bool_, len(tokens.special)),
        word_ids=ints(tokens.word_ids),
        sequence_ids=ints(tokens.sequence_ids),
    )


def decode_timing(timing: pb.Timing) -> Timing:
    """The times that a request took in each stage."""
    return Timing(
        tokenize_ns=timing.tokenize_ns,
        queue_ns=timing.queue_ns,
        compute_ns=timing.compute_ns,
        total_ns=timing.total_ns,
        batch_inputs=timing.batch_inputs,
        batch_tokens=timing.batch_tokens,
    )


def decode_model(model: pb.Model) -> Model:
    """The description of a served model."""
    return Model(
        name=model.name,
        architecture=model.architecture,
        revision=model.revision,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        vocab_size=model.vocab_size,
        max_tokens=model.max_tokens,
        has_pooler=model.has_pooler,
        has_attentions=model.has_attentions,
        default_pooling=_name(model.default_pooling, _POOLINGS),
        default_normalize=model.default_normalize,
        prompts=dict(model.prompts),
        compute_dtype=_name(model.compute_dtype, _DTYPES),
        device=model.device,
        limits=ModelLimits(
            max_inputs_per_request=model.limits.max_inputs_per_request,
            max_message_bytes=model.limits.max_message_bytes,
            max_result_bytes=model.limits.max_result_bytes,
        ),
        embedding_unsupported=model.embedding_unsupported,
        connections=max(model.connections, 1),
    )

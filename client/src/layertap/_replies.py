"""Makes results, tokens and models from the messages of replies. No I/O; shared by both clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from layertap._enums import DTYPES, HEADS, POOLINGS, name_of
from layertap._results import Model, ModelLimits, Quantized, Result, Timing, Tokens
from layertap._types import Array
from layertap._wire import Buffer, parse_reply, tensors
from layertap.errors import InternalError, LayertapError, of_input
from layertap.v1 import encoder_pb2 as pb

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_NOTHING = pb.EncodeRequest()
_NUMPY_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_BFLOAT16: np.dtype("<u2"),
    pb.DATA_TYPE_INT8: np.dtype("i1"),
    pb.DATA_TYPE_UINT8: np.dtype("u1"),
    pb.DATA_TYPE_INT32: np.dtype("<i4"),
}


def decode_reply(message: bytes, asked: pb.EncodeRequest | None = None) -> list[Result | LayertapError]:
    """The results of a serialized EncodeResponse; their arrays may be views of `message`.

    An input that failed has its error in its place. `asked` is the request, without its inputs.

    Raises:
        InternalError: the message does not follow the contract.
    """
    reply, buffers = parse_reply(message)
    timing = decode_timing(reply.timing)
    pairs = zip(reply.results, buffers, strict=True)
    return [decode_outcome(*pair, timing, index, asked) for index, pair in enumerate(pairs)]


def decode_results(
    reply: pb.EncodeResponse, first_input: int = 0, asked: pb.EncodeRequest | None = None
) -> list[Result | LayertapError]:
    """The results of a small reply whose tensors still hold their data. The first belongs to the caller's
    input `first_input`."""
    timing = decode_timing(reply.timing)
    return [
        decode_outcome(result, [tensor.data for tensor in tensors(result)], timing, index, asked)
        for index, result in enumerate(reply.results, first_input)
    ]


def decode_outcome(
    result: pb.EncodeResult,
    buffers: Sequence[Buffer | Bytes],
    timing: Timing,
    index: int,
    asked: pb.EncodeRequest | None = None,
) -> Result | LayertapError:
    """The result of the caller's input `index`, or the error with which it failed."""
    if result.status.code:
        return of_input(result.status, index)
    return decode_result(result, buffers, timing, asked)


def decode_result(
    result: pb.EncodeResult,
    buffers: Sequence[Buffer | Bytes],
    timing: Timing,
    asked: pb.EncodeRequest | None = None,
) -> Result:
    """A result; `buffers` are the data of its tensors, in the order of `_wire.tensors`.

    Raises:
        InternalError: the size of a buffer does not match the tensor's shape.
    """
    arrays = iter([decode_tensor(*pair) for pair in zip(tensors(result), buffers, strict=True)])
    # The arrays are taken in the order of the fields, as `tensors` lists them.
    return Result(
        token_count=result.token_count,
        truncated_tokens=result.truncated_tokens,
        tokens=decode_tokens(result.tokens) if result.HasField("tokens") else None,
        last_hidden_state=next(arrays) if result.HasField("last_hidden_state") else None,
        pooler_output=next(arrays) if result.HasField("pooler_output") else None,
        hidden_states=next(arrays) if result.HasField("hidden_states") else None,
        attentions=next(arrays) if result.HasField("attentions") else None,
        embeddings=tuple(islice(arrays, len(result.embeddings))),
        logits=next(arrays) if result.HasField("logits") else None,
        logit_ids=next(arrays) if result.HasField("logit_ids") else None,
        sparse_ids=next(arrays) if result.HasField("sparse_ids") else None,
        sparse_weights=next(arrays) if result.HasField("sparse_weights") else None,
        contacts=next(arrays) if result.HasField("contacts") else None,
        timing=timing,
        _asked=_NOTHING if asked is None else asked,
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
        default_pooling=name_of(model.default_pooling, POOLINGS),
        default_normalize=model.default_normalize,
        prompts=dict(model.prompts),
        compute_dtype=name_of(model.compute_dtype, DTYPES),
        device=model.device,
        limits=ModelLimits(
            max_inputs_per_request=model.limits.max_inputs_per_request,
            max_message_bytes=model.limits.max_message_bytes,
            max_result_bytes=model.limits.max_result_bytes,
        ),
        embedding_unsupported=model.embedding_unsupported,
        connections=max(model.connections, 1),
        head=name_of(model.head, HEADS),
        labels=tuple(model.labels),
        embedding_size=model.embedding_size,
        has_sparse=model.has_sparse,
        has_contacts=model.has_contacts,
        head_activation=model.head_activation,
    )

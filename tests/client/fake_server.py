"""A server that follows the contract in numpy: every number in a reply follows from the request.

A text's tokens are its characters, and [MASK], between [CLS] and [SEP]. Some texts have effects of their own:
see `FakeEncoder`.
"""

from __future__ import annotations

import queue
import random
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import ml_dtypes
import numpy as np
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2

from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceServicer, add_EncoderServiceServicer_to_server

from . import fake_heads

# A request that is answered last waits until no other has arrived for this long.
SLOW_S = 0.2
NUM_LAYERS, NUM_HEADS, HIDDEN_SIZE = 3, 2, 4
CLS, SEP, PAD, MASK = 1, 2, 3, 4

_DTYPES: dict[int, Any] = {
    pb.DATA_TYPE_UNSPECIFIED: np.float32,
    pb.DATA_TYPE_FLOAT32: np.float32,
    pb.DATA_TYPE_FLOAT16: np.float16,
    pb.DATA_TYPE_BFLOAT16: ml_dtypes.bfloat16,
    pb.DATA_TYPE_INT32: np.int32,
}


def token_ids(text: str) -> list[int]:
    parts = re.findall(r"\[MASK\]|.", text, re.DOTALL)
    return [CLS, *(MASK if part == "[MASK]" else 10 + ord(part) % 1000 for part in parts), SEP]


def hidden_states(ids: list[int]) -> np.ndarray:
    """(L+1, T, H)"""
    layer = np.arange(NUM_LAYERS + 1)[:, None, None]
    return np.sin(layer * 7 + np.array(ids)[None, :, None] + np.arange(HIDDEN_SIZE) / 3).astype(np.float32)


def attentions(ids: list[int]) -> np.ndarray:
    """(L, A, T, T)"""
    position = np.arange(len(ids))
    scores = np.add.outer(np.arange(NUM_LAYERS), np.arange(NUM_HEADS) / 2)[..., None, None] + np.cos(
        np.multiply.outer(np.array(ids), position + 1)
    )
    return (np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)).astype(np.float32)


def pooler_output(ids: list[int]) -> np.ndarray:
    return np.tanh(hidden_states(ids)[-1, 0])


def _select(array: np.ndarray, axis: int, indices: Any) -> np.ndarray:
    return array if not indices else np.take(array, list(indices), axis)


def _tensor(array: np.ndarray, data_type: int) -> pb.Tensor:
    data_type = data_type or pb.DATA_TYPE_FLOAT32
    return pb.Tensor(dtype=data_type, shape=array.shape, data=array.astype(_DTYPES[data_type]).tobytes())


def pooled(states: np.ndarray, pooling: int) -> np.ndarray:
    """The vector of (T, D) states; of a pooling that is not named here, the mean."""
    if pooling == pb.POOLING_MAX:
        return states.max(0)
    if pooling == pb.POOLING_WEIGHTED_MEAN:
        return np.average(states, 0, np.arange(1, len(states) + 1))
    if pooling == pb.POOLING_MEAN_SQRT_LEN:
        return states.sum(0) / np.sqrt(len(states))
    return states.mean(0)


def attention_maps(ids: list[int], wanted: pb.AttentionSelection) -> np.ndarray:
    maps = attentions(ids)
    if wanted.pairs:
        maps = np.stack([maps[pair.layer, pair.head][None] for pair in wanted.pairs])
    maps = _select(_select(maps, 0, wanted.layers), 1, wanted.heads)
    maps = maps.mean(1, keepdims=True) if wanted.mean_over_heads else maps
    return _select(_select(maps, 2, wanted.query_positions), 3, wanted.key_positions)


def _embedding(ids: list[int], spec: pb.EmbeddingSpec, wire_dtype: int) -> pb.Tensor:
    layers = _select(hidden_states(ids), 0, spec.layers or [-1])
    states = layers.sum(0) if spec.layer_merge == pb.LAYER_MERGE_SUM else np.concatenate(layers, -1)
    if spec.exclude_special_tokens:
        states = states[1:-1]
    # Each character is a word, behind [CLS].
    shift = {pb.Span.UNIT_WORD: 1}
    cuts = [(span.start + shift.get(span.unit, 0), span.end + shift.get(span.unit, 0)) for span in spec.spans]
    poolings = list(spec.poolings) or [spec.pooling]
    if poolings == [pb.POOLING_NONE]:
        vectors = states[:, : spec.dimensions or None].copy()
    else:
        rows = [states[start:end] for start, end in cuts or [(0, len(states))]]
        vectors = np.stack([np.concatenate([pooled(one, pooling) for pooling in poolings]) for one in rows])
        vectors = vectors[:, : spec.dimensions or None]
    if not spec.HasField("normalize") or spec.normalize:
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    if spec.without_projection:
        vectors = vectors * 2  # the fake's projection halves
    if not spec.spans and poolings != [pb.POOLING_NONE]:
        vectors = vectors[0]
    if spec.encoding == pb.EMBEDDING_ENCODING_INT8:
        scale = np.abs(vectors).max(-1, keepdims=True) / 127
        data = np.round(vectors / scale).astype(np.int8)
        return pb.Tensor(
            dtype=pb.DATA_TYPE_INT8, shape=data.shape, data=data.tobytes(), scale=scale.reshape(-1).tolist()
        )
    if spec.encoding == pb.EMBEDDING_ENCODING_BINARY:
        data = np.packbits(vectors > 0, axis=-1)
        return pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=data.shape, data=data.tobytes())
    return _tensor(vectors, spec.encoding or wire_dtype)


def _tokens(ids: list[int]) -> pb.Tokens:
    special = [token in (CLS, SEP) for token in ids]
    words = [-1 if one else index - 1 for index, one in enumerate(special)]
    return pb.Tokens(
        ids=ids,
        tokens=[
            {CLS: "[CLS]", SEP: "[SEP]", PAD: "[PAD]", MASK: "[MASK]"}.get(one, f"t{one}") for one in ids
        ],
        type_ids=[0] * len(ids),
        starts=[max(word, 0) for word in words],
        ends=[word + 1 for word in words],
        special=special,
        word_ids=words,
        sequence_ids=[-1 if one else 0 for one in special],
    )


@dataclass
class RequestError(Exception):
    """A request that fails, with details as real servers send them."""

    code: grpc.StatusCode
    message: str
    details: list[Message] = field(default_factory=list)

    def to_status(self) -> status_pb2.Status:
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


def invalid(path: str, text: str) -> RequestError:
    violation = details_pb2.BadRequest.FieldViolation(field=path, description=text)
    info = details_pb2.ErrorInfo(reason="INVALID_FIELD", domain="layertap")
    message = "the request has a bad field"
    return RequestError(
        grpc.StatusCode.INVALID_ARGUMENT,
        message,
        [info, details_pb2.BadRequest(field_violations=[violation])],
    )


class FakeEncoder(EncoderServiceServicer):
    """Serves "fake", and "plain" that has neither a pooler nor attentions; and the models of `fake_heads`,
    without listing them.

    The text "poison" is invalid, "busy" is refused for 1.5 seconds, "hang" waits until its call is
    over, "slow" is answered on a stream after all others, "bug" is our own fault. An input that is
    invalid or our fault fails alone where that is asked for, and otherwise its request.
    """

    def __init__(self) -> None:
        self.max_inputs = 1024
        self.max_message_bytes = 4 << 20
        self.frame_bytes = 1 << 20
        self.architecture = "bert"
        self.pad_token = ""  # this text is one token
        self.knows_fail_each_alone = True  # False: as a server from before the field existed
        self.max_result_bytes = 1 << 30  # of a request on a stream
        self.sends_whole = False  # a request on a stream is answered in one frame
        self.lose_connection_at = (
            ""  # a stream ends with UNAVAILABLE at this text, after all others are answered
        )
        self.num_unavailable = 0  # this many calls are answered with UNAVAILABLE first
        self.num_busy = 0  # this many requests are first rejected with a RetryInfo of 10 ms
        self.pushback_ms: int | None = None
        self.token: str | None = None
        self.connections = 0  # as many are advised
        self.calls: list[tuple[str, int]] = []
        self.peers: list[tuple[str, str]] = []  # of each call, with its client's address
        self.stream_over = threading.Event()
        self._random = random.Random(0)

    # ------------------------------------------------------------------ RPCs

    def Encode(self, request: pb.EncodeRequest, context: Any) -> pb.EncodeResponse:
        self._begin("Encode", len(request.inputs), context)
        with self._errors(context):
            reply = pb.EncodeResponse(results=self._results(request, context), timing=self._timing(request))
            if reply.ByteSize() > self.max_message_bytes:
                info = details_pb2.ErrorInfo(
                    reason="REPLY_TOO_LARGE", domain="layertap", metadata={"bytes": "1"}
                )
                raise RequestError(grpc.StatusCode.OUT_OF_RANGE, "the reply is too large", [info])
            return reply
        raise AssertionError

    def EncodeStream(
        self, requests: Iterator[pb.EncodeStreamRequest], context: Any
    ) -> Iterator[pb.EncodeStreamResponse]:
        self._begin("EncodeStream", 0, context)
        if not context.add_callback(self.stream_over.set):
            self.stream_over.set()
        arrived: queue.SimpleQueue[pb.EncodeStreamRequest | None] = queue.SimpleQueue()

        def read() -> None:
            try:
                for request in requests:
                    arrived.put(request)
            except grpc.RpcError:
                pass  # the caller is gone
            arrived.put(None)

        threading.Thread(target=read, daemon=True).start()
        active: list[Iterator[pb.EncodeStreamResponse]] = []
        slow: list[Iterator[pb.EncodeStreamResponse]] = []
        half_closed = False
        while not half_closed or active or slow:
            while not half_closed and (not active or not arrived.empty()):
                try:
                    message = arrived.get(timeout=SLOW_S if slow else None)
                except queue.Empty:
                    break
                if message is None:
                    half_closed = True
                elif any(one.text and one.text == self.lose_connection_at for one in message.request.inputs):
                    for frames in active:
                        yield from frames
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the connection is lost")
                else:
                    self.calls.append(("stream", len(message.request.inputs)))
                    is_slow = any(one.text in ("slow", "hang") for one in message.request.inputs)
                    (slow if is_slow else active).append(self._frames(message, context))
            if not active:
                active, slow = slow, []
                continue
            # Frames of different requests come mixed, and requests end in any order.
            frames = self._random.choice(active)
            frame = next(frames, None)
            if frame is None:
                active.remove(frames)
            else:
                yield frame

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self._begin("Tokenize", len(request.inputs), context)
        with self._errors(context):
            self._check(request)
            cut = slice(1, -1) if request.without_special_tokens else slice(None)
            return pb.TokenizeResponse(results=[_tokens(self._ids(one)[cut]) for one in request.inputs])
        raise AssertionError

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        self._begin("GetModel", 0, context)
        with self._errors(context):
            return pb.GetModelResponse(model=self._model(request.model or "fake"))
        raise AssertionError

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        self._begin("ListModels", 0, context)
        return pb.ListModelsResponse(models=map(self._model, ("fake", "plain")))

    # ----------------------------------------------------------------- parts

    def _begin(self, rpc: str, num_inputs: int, context: Any) -> None:
        self.calls.append((rpc, num_inputs))
        self.peers.append((rpc, context.peer()))
        if self.num_unavailable:
            self.num_unavailable -= 1
            if self.pushback_ms is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", str(self.pushback_ms)),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "loading")
        if self.token and ("authorization", f"Bearer {self.token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no or wrong credentials")

    @contextmanager
    def _errors(self, context: Any) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            context.set_trailing_metadata(
                (("grpc-status-details-bin", error.to_status().SerializeToString()),)
            )
            context.abort(error.code, error.message)

    def _model(self, name: str) -> pb.Model:
        if name not in ("fake", "plain", *fake_heads.MODELS):
            info = details_pb2.ErrorInfo(reason="MODEL_NOT_FOUND", metadata={"model": name})
            raise RequestError(grpc.StatusCode.NOT_FOUND, f"no model named '{name}'", [info])
        return pb.Model(
            name=name,
            architecture=self.architecture,
            hidden_size=HIDDEN_SIZE,
            num_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            vocab_size=1010,
            max_tokens=512,
            has_pooler=name != "plain",
            has_attentions=name != "plain",
            default_pooling=pb.POOLING_MEAN,
            default_normalize=True,
            prompts={"query": "query: "},
            embedding_unsupported="" if name == "fake" else "its Whitening is not known",
            compute_dtype=pb.DATA_TYPE_FLOAT32,
            device="cpu",
            limits=pb.ModelLimits(
                max_inputs_per_request=self.max_inputs,
                max_message_bytes=self.max_message_bytes,
                max_result_bytes=1 << 30,
            ),
            connections=self.connections,
            **fake_heads.MODELS.get(name, {}),
        )

    def _ids(self, one: pb.Input, prompt: str = "") -> list[int]:
        match one.WhichOneof("content"):
            case "text" if one.text and one.text == self.pad_token:
                return [CLS, PAD, SEP]
            case "text":
                return token_ids(prompt + one.text)
            case "pair":
                return [*token_ids(one.pair.first), *token_ids(one.pair.second)[1:]]
            case "words":
                return token_ids("".join(one.words.words))
        return list(one.token_ids.ids)

    def _check(self, request: pb.EncodeRequest | pb.TokenizeRequest) -> None:
        self._model(request.model or "fake")
        if isinstance(request, pb.EncodeRequest) and request.max_tokens:
            raise invalid("max_tokens", f"no max_tokens {request.max_tokens} here")
        if len(request.inputs) > self.max_inputs:
            raise invalid("inputs", f"at most {self.max_inputs} a request")
        if self.num_busy:
            self.num_busy -= 1
            retry = details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=10_000_000))
            raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", [retry])
        for index, one in enumerate(request.inputs):
            if one.text == "busy":
                retry = details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))
                raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", [retry])
            if (error := self._error_of(index, one)) is not None and not self._fails_alone(request):
                raise error

    def _fails_alone(self, request: pb.EncodeRequest | pb.TokenizeRequest) -> bool:
        return (
            self.knows_fail_each_alone and isinstance(request, pb.EncodeRequest) and request.fail_each_alone
        )

    def _error_of(self, index: int, one: pb.Input) -> RequestError | None:
        text = one.text or one.pair.second
        if text == "poison":
            return invalid(f"inputs[{index}].{one.WhichOneof('content')}", "is poison")
        if text == "bug":
            return RequestError(grpc.StatusCode.INTERNAL, "internal error 1f")
        return None

    def _results(self, request: pb.EncodeRequest, context: Any) -> list[pb.EncodeResult]:
        self._check(request)
        if any(one.text == "hang" for one in request.inputs):
            over = threading.Event()
            if context.add_callback(over.set):
                over.wait(30)
        outputs, wire = request.outputs, request.wire_dtype
        lacks = request.model == "plain" and (outputs.pooler_output or outputs.HasField("attentions"))
        if lacks or fake_heads.lacks(request.model, outputs):
            raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, "this model has no such output")
        results = []
        for index, one in enumerate(request.inputs):
            if (error := self._error_of(index, one)) is not None:
                results.append(pb.EncodeResult(status=error.to_status()))
                continue
            ids = self._ids(one, request.prompt)
            result = pb.EncodeResult(token_count=len(ids), truncated_tokens=int(request.truncation))
            if outputs.tokens:
                result.tokens.CopyFrom(_tokens(ids))
            if outputs.last_hidden_state:
                rows = _select(hidden_states(ids)[-1], 0, outputs.last_hidden_state_positions)
                result.last_hidden_state.CopyFrom(_tensor(rows, wire))
            if outputs.pooler_output:
                result.pooler_output.CopyFrom(_tensor(pooler_output(ids), wire))
            if outputs.HasField("hidden_states"):
                wanted = outputs.hidden_states
                chosen = _select(_select(hidden_states(ids), 0, wanted.layers), 1, wanted.positions)
                result.hidden_states.CopyFrom(_tensor(chosen, wire))
            if outputs.HasField("attentions"):
                result.attentions.CopyFrom(_tensor(attention_maps(ids, outputs.attentions), wire))
            result.embeddings.extend(_embedding(ids, spec, wire) for spec in outputs.embeddings)
            fake_heads.fill(result, request, ids, _tensor)
            results.append(result)
        return results

    def _timing(self, request: pb.EncodeRequest) -> pb.Timing:
        return pb.Timing(
            tokenize_ns=1,
            queue_ns=2,
            compute_ns=3,
            total_ns=7,
            batch_inputs=len(request.inputs),
            batch_tokens=9,
        )

    def _frames(self, message: pb.EncodeStreamRequest, context: Any) -> Iterator[pb.EncodeStreamResponse]:
        def frame(**content: Any) -> pb.EncodeStreamResponse:
            return pb.EncodeStreamResponse(request_id=message.request_id, **content)

        try:
            results = self._results(message.request, context)
            if sum(result.ByteSize() for result in results) > self.max_result_bytes:
                raise RequestError(grpc.StatusCode.OUT_OF_RANGE, "the result is too large")
        except RequestError as error:
            yield frame(end=pb.RequestEnd(status=error.to_status()))
            return
        if self.sends_whole and message.accepts_whole:
            yield frame(whole=pb.EncodeResponse(results=results, timing=self._timing(message.request)))
            return
        inputs = [self._input_frames(index, result) for index, result in enumerate(results)]
        while inputs:  # frames of different inputs come mixed as well
            frames = self._random.choice(inputs)
            content = next(frames, None)
            if content is None:
                inputs.remove(frames)
            else:
                yield frame(**content)
        yield frame(end=pb.RequestEnd(timing=self._timing(message.request)))

    def _input_frames(self, index: int, result: pb.EncodeResult) -> Iterator[dict[str, Any]]:
        fields = sorted(result.ListFields(), key=lambda pair: pair[0].number)
        tensors = [
            tensor
            for field, value in fields
            if field.message_type is pb.Tensor.DESCRIPTOR
            for tensor in (value if field.name == "embeddings" else [value])
        ]
        data = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.ClearField("data")
        yield {"header": pb.ResultHeader(input_index=index, result=result)}
        for number, buffer in enumerate(data):
            for offset in range(0, len(buffer), self.frame_bytes):
                piece = buffer[offset : offset + self.frame_bytes]
                yield {"chunk": pb.TensorChunk(input_index=index, tensor=number, offset=offset, data=piece)}


@contextmanager
def serving(
    fake: FakeEncoder, address: str = "127.0.0.1:0", credentials: Any = None, num_threads: int = 8
) -> Iterator[str]:
    """Serves it; gives the address."""
    server = grpc.server(ThreadPoolExecutor(num_threads))
    add_EncoderServiceServicer_to_server(fake, server)
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    server.start()
    try:
        yield address.replace(":0", f":{port}")
    finally:
        server.stop(None).wait()

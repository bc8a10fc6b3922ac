from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Truncation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATION_UNSPECIFIED: _ClassVar[Truncation]
    TRUNCATION_NONE: _ClassVar[Truncation]
    TRUNCATION_END: _ClassVar[Truncation]
    TRUNCATION_START: _ClassVar[Truncation]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]

class Activation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTIVATION_UNSPECIFIED: _ClassVar[Activation]
    ACTIVATION_NONE: _ClassVar[Activation]
    ACTIVATION_SOFTMAX: _ClassVar[Activation]
    ACTIVATION_SIGMOID: _ClassVar[Activation]

class Pooling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOLING_UNSPECIFIED: _ClassVar[Pooling]
    POOLING_MEAN: _ClassVar[Pooling]
    POOLING_CLS: _ClassVar[Pooling]
    POOLING_MAX: _ClassVar[Pooling]
    POOLING_LAST_TOKEN: _ClassVar[Pooling]
    POOLING_MEAN_MAX: _ClassVar[Pooling]
    POOLING_POOLER: _ClassVar[Pooling]
    POOLING_NONE: _ClassVar[Pooling]
    POOLING_WEIGHTED_MEAN: _ClassVar[Pooling]
    POOLING_MEAN_SQRT_LEN: _ClassVar[Pooling]

class LayerMerge(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYER_MERGE_UNSPECIFIED: _ClassVar[LayerMerge]
    LAYER_MERGE_CONCAT: _ClassVar[LayerMerge]
    LAYER_MERGE_MEAN: _ClassVar[LayerMerge]
    LAYER_MERGE_SUM: _ClassVar[LayerMerge]

class EmbeddingEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EMBEDDING_ENCODING_UNSPECIFIED: _ClassVar[EmbeddingEncoding]
    EMBEDDING_ENCODING_FLOAT32: _ClassVar[EmbeddingEncoding]
    EMBEDDING_ENCODING_FLOAT16: _ClassVar[EmbeddingEncoding]
    EMBEDDING_ENCODING_BFLOAT16: _ClassVar[EmbeddingEncoding]
    EMBEDDING_ENCODING_INT8: _ClassVar[EmbeddingEncoding]
    EMBEDDING_ENCODING_BINARY: _ClassVar[EmbeddingEncoding]

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
    DATA_TYPE_INT8: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_INT32: _ClassVar[DataType]

class HeadKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HEAD_KIND_UNSPECIFIED: _ClassVar[HeadKind]
    HEAD_KIND_SEQUENCE_CLASSIFICATION: _ClassVar[HeadKind]
    HEAD_KIND_TOKEN_CLASSIFICATION: _ClassVar[HeadKind]
    HEAD_KIND_MASKED_LANGUAGE: _ClassVar[HeadKind]
TRUNCATION_UNSPECIFIED: Truncation
TRUNCATION_NONE: Truncation
TRUNCATION_END: Truncation
TRUNCATION_START: Truncation
PRIORITY_UNSPECIFIED: Priority
PRIORITY_LOW: Priority
PRIORITY_NORMAL: Priority
PRIORITY_HIGH: Priority
ACTIVATION_UNSPECIFIED: Activation
ACTIVATION_NONE: Activation
ACTIVATION_SOFTMAX: Activation
ACTIVATION_SIGMOID: Activation
POOLING_UNSPECIFIED: Pooling
POOLING_MEAN: Pooling
POOLING_CLS: Pooling
POOLING_MAX: Pooling
POOLING_LAST_TOKEN: Pooling
POOLING_MEAN_MAX: Pooling
POOLING_POOLER: Pooling
POOLING_NONE: Pooling
POOLING_WEIGHTED_MEAN: Pooling
POOLING_MEAN_SQRT_LEN: Pooling
LAYER_MERGE_UNSPECIFIED: LayerMerge
LAYER_MERGE_CONCAT: LayerMerge
LAYER_MERGE_MEAN: LayerMerge
LAYER_MERGE_SUM: LayerMerge
EMBEDDING_ENCODING_UNSPECIFIED: EmbeddingEncoding
EMBEDDING_ENCODING_FLOAT32: EmbeddingEncoding
EMBEDDING_ENCODING_FLOAT16: EmbeddingEncoding
EMBEDDING_ENCODING_BFLOAT16: EmbeddingEncoding
EMBEDDING_ENCODING_INT8: EmbeddingEncoding
EMBEDDING_ENCODING_BINARY: EmbeddingEncoding
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_BFLOAT16: DataType
DATA_TYPE_INT8: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_INT32: DataType
HEAD_KIND_UNSPECIFIED: HeadKind
HEAD_KIND_SEQUENCE_CLASSIFICATION: HeadKind
HEAD_KIND_TOKEN_CLASSIFICATION: HeadKind
HEAD_KIND_MASKED_LANGUAGE: HeadKind

class EncodeRequest(_message.Message):
    __slots__ = ("model", "inputs", "outputs", "wire_dtype", "truncation", "prompt_name", "priority", "max_tokens", "prompt", "fail_each_alone")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_NAME_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    FAIL_EACH_ALONE_FIELD_NUMBER: _ClassVar[int]
    model: str
    inputs: _containers.RepeatedCompositeFieldContainer[Input]
    outputs: OutputSelection
    wire_dtype: DataType
    truncation: Truncation
    prompt_name: str
    priority: Priority
    max_tokens: int
    prompt: str
    fail_each_alone: bool
    def __init__(self, model: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., outputs: _Optional[_Union[OutputSelection, _Mapping]] = ..., wire_dtype: _Optional[_Union[DataType, str]] = ..., truncation: _Optional[_Union[Truncation, str]] = ..., prompt_name: _Optional[str] = ..., priority: _Optional[_Union[Priority, str]] = ..., max_tokens: _Optional[int] = ..., prompt: _Optional[str] = ..., fail_each_alone: bool = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("text", "pair", "token_ids", "words")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PAIR_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    pair: TextPair
    token_ids: TokenIds
    words: Words
    def __init__(self, text: _Optional[str] = ..., pair: _Optional[_Union[TextPair, _Mapping]] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., words: _Optional[_Union[Words, _Mapping]] = ...) -> None: ...

class TextPair(_message.Message):
    __slots__ = ("first", "second")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    first: str
    second: str
    def __init__(self, first: _Optional[str] = ..., second: _Optional[str] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids", "type_ids")
    IDS_FIELD_NUMBER: _ClassVar[int]
    TYPE_IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    type_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., type_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Words(_message.Message):
    __slots__ = ("words",)
    WORDS_FIELD_NUMBER: _ClassVar[int]
    words: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, words: _Optional[_Iterable[str]] = ...) -> None: ...

class OutputSelection(_message.Message):
    __slots__ = ("last_hidden_state", "pooler_output", "hidden_states", "attentions", "embeddings", "tokens", "last_hidden_state_positions", "logits", "sparse", "contacts")
    LAST_HIDDEN_STATE_FIELD_NUMBER: _ClassVar[int]
    POOLER_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    ATTENTIONS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAST_HIDDEN_STATE_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    CONTACTS_FIELD_NUMBER: _ClassVar[int]
    last_hidden_state: bool
    pooler_output: bool
    hidden_states: HiddenStateSelection
    attentions: AttentionSelection
    embeddings: _containers.RepeatedCompositeFieldContainer[EmbeddingSpec]
    tokens: bool
    last_hidden_state_positions: _containers.RepeatedScalarFieldContainer[int]
    logits: LogitsSelection
    sparse: SparseSelection
    contacts: bool
    def __init__(self, last_hidden_state: bool = ..., pooler_output: bool = ..., hidden_states: _Optional[_Union[HiddenStateSelection, _Mapping]] = ..., attentions: _Optional[_Union[AttentionSelection, _Mapping]] = ..., embeddings: _Optional[_Iterable[_Union[EmbeddingSpec, _Mapping]]] = ..., tokens: bool = ..., last_hidden_state_positions: _Optional[_Iterable[int]] = ..., logits: _Optional[_Union[LogitsSelection, _Mapping]] = ..., sparse: _Optional[_Union[SparseSelection, _Mapping]] = ..., contacts: bool = ...) -> None: ...

class HiddenStateSelection(_message.Message):
    __slots__ = ("layers", "positions")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layers: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class AttentionSelection(_message.Message):
    __slots__ = ("layers", "heads", "mean_over_heads", "query_positions", "key_positions", "pairs")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    MEAN_OVER_HEADS_FIELD_NUMBER: _ClassVar[int]
    QUERY_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    KEY_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    heads: _containers.RepeatedScalarFieldContainer[int]
    mean_over_heads: bool
    query_positions: _containers.RepeatedScalarFieldContainer[int]
    key_positions: _containers.RepeatedScalarFieldContainer[int]
    pairs: _containers.RepeatedCompositeFieldContainer[HeadRef]
    def __init__(self, layers: _Optional[_Iterable[int]] = ..., heads: _Optional[_Iterable[int]] = ..., mean_over_heads: bool = ..., query_positions: _Optional[_Iterable[int]] = ..., key_positions: _Optional[_Iterable[int]] = ..., pairs: _Optional[_Iterable[_Union[HeadRef, _Mapping]]] = ...) -> None: ...

class HeadRef(_message.Message):
    __slots__ = ("layer", "head")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    layer: int
    head: int
    def __init__(self, layer: _Optional[int] = ..., head: _Optional[int] = ...) -> None: ...

class LogitsSelection(_message.Message):
    __slots__ = ("positions", "top_k", "activation")
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    top_k: int
    activation: Activation
    def __init__(self, positions: _Optional[_Iterable[int]] = ..., top_k: _Optional[int] = ..., activation: _Optional[_Union[Activation, str]] = ...) -> None: ...

class SparseSelection(_message.Message):
    __slots__ = ("top_k",)
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    top_k: int
    def __init__(self, top_k: _Optional[int] = ...) -> None: ...

class EmbeddingSpec(_message.Message):
    __slots__ = ("pooling", "layers", "layer_merge", "normalize", "dimensions", "encoding", "spans", "poolings", "exclude_special_tokens", "without_projection")
    POOLING_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    LAYER_MERGE_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    POOLINGS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_PROJECTION_FIELD_NUMBER: _ClassVar[int]
    pooling: Pooling
    layers: _containers.RepeatedScalarFieldContainer[int]
    layer_merge: LayerMerge
    normalize: bool
    dimensions: int
    encoding: EmbeddingEncoding
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    poolings: _containers.RepeatedScalarFieldContainer[Pooling]
    exclude_special_tokens: bool
    without_projection: bool
    def __init__(self, pooling: _Optional[_Union[Pooling, str]] = ..., layers: _Optional[_Iterable[int]] = ..., layer_merge: _Optional[_Union[LayerMerge, str]] = ..., normalize: bool = ..., dimensions: _Optional[int] = ..., encoding: _Optional[_Union[EmbeddingEncoding, str]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., poolings: _Optional[_Iterable[_Union[Pooling, str]]] = ..., exclude_special_tokens: bool = ..., without_projection: bool = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("start", "end", "unit")
    class Unit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNIT_UNSPECIFIED: _ClassVar[Span.Unit]
        UNIT_CHARACTER: _ClassVar[Span.Unit]
        UNIT_TOKEN: _ClassVar[Span.Unit]
        UNIT_WORD: _ClassVar[Span.Unit]
    UNIT_UNSPECIFIED: Span.Unit
    UNIT_CHARACTER: Span.Unit
    UNIT_TOKEN: Span.Unit
    UNIT_WORD: Span.Unit
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    unit: Span.Unit
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., unit: _Optional[_Union[Span.Unit, str]] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("results", "timing")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[EncodeResult]
    timing: Timing
    def __init__(self, results: _Optional[_Iterable[_Union[EncodeResult, _Mapping]]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class EncodeResult(_message.Message):
    __slots__ = ("token_count", "truncated_tokens", "tokens", "last_hidden_state", "pooler_output", "hidden_states", "attentions", "embeddings", "logits", "logit_ids", "sparse_ids", "sparse_weights", "contacts", "status")
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAST_HIDDEN_STATE_FIELD_NUMBER: _ClassVar[int]
    POOLER_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    ATTENTIONS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_IDS_FIELD_NUMBER: _ClassVar[int]
    SPARSE_IDS_FIELD_NUMBER: _ClassVar[int]
    SPARSE_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    CONTACTS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    token_count: int
    truncated_tokens: int
    tokens: Tokens
    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: Tensor
    attentions: Tensor
    embeddings: _containers.RepeatedCompositeFieldContainer[Tensor]
    logits: Tensor
    logit_ids: Tensor
    sparse_ids: Tensor
    sparse_weights: Tensor
    contacts: Tensor
    status: _status_pb2.Status
    def __init__(self, token_count: _Optional[int] = ..., truncated_tokens: _Optional[int] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., last_hidden_state: _Optional[_Union[Tensor, _Mapping]] = ..., pooler_output: _Optional[_Union[Tensor, _Mapping]] = ..., hidden_states: _Optional[_Union[Tensor, _Mapping]] = ..., attentions: _Optional[_Union[Tensor, _Mapping]] = ..., embeddings: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., logits: _Optional[_Union[Tensor, _Mapping]] = ..., logit_ids: _Optional[_Union[Tensor, _Mapping]] = ..., sparse_ids: _Optional[_Union[Tensor, _Mapping]] = ..., sparse_weights: _Optional[_Union[Tensor, _Mapping]] = ..., contacts: _Optional[_Union[Tensor, _Mapping]] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("ids", "tokens", "type_ids", "starts", "ends", "special", "word_ids", "sequence_ids")
    IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TYPE_IDS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_FIELD_NUMBER: _ClassVar[int]
    WORD_IDS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    type_ids: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    ends: _containers.RepeatedScalarFieldContainer[int]
    special: _containers.RepeatedScalarFieldContainer[bool]
    word_ids: _containers.RepeatedScalarFieldContainer[int]
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[str]] = ..., type_ids: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[int]] = ..., ends: _Optional[_Iterable[int]] = ..., special: _Optional[_Iterable[bool]] = ..., word_ids: _Optional[_Iterable[int]] = ..., sequence_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "scale", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    scale: _containers.RepeatedScalarFieldContainer[float]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., scale: _Optional[_Iterable[float]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("tokenize_ns", "queue_ns", "compute_ns", "total_ns", "batch_inputs", "batch_tokens")
    TOKENIZE_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    BATCH_INPUTS_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokenize_ns: int
    queue_ns: int
    compute_ns: int
    total_ns: int
    batch_inputs: int
    batch_tokens: int
    def __init__(self, tokenize_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., compute_ns: _Optional[int] = ..., total_ns: _Optional[int] = ..., batch_inputs: _Optional[int] = ..., batch_tokens: _Optional[int] = ...) -> None: ...

class EncodeStreamRequest(_message.Message):
    __slots__ = ("request_id", "request", "accepts_whole", "accepts_grouped")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_WHOLE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_GROUPED_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    request: EncodeRequest
    accepts_whole: bool
    accepts_grouped: bool
    def __init__(self, request_id: _Optional[int] = ..., request: _Optional[_Union[EncodeRequest, _Mapping]] = ..., accepts_whole: bool = ..., accepts_grouped: bool = ...) -> None: ...

class EncodeStreamResponse(_message.Message):
    __slots__ = ("request_id", "header", "chunk", "end", "whole", "grouped")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    GROUPED_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    header: ResultHeader
    chunk: TensorChunk
    end: RequestEnd
    whole: EncodeResponse
    grouped: FrameGroup
    def __init__(self, request_id: _Optional[int] = ..., header: _Optional[_Union[ResultHeader, _Mapping]] = ..., chunk: _Optional[_Union[TensorChunk, _Mapping]] = ..., end: _Optional[_Union[RequestEnd, _Mapping]] = ..., whole: _Optional[_Union[EncodeResponse, _Mapping]] = ..., grouped: _Optional[_Union[FrameGroup, _Mapping]] = ...) -> None: ...

class FrameGroup(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[EncodeStreamResponse]
    def __init__(self, frames: _Optional[_Iterable[_Union[EncodeStreamResponse, _Mapping]]] = ...) -> None: ...

class ResultHeader(_message.Message):
    __slots__ = ("input_index", "result")
    INPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    input_index: int
    result: EncodeResult
    def __init__(self, input_index: _Optional[int] = ..., result: _Optional[_Union[EncodeResult, _Mapping]] = ...) -> None: ...

class TensorChunk(_message.Message):
    __slots__ = ("input_index", "tensor", "offset", "data")
    INPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    input_index: int
    tensor: int
    offset: int
    data: bytes
    def __init__(self, input_index: _Optional[int] = ..., tensor: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class RequestEnd(_message.Message):
    __slots__ = ("status", "timing")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    status: _status_pb2.Status
    timing: Timing
    def __init__(self, status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("model", "inputs", "truncation", "prompt_name", "without_special_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_NAME_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    inputs: _containers.RepeatedCompositeFieldContainer[Input]
    truncation: Truncation
    prompt_name: str
    without_special_tokens: bool
    def __init__(self, model: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., truncation: _Optional[_Union[Truncation, str]] = ..., prompt_name: _Optional[str] = ..., without_special_tokens: bool = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Tokens]
    def __init__(self, results: _Optional[_Iterable[_Union[Tokens, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "architecture", "revision", "hidden_size", "num_layers", "num_attention_heads", "vocab_size", "max_tokens", "has_pooler", "has_attentions", "default_pooling", "default_normalize", "prompts", "compute_dtype", "device", "limits", "head", "labels", "embedding_size", "has_sparse", "embedding_unsupported", "connections", "has_contacts", "head_activation")
    class PromptsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTENTION_HEADS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HAS_POOLER_FIELD_NUMBER: _ClassVar[int]
    HAS_ATTENTIONS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_POOLING_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_SIZE_FIELD_NUMBER: _ClassVar[int]
    HAS_SPARSE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_UNSUPPORTED_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    HAS_CONTACTS_FIELD_NUMBER: _ClassVar[int]
    HEAD_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    revision: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    vocab_size: int
    max_tokens: int
    has_pooler: bool
    has_attentions: bool
    default_pooling: Pooling
    default_normalize: bool
    prompts: _containers.ScalarMap[str, str]
    compute_dtype: DataType
    device: str
    limits: ModelLimits
    head: HeadKind
    labels: _containers.RepeatedScalarFieldContainer[str]
    embedding_size: int
    has_sparse: bool
    embedding_unsupported: str
    connections: int
    has_contacts: bool
    head_activation: str
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., revision: _Optional[str] = ..., hidden_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_attention_heads: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_tokens: _Optional[int] = ..., has_pooler: bool = ..., has_attentions: bool = ..., default_pooling: _Optional[_Union[Pooling, str]] = ..., default_normalize: bool = ..., prompts: _Optional[_Mapping[str, str]] = ..., compute_dtype: _Optional[_Union[DataType, str]] = ..., device: _Optional[str] = ..., limits: _Optional[_Union[ModelLimits, _Mapping]] = ..., head: _Optional[_Union[HeadKind, str]] = ..., labels: _Optional[_Iterable[str]] = ..., embedding_size: _Optional[int] = ..., has_sparse: bool = ..., embedding_unsupported: _Optional[str] = ..., connections: _Optional[int] = ..., has_contacts: bool = ..., head_activation: _Optional[str] = ...) -> None: ...

class ModelLimits(_message.Message):
    __slots__ = ("max_inputs_per_request", "max_message_bytes", "max_result_bytes")
    MAX_INPUTS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_RESULT_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_inputs_per_request: int
    max_message_bytes: int
    max_result_bytes: int
    def __init__(self, max_inputs_per_request: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_result_bytes: _Optional[int] = ...) -> None: ...

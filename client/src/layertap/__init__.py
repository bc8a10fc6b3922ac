"""Client for Layertap, which serves the inner outputs of encoder models over gRPC."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from layertap._aio import AsyncClient
from layertap._client import Client
from layertap._embed import EmbedOptions
from layertap._encoders.cross import CrossEncoder
from layertap._encoders.dense import SentenceEncoder
from layertap._encoders.sparse import SparseEncoder
from layertap._frames import to_pandas
from layertap._pictures.to_bertviz import bertviz
from layertap._results import Model, ModelLimits, Quantized, Ranked, Result, Timing, Tokens
from layertap._saved import SavedResults, load, save
from layertap._selection import Selection
from layertap._transport import TLS
from layertap._types import (
    Attentions,
    Embedding,
    EncodeOptions,
    HiddenStates,
    Logits,
    Pair,
    Span,
    Sparse,
    TokenIds,
    Words,
)
from layertap.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    LayertapError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from layertap.remote_model import ModelOutput, RemoteConfig, RemoteModel

__all__ = [
    "TLS",
    "AsyncClient",
    "Attentions",
    "Cancelled",
    "Client",
    "CrossEncoder",
    "DeadlineExceeded",
    "EmbedOptions",
    "Embedding",
    "EncodeOptions",
    "FailedPrecondition",
    "HiddenStates",
    "InternalError",
    "InvalidArgument",
    "LayertapError",
    "Logits",
    "Model",
    "ModelLimits",
    "ModelOutput",
    "NotFound",
    "OutOfRange",
    "Pair",
    "PermissionDenied",
    "Quantized",
    "Ranked",
    "RemoteConfig",
    "RemoteModel",
    "ResourceExhausted",
    "Result",
    "SavedResults",
    "Selection",
    "SentenceEncoder",
    "Span",
    "Sparse",
    "SparseEncoder",
    "Timing",
    "TokenIds",
    "Tokens",
    "Unauthenticated",
    "Unavailable",
    "Words",
    "bertviz",
    "load",
    "save",
    "to_pandas",
]

try:
    __version__ = _version("layertap")
except _PackageNotFoundError:  # run from the source tree, without an installation
    __version__ = "unknown"

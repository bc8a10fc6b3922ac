"""The names that callers use for the values of the contract's enums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from layertap.v1 import encoder_pb2 as pb


def _names(enum: EnumTypeWrapper, prefix: str) -> dict[str, int]:
    """The values of an enum of the contract by the names that callers use, e.g. "mean" for POOLING_MEAN."""
    names = {name.removeprefix(prefix).lower(): number for name, number in enum.items()}
    return {name: number for name, number in names.items() if number}


POOLINGS = _names(pb.Pooling, "POOLING_")
LAYER_MERGES = _names(pb.LayerMerge, "LAYER_MERGE_")
ENCODINGS = _names(pb.EmbeddingEncoding, "EMBEDDING_ENCODING_")
PRIORITIES = _names(pb.Priority, "PRIORITY_")
ACTIVATIONS = _names(pb.Activation, "ACTIVATION_")
HEADS = _names(pb.HeadKind, "HEAD_KIND_")
UNITS = _names(pb.Span.Unit, "UNIT_")
DTYPES = _names(pb.DataType, "DATA_TYPE_")
WIRE_DTYPES = {name: DTYPES[name] for name in ("float32", "float16", "bfloat16")}
TRUNCATIONS = {"end": pb.TRUNCATION_END, "start": pb.TRUNCATION_START}


def number_of(argument: str, name: str | None, known: Mapping[str, int]) -> Any:
    """The enum value for a name; 0 ("unspecified") for None."""
    if name is None:
        return 0
    try:
        return known[name]
    except (KeyError, TypeError):
        raise ValueError(f"{argument}={name!r} is not known; one of {', '.join(map(repr, known))}") from None


def name_of(number: int, known: Mapping[str, int]) -> str:
    """The name of an enum value; empty if it has none."""
    return next((name for name, value in known.items() if value == number), "")

"""The enums of the contract, as plain data.

They have the contract's numbers, so that a constructor call converts them.
"""

from __future__ import annotations

from enum import IntEnum


class DType(IntEnum):
    """`layertap.v1.DataType`."""

    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    INT8 = 4
    UINT8 = 5
    INT32 = 6

    @property
    def itemsize(self) -> int:
        return {DType.FLOAT32: 4, DType.INT32: 4, DType.FLOAT16: 2, DType.BFLOAT16: 2}.get(self, 1)


class Pooling(IntEnum):
    """`layertap.v1.Pooling`."""

    MEAN = 1
    CLS = 2
    MAX = 3
    LAST_TOKEN = 4
    MEAN_MAX = 5
    POOLER = 6
    # None: a vector for each token.
    NONE = 7
    # The mean, where a token's weight is its position in its text, from 1.
    WEIGHTED_MEAN = 8
    # The sum, divided by the square root of the number of tokens.
    MEAN_SQRT_LEN = 9


def concatenated(pooling: Pooling | tuple[Pooling, ...]) -> tuple[Pooling, ...]:
    """The single poolings whose vectors are concatenated."""
    if isinstance(pooling, tuple):
        return pooling
    return (Pooling.MEAN, Pooling.MAX) if pooling is Pooling.MEAN_MAX else (pooling,)


class LayerMerge(IntEnum):
    """`layertap.v1.LayerMerge`."""

    CONCAT = 1
    MEAN = 2
    SUM = 3


class Encoding(IntEnum):
    """`layertap.v1.EmbeddingEncoding`."""

    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    INT8 = 4
    BINARY = 5

    @property
    def dtype(self) -> DType:
        return DType.UINT8 if self is Encoding.BINARY else DType(self.value)


class Activation(IntEnum):
    """`layertap.v1.Activation`."""

    NONE = 1
    SOFTMAX = 2
    SIGMOID = 3


class HeadKind(IntEnum):
    """`layertap.v1.HeadKind`."""

    NONE = 0
    SEQUENCE_CLASSIFICATION = 1
    TOKEN_CLASSIFICATION = 2
    MASKED_LANGUAGE = 3

    @property
    def scores_tokens(self) -> bool:
        return self in (HeadKind.TOKEN_CLASSIFICATION, HeadKind.MASKED_LANGUAGE)


class OutputField(IntEnum):
    """Field numbers of the tensors in `layertap.v1.EncodeResult`, which is also their order."""

    LAST_HIDDEN_STATE = 4
    POOLER_OUTPUT = 5
    HIDDEN_STATES = 6
    ATTENTIONS = 7
    EMBEDDINGS = 8
    LOGITS = 9
    LOGIT_IDS = 10
    SPARSE_IDS = 11
    SPARSE_WEIGHTS = 12
    CONTACTS = 14

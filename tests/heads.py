"""Tiny checkpoints with heads, and the scores that transformers itself computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import families
from layertap.v1 import encoder_pb2 as pb

CLASSES: dict[str, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "masked": AutoModelForMaskedLM,
}
LABELS = ("fine", "poor", "neither")
NUMPY_DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<f2"), 3: np.dtype("<u2"), 6: np.dtype("<i4")}


def build(
    family: str,
    kind: str,
    folder: Path,
    *,
    num_layers: int = 2,
    gain: float = 1.0,
    labels: Sequence[str] = LABELS,
    **settings: Any,
) -> None:
    """Saves a tiny model of the family with a head of the kind, and its tokenizer."""
    families.build(family, folder, num_layers=num_layers, gain=gain)
    config = AutoConfig.from_pretrained(folder, **settings)
    if kind != "masked":
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    model = CLASSES[kind].from_config(config)
    families._randomize(model, seed=sum(f"{family} {kind}".encode()), gain=gain)
    model.save_pretrained(folder)


def read(folder: Path, kind: str) -> Any:
    """The model as transformers itself reads it, with its own eager attention."""
    return CLASSES[kind].from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def own_logits(model: Any, ids: Sequence[int], types: Sequence[int] | None = None) -> np.ndarray[Any, Any]:
    """(labels,) or (T, labels) of one text, computed by itself."""
    inputs = {"input_ids": torch.tensor([list(ids)])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if types is not None:
        inputs["token_type_ids"] = torch.tensor([list(types)])
    logits: np.ndarray[Any, Any] = model(**inputs).logits[0].numpy()
    return logits


def array_of(tensor: pb.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's values; bfloat16 as float32."""
    values = np.frombuffer(tensor.data, NUMPY_DTYPES[tensor.dtype])
    if tensor.dtype == pb.DATA_TYPE_BFLOAT16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(tuple(tensor.shape))

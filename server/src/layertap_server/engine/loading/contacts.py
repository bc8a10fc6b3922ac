"""Finds the contact head of a protein model, and checks that its contact maps are those of the model itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from layertap_server.engine.contacts import ContactHead
from layertap_server.engine.engine import Engine
from layertap_server.engine.loading.checkpoint import one_line
from layertap_server.engine.loading.reference import Reference, attention_named, model_inputs
from layertap_server.engine.loading.verification import AGREEMENT, SLACK, difference_of
from layertap_server.engine.model import LoadedModel
from layertap_server.enums import DType
from layertap_server.plan import NUM_OUTER_TOKENS, OutputPlan, Work

logger = logging.getLogger(__name__)

# The texts whose contact maps are compared.
NUM_TEXTS = 3


def contact_head_of(
    model: Any, missing: set[str], num_layers: int, num_heads: int, device: torch.device
) -> ContactHead | None:
    """The contact head of the model; None if it has none, or none whose weights the checkpoint has."""
    head = getattr(model, "contact_head", None)
    regression, eos_id = getattr(head, "regression", None), getattr(head, "eos_idx", None)
    if not isinstance(regression, nn.Linear) or not isinstance(eos_id, int):
        return None
    if any(key.startswith("contact_head") for key in missing):
        return None
    if regression.weight.shape != (1, num_layers * num_heads):
        return None
    weights = regression.weight.detach().float().view(num_layers, num_heads).clone().to(device)
    return ContactHead(weights, 0.0 if regression.bias is None else float(regression.bias), eos_id)


def with_own_contacts(model: Any, device: torch.device, texts: Sequence[Reference]) -> list[Reference]:
    """The references, where a few of them have the model's own contact map. The code that computes it may be
    anyone's: if it fails, none has one."""
    found = list(texts)
    chosen = [
        place
        for place, text in enumerate(texts)
        if text.maps is not None and text.num_tokens > NUM_OUTER_TOKENS
    ]
    try:
        for place in chosen[:NUM_TEXTS]:
            text = texts[place]
            inputs = model_inputs(device, text.input_ids, None)
            with torch.inference_mode(), attention_named(model, "eager"):
                own = model.predict_contacts(inputs["input_ids"], inputs["attention_mask"])[0]
            found[place] = replace(text, contacts=own)
    except Exception as error:
        logger.debug("the contact map cannot be computed by the model's own code: %s", one_line(error))
        return list(texts)
    return found


def with_contacts(loaded: LoadedModel, references: Sequence[Reference]) -> LoadedModel:
    """The model with its contact head, if its contact maps, computed as requests will be, are those of the
    model's own code; else without it."""
    if loaded.contact_head is None:
        return loaded
    ready = replace(loaded, facts=replace(loaded.facts, has_contacts=True))
    texts = [text for text in references if text.contacts is not None]
    difference: str | None = "cannot be compared with that of the original model"
    if texts:
        try:
            difference = difference_in(ready, texts)
        except Exception as error:  # the device, its driver or its compiler may raise anything
            difference = f"cannot be computed: {one_line(error)}"
    if difference is None:
        return ready
    logger.warning("%s: its contact map is not served: it %s", loaded.facts.name, difference)
    return replace(loaded, contact_head=None)


def difference_in(loaded: LoadedModel, texts: Sequence[Reference]) -> str | None:
    """How the contact maps of a batch of these texts differ from the model's own; None if they agree."""
    plan = OutputPlan(DType.FLOAT32, contacts=True)
    works = [
        Work(text.input_ids, text.token_type_ids, plan, plan.specs(text.num_tokens, loaded.facts.hidden_size))
        for text in texts
    ]
    for text, (output,) in zip(texts, Engine(loaded).run(works), strict=True):
        assert text.contacts is not None
        expected, actual = text.contacts.cpu().numpy(), np.asarray(output.data, np.float32)
        difference = difference_of(actual, expected, AGREEMENT[loaded.facts.compute_dtype], SLACK)
        if difference is not None:
            return difference
    return None

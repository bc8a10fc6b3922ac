"""Loads a checkpoint's head: what the library's class of the checkpoint has on top of the base model.

The head is the library's own code. The class is loaded whole, scores a few texts with its own eager attention
in float32, and then loses its base model: a stand-in returns the hidden states that it is given. What the head
reads of them is found by trying which calls give the same scores.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from layertap_server.engine.heads import Head, Reads
from layertap_server.engine.loading.checkpoint import from_pretrained, one_line
from layertap_server.engine.loading.probing import num_token_types
from layertap_server.engine.loading.reference import (
    UnfitModelError,
    are_finite,
    embedding_rows,
    first_finite_row,
    ids_that_end,
    model_inputs,
    probe_ids,
    relative_error,
)
from layertap_server.engine.projection import make_faster
from layertap_server.engine.threads import use_one_thread
from layertap_server.enums import HeadKind
from layertap_server.model_facts import ModelFacts
from layertap_server.plan import Int64Array

logger = logging.getLogger(__name__)

# The end of a class's name → what its head scores, and what loads such classes.
TASKS: dict[str, tuple[HeadKind, Any]] = {
    "ForSequenceClassification": (HeadKind.SEQUENCE_CLASSIFICATION, AutoModelForSequenceClassification),
    "ForTokenClassification": (HeadKind.TOKEN_CLASSIFICATION, AutoModelForTokenClassification),
    "ForMaskedLM": (HeadKind.MASKED_LANGUAGE, AutoModelForMaskedLM),
}
# Names of torch's modules → the contract's names.
ACTIVATIONS = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}
# Lengths of the texts that are scored, in tokens. A text that is too long for the model is left out.
LENGTHS = (33, 7, 1)
# Largest relative Frobenius error between the scores of the class and those of its head alone.
SAME_SCORES = 1e-4


class NoHeadError(Exception):
    """The checkpoint's head cannot be served; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredText:
    """One text, with the scores that the checkpoint's own class gives for it."""

    input_ids: Int64Array  # (T,)
    token_type_ids: Int64Array | None  # (T,)
    hidden: torch.Tensor  # (T, H), what the class's base model returns
    logits: torch.Tensor  # (T, labels) or (1, labels)


@dataclass(frozen=True, slots=True)
class ReadHead:
    """A head that is read, in host memory, and the scores that it must give."""

    head: Head
    texts: list[ScoredText]
    # The parameters that are the table of token embeddings: (module, name). They are empty until `with_table`.
    tied: list[tuple[nn.Module, str]]
    table_shape: torch.Size

    def with_table(self, model: Any, device: torch.device) -> Head:
        """The head on the device, with the model's own table of embeddings where they are tied."""
        table = model.get_input_embeddings().weight
        if self.tied and (table.shape != self.table_shape or table.dtype is not torch.float32):
            raise NoHeadError("its weights are tied to embeddings that the model does not have")
        for module, name in self.tied:
            module._parameters[name] = table
        self.head.module.to(device)
        return self.head


class Standin(nn.Module):  # type: ignore[misc]  # torch is not followed by the type checker
    """Stands in for the base model: returns the hidden states that it is given as `inputs_embeds`, with the
    output of the base model's pooler, if it has one."""

    def __init__(self, base: Any, *, has_pooler: bool, table_path: str) -> None:
        super().__init__()
        self.pooler = getattr(base, "pooler", None) if has_pooler else None
        if isinstance(self.pooler, nn.Linear):  # as in ALBERT and BigBird, where the activation is apart
            activation = getattr(base, "pooler_activation", None) or getattr(base, "activation", None)
            self.pooler_activation = activation or nn.Identity()
        # A head may look for the table of token embeddings where its base model has it.
        *parents, name = table_path.split(".")
        parent: nn.Module = self
        for one in parents:
            parent.add_module(one, nn.Module())
            parent = getattr(parent, one)
        parent.add_module(name, base.get_submodule(table_path))

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> BaseModelOutputWithPooling:
        pooled = None
        if isinstance(self.pooler, nn.Linear):
            pooled = self.pooler_activation(self.pooler(inputs_embeds[:, 0]))
        elif self.pooler is not None:
            pooled = self.pooler(inputs_embeds)
        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=pooled)


def named_head(config: Any) -> str:
    """The end of the name of the checkpoint's class, if its head may be served; else empty."""
    [architecture, *_] = getattr(config, "architectures", None) or [""]
    return next((end for end in TASKS if str(architecture).endswith(end)), "")


@torch.inference_mode()
def read_head(source: str, config: Any, task: str, trust_remote_code: bool, subfolder: str = "") -> ReadHead:
    """The head of the checkpoint for `task`, one of `TASKS`. Raises `NoHeadError`."""
    kind, _ = TASKS[task]
    outer, missing = _read_class(source, config, task, trust_remote_code, subfolder)
    prefix = outer.base_model_prefix
    base = getattr(outer, prefix, None) if prefix else None
    if not isinstance(base, nn.Module) or base is outer:
        raise NoHeadError("its class has no base model in it")
    of_pooler = {name for name in missing if name.startswith(f"{prefix}.pooler")}
    lacking = sorted(name for name in missing if not name.startswith(f"{prefix}."))
    if lacking:
        raise NoHeadError(f"the checkpoint lacks weights of it, such as '{lacking[0]}'")
    try:
        texts = list(_scored_texts(outer, base))
    except UnfitModelError as error:
        raise NoHeadError(str(error)) from error
    table = base.get_input_embeddings()
    table_path = next(name for name, module in base.named_modules() if module is table)
    setattr(outer, prefix, Standin(base, has_pooler=not of_pooler, table_path=table_path))
    del base
    parameters = signature(outer.forward).parameters
    plain = Head(outer, kind, Reads.ROWS, "attention_mask" in parameters)
    if kind.scores_tokens:
        ways = [Reads.ROWS]
    else:
        ways = [Reads.FIRST_ROWS, Reads.INPUT, Reads.INPUT_ROWS]
    head = next((one for way in ways if _fits(one := replace(plain, reads=way), texts)), None)
    if head is None and of_pooler:
        raise NoHeadError(f"the checkpoint lacks weights of the pooler before it, such as '{min(of_pooler)}'")
    if head is None:
        raise NoHeadError("its scores are not computed from the last hidden state alone")
    num_labels = int(texts[0].logits.shape[-1])
    head = replace(head, num_labels=num_labels, labels=_labels(config, kind, num_labels))
    tied = [
        (module, name)
        for module in outer.modules()
        for name, parameter in module._parameters.items()
        if parameter is table.weight
    ]
    shape = table.weight.shape
    for module, name in tied:  # frees the table until the served model's own takes its place
        module._parameters[name] = nn.Parameter(torch.empty(0), requires_grad=False)
    return ReadHead(head, texts, tied, shape)


def _read_class(
    source: str, config: Any, task: str, trust_remote_code: bool, subfolder: str
) -> tuple[Any, set[str]]:
    """The checkpoint's class with all its weights, and the names of those that are missing."""
    _, auto_class = TASKS[task]
    has_own_code = trust_remote_code and auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in auto_class._model_mapping and not has_own_code:
        raise NoHeadError(f"transformers has no such class for '{config.model_type}'")
    [architecture, *_] = getattr(config, "architectures", None) or [""]
    try:
        outer, report = from_pretrained(
            auto_class, source, copy.deepcopy(config), "eager", trust_remote_code, subfolder
        )
    except Exception as error:  # from the library, its file readers, or the model's own code
        raise NoHeadError(f"it cannot be loaded: {one_line(error)}") from error
    # A masked-language class may be asked for by the sparse vectors of a checkpoint of another class.
    if type(outer).__name__ != architecture and str(architecture).endswith(task):
        raise NoHeadError(f"its class '{architecture}' is not known, only '{type(outer).__name__}'")
    return outer.eval().requires_grad_(False), set(report["missing_keys"])


def _scored_texts(outer: Any, base: Any) -> Iterator[ScoredText]:
    """Runs the class on a few texts. Raises `NoHeadError`, and `UnfitModelError`."""
    vocab_size = embedding_rows(base)
    last_id, usual_id = ids_that_end(outer.config, vocab_size), first_finite_row(base)
    num_types = num_token_types(outer)
    captured: list[Any] = []
    handle = base.register_forward_hook(lambda _, __, output: captured.append(output[0]))
    found, failure = 0, ""
    try:
        for length in LENGTHS:
            ids = probe_ids(length, vocab_size, length, last_id)
            ids[~are_finite(base, ids)] = usual_id
            types = torch.arange(length).numpy() * 3 // length % num_types if num_types > 1 else None
            captured.clear()
            inputs = model_inputs(torch.device("cpu"), ids, types)
            if "attention_mask" not in signature(outer.forward).parameters:
                del inputs["attention_mask"]
            try:
                logits = outer(**inputs).logits
            except Exception as error:  # the model's code may raise anything
                failure = one_line(error)
                continue
            found += 1
            yield _checked(ids, types, captured, logits)
    finally:
        handle.remove()
    if not found:
        raise NoHeadError(f"its code fails: {failure}")


def _checked(ids: Int64Array, types: Int64Array | None, captured: list[Any], logits: Any) -> ScoredText:
    hidden = captured[0] if len(captured) == 1 else None
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or hidden.shape[:2] != (1, len(ids)):
        raise NoHeadError("its class does not call its base model once for all tokens")
    if not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 3) or logits.shape[0] != 1:
        raise NoHeadError("its class does not return scores for each input or token")
    if not bool(torch.isfinite(logits).all()):
        raise NoHeadError("its scores are not finite (NaN or infinity) in float32")
    return ScoredText(ids, types, hidden[0], logits if logits.ndim == 2 else logits[0])


def _fits(head: Head, texts: list[ScoredText]) -> bool:
    """Whether the head gives the scores of the class, where rows of several texts are scored together."""
    expected = torch.cat([text.logits for text in texts])
    try:
        if head.reads is Reads.ROWS:
            got = head.of_rows(torch.cat([text.hidden for text in texts]).flip(0)).flip(0)
        elif head.reads is Reads.FIRST_ROWS:
            got = head.of_rows(torch.stack([text.hidden[0] for text in texts]))
        else:
            got = torch.cat([head.of_input(text.hidden, torch.from_numpy(text.input_ids)) for text in texts])
    except Exception as error:  # the head may need what it does not get
        logger.debug("a head that reads %s fails", head.reads.value, exc_info=error)
        return False
    return got.shape == expected.shape and relative_error(got, expected) <= SAME_SCORES


def _labels(config: Any, kind: HeadKind, num_labels: int) -> tuple[str, ...]:
    """The names of the labels in the order of the scores; as transformers names them where the configuration
    does not. A masked-language head has none."""
    if kind is HeadKind.MASKED_LANGUAGE:
        return ()
    names = getattr(config, "id2label", None) or {}
    return tuple([str(names.get(number, f"LABEL_{number}")) for number in range(num_labels)])


def configured_activation(config: Any) -> str:
    """What sentence-transformers' `CrossEncoder` applies to the scores of this checkpoint: see
    `ModelFacts.head_activation`."""
    settings = getattr(config, "sentence_transformers", None)
    path = settings.get("activation_fn") if isinstance(settings, dict) else None
    path = path or getattr(config, "sbert_ce_default_activation_function", None) or ""
    package, _, name = str(path).rpartition(".")
    return ACTIVATIONS.get(name, path) if f"{package}.".startswith("torch.") else str(path)


def head_facts(facts: ModelFacts, head: Head, config: Any) -> ModelFacts:
    is_of_inputs = head.kind is HeadKind.SEQUENCE_CLASSIFICATION
    return replace(
        facts,
        head=head.kind,
        num_labels=head.num_labels,
        labels=head.labels,
        head_activation=configured_activation(config) if is_of_inputs else "",
    )


# --------------------------------------------------------------------------- the same bits in any batch


@torch.inference_mode()
def make_invariant(head: Head, hidden_size: int, lengths: tuple[int, ...]) -> tuple[Head, bool]:
    """The head in a form whose scores of an input do not depend on its batch, to the bit, and whether they do
    not depend on the number of threads either, as trials with inputs of these `lengths` show.

    Each input is scored by itself, with native products, which sum a row in the same order for any number of
    threads.
    """
    head = replace(head, by_input=True)
    inputs = [torch.randn(length, hidden_size) for length in lengths]

    def scores(rows: torch.Tensor) -> torch.Tensor:
        if head.reads in (Reads.INPUT, Reads.INPUT_ROWS):
            return head.of_input(rows, torch.zeros(len(rows), dtype=torch.int64))
        return head.of_rows(rows if head.reads is Reads.ROWS else rows[:1])

    expected = [scores(rows) for rows in inputs]
    parents = list(head.module.modules())
    linears = [
        (parent, name, child)
        for parent in parents
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    for parent in parents:
        make_faster(parent)
    try:
        is_native = not any(type(module) is nn.Linear for module in head.module.modules())
        got = [scores(rows) for rows in inputs]
        pairs = zip(got, expected, strict=True)
        if is_native and all(relative_error(one, wanted) <= SAME_SCORES for one, wanted in pairs):
            with ThreadPoolExecutor(1, initializer=use_one_thread) as one_core:
                again = one_core.submit(
                    torch.inference_mode()(lambda: [scores(rows) for rows in inputs])
                ).result()
            return head, all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    except Exception as error:  # a head may read the weights of its linear layers
        logger.debug("native products in a head fail", exc_info=error)
    for parent, name, linear in linears:
        setattr(parent, name, linear)
    return head, False

"""A checkpoint's head: it scores inputs or tokens from the last hidden state. Fills the logits of a batch.

The head is the library's own code (loading/heads.py). It computes in float32 whatever type the layers compute
in, like the pooler: scores are compared with each other, so that rounding would change their order, and only
the rows that were asked for pass through it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch

from layertap_server.engine.taps import TORCH_DTYPES, Part, Taps
from layertap_server.engine.transfer import blocks_of, to_device
from layertap_server.enums import Activation, DType, HeadKind, OutputField
from layertap_server.output_plans import LogitsPlan
from layertap_server.plan import Int64Array, Work

# Limit of the float32 logits of one step, or of its rows where these are wider; a single row may exceed it.
STEP_BYTES = 2**24


class Reads(Enum):
    """What a head needs to see; found by running it."""

    # Any rows, each of which is scored by itself.
    ROWS = "rows"
    # The first rows of inputs, each of which is scored by itself.
    FIRST_ROWS = "first rows"
    # All rows of one input, and its token ids.
    INPUT = "whole inputs"
    # All rows of one input, without its token ids.
    INPUT_ROWS = "whole inputs without token ids"


@dataclass(frozen=True, slots=True)
class Head:
    """The model's head. It keeps no state, so several threads may use it at the same time."""

    # The checkpoint's own class, where the base model returns the `inputs_embeds` that it is given.
    module: Any
    kind: HeadKind
    reads: Reads
    # Whether the module takes an attention mask.
    takes_mask: bool
    num_labels: int = 0
    labels: tuple[str, ...] = ()
    # Whether each input is scored in calls of its own, so that its bits do not depend on its batch.
    by_input: bool = False

    def of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, H) float32 rows to (n, labels): of single tokens, or the first rows of inputs."""
        if self.reads is Reads.ROWS:
            return self._logits(rows[None])[0]
        return self._logits(rows[:, None])

    def of_input(self, rows: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """(T, H) float32 rows and (T,) ids of one input to (1, labels)."""
        if self.reads is Reads.INPUT:
            return self._logits(rows[None], input_ids=input_ids[None])
        return self._logits(rows[None])

    def num_step_rows(self, hidden_size: int) -> int:
        """The number of rows that are scored in one step."""
        return max(STEP_BYTES // (4 * max(self.num_labels, hidden_size)), 1)

    def _logits(self, hidden: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        if self.takes_mask:
            inputs["attention_mask"] = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        logits: torch.Tensor = self.module(inputs_embeds=hidden, **inputs).logits
        return logits


class Member(NamedTuple):
    """The logits of one input."""

    text: int
    work: Work
    plan: LogitsPlan
    # The rows to score, of the packed rows of the batch; or of a head that scores inputs, all rows of one.
    rows: Int64Array

    @property
    def num_scored(self) -> int:
        return len(self.rows) if self.plan.scores_tokens else 1


def fill_logits(taps: Taps, head: Head | None) -> None:
    """Fills the logits and their ids in `taps.parts`. Inputs that ask alike share the calls of the head."""
    if head is None:
        return
    groups: dict[tuple[int, Activation, DType, int], list[Member]] = defaultdict(list)
    for text, (work, start, end) in enumerate(taps.packing.rows()):
        plan = work.plan.logits
        if plan is not None:
            if plan.positions is None:
                rows = np.arange(start, end)
            else:
                rows = np.array(plan.positions, np.int64) + start
            key = plan.top_k, plan.activation, work.plan.wire_dtype, text if head.by_input else -1
            groups[key].append(Member(text, work, plan, rows))
    for (top_k, activation, dtype, _), members in groups.items():
        _fill_group(taps, head, members, top_k, activation, dtype)


def _fill_group(
    taps: Taps, head: Head, members: Sequence[Member], top_k: int, activation: Activation, dtype: DType
) -> None:
    width = top_k or head.num_labels
    # (first scored row of the group, tensors for that row and the next ones)
    blocks: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
    first = 0
    row_bytes = width * (dtype.itemsize + (4 if top_k else 0))
    for block in blocks_of(members, lambda member: member.num_scored * row_bytes):
        num_rows = sum(member.num_scored for member in block)
        scores = taps.new_buffer((num_rows, width), TORCH_DTYPES[dtype])
        ids = taps.new_buffer((num_rows, width), torch.int32) if top_k else None
        blocks.append((first, scores, ids))
        first += num_rows
        begin = 0
        for member in block:
            end = begin + member.num_scored
            parts = taps.parts[member.text]
            for number, spec in enumerate(member.work.specs):
                if spec.field is OutputField.LOGITS:
                    parts[number] = Part(scores, begin, end)
                elif spec.field is OutputField.LOGIT_IDS and ids is not None:
                    parts[number] = Part(ids, begin, end)
            begin = end
    first = 0
    for logits in _steps(taps, head, members):
        scored, their_ids = activated(logits, top_k, activation)
        last = first + len(logits)
        for begin, scores, ids in blocks:
            low, high = max(first, begin), min(last, begin + len(scores))
            if low < high:
                scores[low - begin : high - begin] = scored[low - first : high - first]
                if ids is not None and their_ids is not None:
                    ids[low - begin : high - begin] = their_ids[low - first : high - first]
        first = last


def _steps(taps: Taps, head: Head, members: Sequence[Member]) -> Iterator[torch.Tensor]:
    """The logits of the members' rows in their order, (n, labels) in each step."""
    hidden = taps.float_rows(taps.last_index)
    if head.reads in (Reads.INPUT, Reads.INPUT_ROWS):
        for member in members:
            rows = hidden[int(member.rows[0]) : int(member.rows[-1]) + 1]
            yield head.of_input(rows, to_device(member.work.input_ids, taps.device))
        return
    if head.reads is Reads.ROWS:
        rows_of_all = np.concatenate([member.rows for member in members])
    else:
        rows_of_all = np.array([member.rows[0] for member in members])
    num_rows = head.num_step_rows(hidden.shape[1])
    for first in range(0, len(rows_of_all), num_rows):
        yield head.of_rows(rows_at(hidden, rows_of_all[first : first + num_rows]))


def rows_at(hidden: torch.Tensor, rows: Int64Array) -> torch.Tensor:
    """Some rows of a tensor: a view of its memory where they follow each other."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1 and (np.diff(rows) == 1).all():
        return hidden[first : last + 1]
    return hidden[to_device(rows, hidden.device)]


def activated(
    logits: torch.Tensor, top_k: int, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(n, labels) logits to scores and, of the `top_k` highest of each row, their ids."""
    scores = logits
    if activation is Activation.SOFTMAX:
        scores = logits.softmax(-1)
    elif activation is Activation.SIGMOID:
        scores = logits.sigmoid()
    if not top_k:
        return scores, None
    # By the logits, since an activation may round different ones to the same score.
    ids = highest(logits, top_k)
    return scores.gather(1, ids), ids.to(torch.int32)


def highest(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The indices of the highest elements of each row, highest first; of equal ones, the lowest index first."""
    indices = rows.topk(count).indices.sort(-1).values
    order = rows.gather(1, indices).sort(dim=-1, descending=True, stable=True).indices
    return indices.gather(1, order)

"""What one input asks for, as plain data: resolved indices, and the exact shape of every output.

This is the interface between the front (service, tokenization) and the engine. It uses no protobuf and no
torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from layertap_server.enums import DType, Encoding, OutputField, Pooling
from layertap_server.output_plans import (
    AttentionPlan,
    EmbeddingPlan,
    LogitsPlan,
    Places,
    SparsePlan,
    num_asked,
)

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a reply, known before anything is computed."""

    field: OutputField
    dtype: DType
    # With `is_bound`, the largest that it may be: the reply has the shape of the data.
    shape: tuple[int, ...]
    # The number of scales in the reply in addition to the data: one for each int8 vector.
    num_scales: int = 0
    is_bound: bool = False
    # Bytes of the data, without the scales.
    nbytes: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", math.prod(self.shape) * self.dtype.itemsize)

    def of(self, data: TensorData) -> TensorSpec:
        """The spec of these data: where the shape is only bound, with the number of entries that there are."""
        if not self.is_bound:
            return self
        return dataclasses.replace(self, shape=(data.data.nbytes // self.dtype.itemsize,), is_bound=False)


@dataclass(slots=True)
class TensorData:
    """The values of a `TensorSpec`: `data` is contiguous in memory, in the wire's element type.

    `scales` are float32, one for each int8 vector. bfloat16 values are given as a uint16 array of their bits,
    since numpy has no such type.
    """

    data: npt.NDArray[np.generic]
    scales: npt.NDArray[np.generic] | None = None


class ScratchNeeds(NamedTuple):
    """What the outputs of an input need memory for in addition to the results. Most inputs of a batch have
    equal ones, so that they are looked at once."""

    # The hidden states that vectors are computed from, and whether the last one is kept for other outputs.
    pooled_layers: frozenset[int]
    needs_last: bool
    # The dimensions of the largest vector; 0 without any.
    largest_vector: int
    merges_rows: bool
    projects_tokens: bool
    has_maps: bool
    has_scores: bool
    has_contacts: bool
    # Whether slices are computed once and repeated in the result.
    repeats: bool


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """All outputs that one input asks for, with indices resolved against the model and the input."""

    wire_dtype: DType
    last_hidden_state: bool = False
    pooler_output: bool = False
    # Each index once; where some were asked for repeatedly, `hidden_places` are their places in the reply.
    hidden_states: tuple[int, ...] | None = None
    attentions: AttentionPlan | None = None
    embeddings: tuple[EmbeddingPlan, ...] = ()
    hidden_places: Places | None = None
    # Rows of last_hidden_state, and of each of the hidden states, as asked for; None: every row.
    last_positions: tuple[int, ...] | None = None
    hidden_positions: tuple[int, ...] | None = None
    logits: LogitsPlan | None = None
    sparse: SparsePlan | None = None
    contacts: bool = False
    # Whether any output is computed with the model's own pooler.
    needs_pooler: bool = field(init=False, repr=False, compare=False)
    # Whether any output is computed from the whole last hidden state.
    needs_last: bool = field(init=False, repr=False, compare=False)
    # The highest hidden state that an output names by its index, where the maps of layer i count as hidden
    # state i + 1; 0 where there is none.
    _highest: int = field(init=False, repr=False, compare=False)
    scratch: ScratchNeeds = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_pooled = any(embedding.pooling is Pooling.POOLER for embedding in self.embeddings)
        object.__setattr__(self, "needs_pooler", self.pooler_output or is_pooled)
        of_last = self.pooler_output or self.logits is not None or self.sparse is not None
        object.__setattr__(self, "needs_last", of_last)
        named = self.hidden_indices(0)
        if self.attentions is not None:
            named.update(layer + 1 for layer in self.attentions.layers)
        object.__setattr__(self, "_highest", max(named, default=0))
        scratch = ScratchNeeds(
            pooled_layers=frozenset([layer for embedding in self.embeddings for layer in embedding.layers]),
            needs_last=self.needs_last,
            largest_vector=max([embedding.dimensions for embedding in self.embeddings], default=0),
            merges_rows=any(embedding.merges_rows for embedding in self.embeddings),
            projects_tokens=any(embedding.projects_tokens for embedding in self.embeddings),
            has_maps=self.attentions is not None,
            has_scores=self.logits is not None or self.sparse is not None,
            has_contacts=self.contacts,
            repeats=bool(self.repeated(OutputField.HIDDEN_STATES) or self.repeated(OutputField.ATTENTIONS)),
        )
        object.__setattr__(self, "scratch", scratch)

    def num_layers_needed(self, num_layers: int) -> int:
        """The number of layers that have to run for it, of the model's `num_layers`."""
        return num_layers if self.last_hidden_state or self.needs_last or self.contacts else self._highest

    @property
    def needs_model(self) -> bool:
        """Whether any output needs the model; a request for tokens alone does not."""
        return bool(
            self.last_hidden_state
            or self.needs_last
            or self.hidden_states is not None
            or self.attentions is not None
            or self.embeddings
            or self.contacts
        )

    @property
    def embeddings_at(self) -> int:
        """The index of the first embedding among the `specs`."""
        has_states, has_maps = self.hidden_states is not None, self.attentions is not None
        return self.last_hidden_state + self.pooler_output + has_states + has_maps

    def hidden_indices(self, num_layers: int) -> set[int]:
        """The hidden states (0…L) that the outputs need."""
        indices: set[int] = set(self.hidden_states or ())
        if self.last_hidden_state or self.needs_last:
            indices.add(num_layers)
        for embedding in self.embeddings:
            indices.update(embedding.layers)
        return indices

    def repeated(self, output: OutputField) -> tuple[Places | None, ...]:
        """For each leading dimension of an output, the places of its indices; empty where no index was
        repeated."""
        places: tuple[Places | None, ...] = ()
        if output is OutputField.HIDDEN_STATES:
            places = (self.hidden_places,)
        elif output is OutputField.ATTENTIONS and self.attentions is not None:
            places = self.attentions.places
        return places if any(one is not None for one in places) else ()

    def specs(self, num_tokens: int, hidden_size: int) -> tuple[TensorSpec, ...]:
        """The reply's tensors, in the contract's order."""
        dtype = self.wire_dtype
        specs: list[TensorSpec] = []
        if self.last_hidden_state:
            num_rows = num_tokens if self.last_positions is None else len(self.last_positions)
            specs.append(TensorSpec(OutputField.LAST_HIDDEN_STATE, dtype, (num_rows, hidden_size)))
        if self.pooler_output:
            specs.append(TensorSpec(OutputField.POOLER_OUTPUT, dtype, (hidden_size,)))
        if self.hidden_states is not None:
            num_states = num_asked(self.hidden_states, self.hidden_places)
            num_rows = num_tokens if self.hidden_positions is None else len(self.hidden_positions)
            shape: tuple[int, ...] = (num_states, num_rows, hidden_size)
            specs.append(TensorSpec(OutputField.HIDDEN_STATES, dtype, shape))
        if self.attentions is not None:
            specs.append(TensorSpec(OutputField.ATTENTIONS, dtype, self.attentions.shape(num_tokens)))
        for embedding in self.embeddings:
            num_scales = embedding.num_vectors if embedding.encoding is Encoding.INT8 else 0
            specs.append(
                TensorSpec(OutputField.EMBEDDINGS, embedding.encoding.dtype, embedding.shape(), num_scales)
            )
        if self.logits is not None:
            shape = self.logits.shape(num_tokens)
            specs.append(TensorSpec(OutputField.LOGITS, dtype, shape))
            if self.logits.top_k:
                specs.append(TensorSpec(OutputField.LOGIT_IDS, DType.INT32, shape))
        if self.sparse is not None:
            shape = (self.sparse.max_entries,)
            specs.append(TensorSpec(OutputField.SPARSE_IDS, DType.INT32, shape, is_bound=True))
            specs.append(TensorSpec(OutputField.SPARSE_WEIGHTS, dtype, shape, is_bound=True))
        if self.contacts:
            num_residues = max(num_tokens - NUM_OUTER_TOKENS, 0)
            specs.append(TensorSpec(OutputField.CONTACTS, dtype, (num_residues, num_residues)))
        return tuple(specs)


class OutputCost(NamedTuple):
    """The work for an input's outputs in addition to the layers of the model, known before anything runs."""

    # Elements of attention maps that are computed, whether or not they are returned.
    map_elements: int = 0
    # Elements of hidden states that are read for pooling, and of vectors that are made of them.
    pooled_elements: int = 0
    # Operations that take some time however small they are.
    num_steps: int = 0


NO_COST = OutputCost()


@dataclass(slots=True)
class Work:
    """One input, ready for the engine: its token ids, and the outputs that it asks for."""

    input_ids: Int64Array  # (T,)
    token_type_ids: Int64Array | None  # (T,), None where the model takes none
    plan: OutputPlan
    specs: tuple[TensorSpec, ...] = field(compare=False)
    # The work for its outputs in addition to the layers.
    cost: OutputCost = NO_COST
    num_tokens: int = field(init=False)
    # Bytes of its output tensors, with their scales.
    result_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.input_ids)
        self.result_bytes = 0
        for spec in self.specs:
            self.result_bytes += spec.nbytes + 4 * spec.num_scales


# The special tokens at the start and the end of a protein, which a contact map leaves out.
NUM_OUTER_TOKENS = 2

Outputs = Sequence[TensorData]  # of one input, in the order of its `Work.specs`

"""Checks the outputs that a request selects against the model's facts and converts them to plain data. Its
embeddings are checked in `embedding_validation.py`, its inputs in `input_validation.py`.

Everything that can be refused before tokenizing is refused in these; `planning.py` checks the rest once an
input's tokens are known. Each error names the field as it is spelled in the contract.
"""

from __future__ import annotations

from dataclasses import dataclass

from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors
from layertap_server.api.embedding_validation import EmbeddingRequest, parse_embedding, require_pooler
from layertap_server.api.field_values import indices_in, known_enum
from layertap_server.enums import Activation, DType, HeadKind
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import AttentionPlan, LogitsPlan, Places, SparsePlan, counted, distinct

WIRE_DTYPES = {0: DType.FLOAT32, 1: DType.FLOAT32, 2: DType.FLOAT16, 3: DType.BFLOAT16}

# Limits for one request, far above what is needed: each embedding and span costs microseconds on the event
# loop, for every input.
MAX_EMBEDDINGS = 256
MAX_SPANS = 512
# The limit for all inputs of a request together: each vector takes a few hundred bytes besides its data.
MAX_VECTORS = 2**16


@dataclass(frozen=True, slots=True)
class Selection:
    """An OutputSelection, valid for the model.

    Positions are as requested: which tokens they name depends on the input's length.
    """

    wire_dtype: DType
    last_hidden_state: bool
    last_positions: tuple[int, ...] | None
    pooler_output: bool
    # Each hidden state is listed once, as in `OutputPlan`.
    hidden_states: tuple[int, ...] | None
    hidden_places: Places | None
    hidden_positions: tuple[int, ...] | None
    attentions: AttentionPlan | None
    embeddings: tuple[EmbeddingRequest, ...]
    logits: LogitsPlan | None
    sparse: SparsePlan | None
    contacts: bool
    tokens: bool

    @property
    def needs_model(self) -> bool:
        """Whether any output needs a forward pass; as `OutputPlan.needs_model`, before there is a plan."""
        some = (self.hidden_states, self.attentions, self.logits, self.sparse)
        if any(one is not None for one in some):
            return True
        return bool(self.last_hidden_state or self.pooler_output or self.embeddings or self.contacts)

    @property
    def wants_configured(self) -> bool:
        """Whether one of the embeddings is the model's configured one."""
        return any(embedding.is_configured for embedding in self.embeddings)

    @property
    def num_positions(self) -> int:
        """The number of positions that are resolved for each input."""
        maps = self.attentions
        named = [self.last_positions, self.hidden_positions, self.logits and self.logits.positions]
        named += [maps.query_positions, maps.key_positions] if maps is not None else []
        return sum(len(positions) for positions in named if positions)


def check_count(num: int, limit: int, field: str) -> None:
    if num > limit:
        raise errors.invalid_argument(
            field, f"{num} exceed {limit}, the limit for one request; split the request", reason="TOO_MANY"
        )


def parse_selection(request: pb.EncodeRequest, facts: ModelFacts) -> Selection:
    outputs = request.outputs
    check_count(len(outputs.embeddings), MAX_EMBEDDINGS, "outputs.embeddings")
    check_count(sum(len(spec.spans) for spec in outputs.embeddings), MAX_SPANS, "outputs.embeddings.spans")
    if request.wire_dtype not in WIRE_DTYPES:
        raise errors.invalid_argument(
            "wire_dtype",
            f"unknown value {request.wire_dtype}; known values for float tensors are 1 (FLOAT32), 2 (FLOAT16), 3 (BFLOAT16)",
            reason="UNKNOWN_ENUM",
        )
    wire_dtype = WIRE_DTYPES[request.wire_dtype]
    hidden_states, hidden_places = None, None
    if outputs.HasField("hidden_states"):
        field = "outputs.hidden_states.layers"
        asked = indices_in(outputs.hidden_states.layers, facts.num_layers + 1, field, "hidden states")
        hidden_states, hidden_places = distinct(asked)
    if outputs.last_hidden_state_positions and not outputs.last_hidden_state:
        raise errors.invalid_argument(
            "outputs.last_hidden_state_positions",
            "last_hidden_state is not selected; set it too",
            reason="NOT_SELECTED",
        )
    selection = Selection(
        wire_dtype=wire_dtype,
        last_hidden_state=outputs.last_hidden_state,
        last_positions=tuple(outputs.last_hidden_state_positions) or None,
        pooler_output=outputs.pooler_output,
        hidden_states=hidden_states,
        hidden_places=hidden_places,
        hidden_positions=tuple(outputs.hidden_states.positions) or None,
        attentions=parse_attentions(outputs.attentions, facts) if outputs.HasField("attentions") else None,
        embeddings=tuple(
            parse_embedding(spec, f"outputs.embeddings[{i}]", facts, wire_dtype)
            for i, spec in enumerate(outputs.embeddings)
        ),
        logits=parse_logits(outputs.logits, facts) if outputs.HasField("logits") else None,
        sparse=parse_sparse(outputs.sparse, facts) if outputs.HasField("sparse") else None,
        contacts=outputs.contacts,
        tokens=outputs.tokens,
    )
    if outputs.pooler_output:
        require_pooler(facts, "outputs.pooler_output")
    if outputs.contacts and not facts.has_contacts:
        raise errors.output_unavailable(
            "NO_CONTACTS", "outputs.contacts", f"the model '{facts.name}' has no contact head"
        )
    if not (selection.needs_model or selection.tokens):
        raise errors.invalid_argument(
            "outputs", "nothing is selected; set at least one output", reason="NOTHING_SELECTED"
        )
    return selection


def check_num_vectors(selection: Selection, num_inputs: int) -> None:
    if (num := num_inputs * len(selection.embeddings)) > MAX_VECTORS:
        raise errors.invalid_argument(
            "outputs.embeddings",
            f"{num_inputs} inputs with {len(selection.embeddings)} embeddings each are {num} vectors, more than "
            f"{MAX_VECTORS}, the limit for one request; split the request",
            reason="TOO_MANY",
        )


def parse_attentions(asked: pb.AttentionSelection, facts: ModelFacts) -> AttentionPlan:
    field = "outputs.attentions"
    if not facts.has_attentions:
        raise errors.output_unavailable(
            "NO_ATTENTIONS", field, f"the model '{facts.name}' has no attention maps; do not select any"
        )
    query_positions = tuple(asked.query_positions) or None
    key_positions = tuple(asked.key_positions) or None
    if asked.pairs:
        pairs, pair_places = distinct_pairs(asked, facts)
        return AttentionPlan(
            layers=tuple(sorted({layer for layer, _ in pairs})),
            heads=(),
            mean_over_heads=False,
            query_positions=query_positions,
            key_positions=key_positions,
            pairs=pairs,
            pair_places=pair_places,
        )
    layers, layer_places = distinct(indices_in(asked.layers, facts.num_layers, f"{field}.layers", "layers"))
    asked_heads = indices_in(asked.heads, facts.num_attention_heads, f"{field}.heads", "heads")
    heads, head_counts, head_places = asked_heads, None, None
    if asked.mean_over_heads:
        heads, head_counts = counted(asked_heads)
    else:
        heads, head_places = distinct(asked_heads)
    return AttentionPlan(
        layers=layers,
        heads=heads,
        mean_over_heads=asked.mean_over_heads,
        query_positions=query_positions,
        head_counts=head_counts,
        layer_places=layer_places,
        head_places=head_places,
        key_positions=key_positions,
    )


def distinct_pairs(
    asked: pb.AttentionSelection, facts: ModelFacts
) -> tuple[tuple[tuple[int, int], ...], Places | None]:
    """The pairs of layer and head, each once and ascending, and the places of those asked for."""
    field = "outputs.attentions"
    for name in ("layers", "heads", "mean_over_heads"):
        if getattr(asked, name):
            raise errors.conflicting(
                f"{field}.{name}", "pairs are in place of it; leave one of the two empty"
            )
    num_heads = facts.num_attention_heads
    named_layers, named_heads = zip(*[(one.layer, one.head) for one in asked.pairs], strict=True)
    layers = indices_in(named_layers, facts.num_layers, f"{field}.pairs", "layers", ".layer")
    heads = indices_in(named_heads, num_heads, f"{field}.pairs", "heads", ".head")
    numbers = tuple([layer * num_heads + head for layer, head in zip(layers, heads, strict=True)])
    each_once = tuple(sorted(set(numbers)))
    place_of = {number: place for place, number in enumerate(each_once)}
    places = None if each_once == numbers else tuple([place_of[number] for number in numbers])
    return tuple([divmod(number, num_heads) for number in each_once]), places


def parse_logits(asked: pb.LogitsSelection, facts: ModelFacts) -> LogitsPlan:
    field = "outputs.logits"
    if facts.head is HeadKind.NONE:
        why = facts.head_unsupported or "its checkpoint has none"
        raise errors.output_unavailable(
            "NO_HEAD", field, f"the model '{facts.name}' has no head that gives logits: {why}"
        )
    if asked.positions and not facts.head.scores_tokens:
        raise errors.invalid_argument(
            f"{field}.positions",
            "the model's head scores the whole input, not its tokens; leave this empty",
            reason="NO_TOKEN_LOGITS",
        )
    if asked.top_k > facts.num_labels:
        raise errors.invalid_argument(
            f"{field}.top_k",
            f"{asked.top_k} is more than the head's {facts.num_labels}",
            reason="OUT_OF_RANGE",
        )
    return LogitsPlan(
        num_labels=facts.num_labels,
        scores_tokens=facts.head.scores_tokens,
        positions=tuple(asked.positions) or None,
        top_k=asked.top_k,
        activation=known_enum(Activation, asked.activation, Activation.NONE, f"{field}.activation"),
    )


def parse_sparse(asked: pb.SparseSelection, facts: ModelFacts) -> SparsePlan:
    field = "outputs.sparse"
    if not facts.has_sparse:
        why = facts.sparse_unsupported or "its files configure none"
        raise errors.output_unavailable(
            "NO_SPARSE", field, f"the model '{facts.name}' gives no sparse vectors: {why}"
        )
    if asked.top_k > facts.num_labels:
        raise errors.invalid_argument(
            f"{field}.top_k",
            f"{asked.top_k} is more than the vocabulary's {facts.num_labels}",
            reason="OUT_OF_RANGE",
        )
    most = min(facts.max_sparse_entries, facts.num_labels) or facts.num_labels
    return SparsePlan(asked.top_k or most, by_weight=asked.top_k > 0)

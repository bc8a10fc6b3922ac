"""The cost of an input's outputs in addition to the model's layers, computed before anything runs.

The cost is a number of operations of each kind, since the kinds differ much in speed. `cost_model.py` has the
time of each kind.
"""

from __future__ import annotations

import math

from layertap_server.enums import Pooling, concatenated
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import AttentionPlan, EmbeddingPlan
from layertap_server.plan import OutputCost, OutputPlan

# Before the first row of a map is computed, its keys are laid out for the kernel, which takes as long as
# computing this many rows.
ROWS_TO_PREPARE = 8
# Where the result repeats slices, each row is copied to each of its places after the pass. A row takes as long
# as this many pooled elements, and each of its elements as this many more: the memory is mostly new.
PLACED_ROW_ELEMENTS = 512
PLACED_ELEMENTS = 8
# Pooled elements that take as long as concatenating, normalizing and encoding one dimension of a vector.
VECTOR_ELEMENTS = 32
# The number of ranges that are pooled in the time of one step.
SEGMENTS_OF_A_STEP = 8
# A weighted mean is computed range by range, with this many calls for each.
STEPS_OF_A_WEIGHTED_RANGE = 8
# For the modules of a configured embedding: their calls, and the multiplications in the time of one pooled
# element.
STEPS_OF_A_PROJECTION, PRODUCTS_OF_AN_ELEMENT = 4, 16
# A head's calls, and further calls where the labels of each row are sorted or an activation is applied.
STEPS_OF_A_HEAD = 8
# A product of a few rows takes as long as reading the head's weights, which is that of more rows. The texts of
# a batch share it, so that this is less for each of many.
ROWS_TO_READ_A_HEAD = 4
# The maps of a layer are made symmetric and corrected by so many calls for a contact map.
STEPS_OF_A_CONTACT_LAYER = 6
# The step of a text's first tensor is not counted: the usual time of a text includes it.
USUAL_STEPS = 1


def output_cost(plan: OutputPlan, num_tokens: int, facts: ModelFacts) -> OutputCost:
    """The cost of the outputs of one input with `num_tokens` tokens."""
    num_steps = len(plan.hidden_states or ()) + plan.last_hidden_state + plan.pooler_output
    pooled_elements = _placing(plan, num_tokens, facts) + _head_elements(plan, num_tokens, facts)
    map_elements = 0
    if plan.attentions is not None:
        map_elements = _map_elements(plan.attentions, num_tokens)
        num_steps += len(plan.attentions.layers)
    if plan.contacts:
        num_maps = facts.num_layers * facts.num_attention_heads
        map_elements += num_maps * (num_tokens + ROWS_TO_PREPARE) * num_tokens
        num_steps += STEPS_OF_A_CONTACT_LAYER * facts.num_layers
    num_steps += STEPS_OF_A_HEAD * ((plan.logits is not None) + (plan.sparse is not None))
    for embedding in plan.embeddings:
        elements, steps = _pooling(embedding, num_tokens, facts)
        pooled_elements += elements
        num_steps += steps
    return OutputCost(map_elements, pooled_elements, max(num_steps - USUAL_STEPS, 0))


def _placing(plan: OutputPlan, num_tokens: int, facts: ModelFacts) -> int:
    """The pooled elements that take as long as the copies to the places in the reply: of hidden states as a
    whole and of attention maps row by row, where indices were asked for repeatedly, and of chosen columns."""
    num_states = len(plan.hidden_places or ())
    tokens = num_tokens if plan.hidden_positions is None else len(plan.hidden_positions)
    num_rows, num_elements = num_states, num_states * tokens * facts.hidden_size
    maps = plan.attentions
    if maps is not None and any(one is not None for one in maps.places):
        *leading, num_columns = maps.shape(num_tokens)
        num_rows += math.prod(leading)
        num_elements += math.prod(leading) * num_columns
    if maps is not None and maps.key_positions is not None:
        num_elements += math.prod(maps.computed_shape(num_tokens))
    return PLACED_ROW_ELEMENTS * num_rows + PLACED_ELEMENTS * num_elements


def _head_elements(plan: OutputPlan, num_tokens: int, facts: ModelFacts) -> int:
    """The pooled elements that take as long as the head's products, for logits and for a sparse vector."""
    num_rows = 0
    if plan.logits is not None:
        num_rows += plan.logits.num_rows(num_tokens) + ROWS_TO_READ_A_HEAD
    if plan.sparse is not None:
        num_rows += num_tokens + ROWS_TO_READ_A_HEAD
    return num_rows * facts.hidden_size * (facts.hidden_size + facts.num_labels) // PRODUCTS_OF_AN_ELEMENT


def _map_elements(plan: AttentionPlan, num_tokens: int) -> int:
    return plan.num_maps * (plan.num_queries(num_tokens) + ROWS_TO_PREPARE) * num_tokens


def _pooling(plan: EmbeddingPlan, num_tokens: int, facts: ModelFacts) -> tuple[int, int]:
    """The pooled elements and the steps of one embedding."""
    segments = set(plan.segments)
    num_rows = sum(last - first for first, last in segments)
    num_vectors = num_rows if plan.pooling is Pooling.NONE else len(segments)
    vectors = num_vectors * plan.dimensions * VECTOR_ELEMENTS
    if plan.pooling is Pooling.POOLER:
        return vectors, 1
    if plan.pooling in (Pooling.CLS, Pooling.LAST_TOKEN):
        num_rows = len(segments)
    reductions = len(concatenated(plan.pooling))
    num_layers = len(plan.layers)
    if plan.merges_rows:
        begin, end = min(first for first, _ in segments), max(last for _, last in segments)
        read = (end - begin) * num_layers + num_rows * reductions
    else:
        read = num_rows * reductions * num_layers
    num_steps = num_layers + len(plan.segments) // SEGMENTS_OF_A_STEP
    if Pooling.WEIGHTED_MEAN in concatenated(plan.pooling):
        num_steps += STEPS_OF_A_WEIGHTED_RANGE * len(segments) * num_layers
    if plan.projects_tokens:
        products = num_tokens * facts.hidden_size * facts.projected_token_size
        vectors += products // PRODUCTS_OF_AN_ELEMENT
        num_steps += STEPS_OF_A_PROJECTION
    if plan.is_projected:
        products = num_vectors * facts.token_size * reductions * facts.projected_size
        vectors += products // PRODUCTS_OF_AN_ELEMENT
        num_steps += STEPS_OF_A_PROJECTION
    return read * facts.hidden_size + vectors, num_steps

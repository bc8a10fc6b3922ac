"""Batches that ask a model for everything that it can give, for the tests of the CUDA paths."""

from collections.abc import Iterator
from dataclasses import replace

from layertap_server.engine.loading.reference import probe_ids
from layertap_server.enums import DType, Encoding, LayerMerge, Pooling
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import AttentionPlan, EmbeddingPlan
from layertap_server.plan import OutputPlan, Work


def mean_of(facts: ModelFacts, length: int) -> EmbeddingPlan:
    """The mean of a text of so many tokens, normalized."""
    return EmbeddingPlan(
        Pooling.MEAN,
        (facts.num_layers,),
        LayerMerge.CONCAT,
        normalize=True,
        dimensions=facts.hidden_size,
        encoding=Encoding.FLOAT32,
        segments=((0, length),),
        has_spans=False,
    )


def plans(facts: ModelFacts, length: int) -> Iterator[OutputPlan]:
    """One plan for each kind of output, of a text of so many tokens."""
    last = facts.num_layers
    mean = mean_of(facts, length)
    yield OutputPlan(DType.FLOAT32, last_hidden_state=True)
    yield OutputPlan(DType.FLOAT16, hidden_states=(0, last))
    maps = AttentionPlan((0, last - 1), (1,), mean_over_heads=False, query_positions=(length - 1, 0))
    yield OutputPlan(DType.FLOAT32, attentions=maps)
    all_heads = tuple(range(facts.num_attention_heads))
    averaged = AttentionPlan((last - 1,), all_heads, mean_over_heads=True, query_positions=None)
    yield OutputPlan(DType.FLOAT32, attentions=averaged)
    for pooling in Pooling:
        if pooling is not Pooling.POOLER or facts.has_pooler:
            yield OutputPlan(DType.FLOAT32, embeddings=(replace(mean, pooling=pooling),))
    for encoding in Encoding:
        spans = replace(mean, encoding=encoding, segments=((0, 1), (0, length)), has_spans=True)
        yield OutputPlan(DType.FLOAT32, embeddings=(spans,))
    yield OutputPlan(
        DType.FLOAT32, embeddings=(replace(mean, layers=(1, last), layer_merge=LayerMerge.MEAN),)
    )
    if facts.has_pooler:
        yield OutputPlan(DType.FLOAT32, pooler_output=True)


def work_of(facts: ModelFacts, length: int, plan: OutputPlan) -> Work:
    ids = probe_ids(length, facts.vocab_size, length)
    return Work(ids, None, plan, plan.specs(length, facts.hidden_size))


def works_wanting_everything(facts: ModelFacts) -> list[Work]:
    """Texts of different lengths, each wanting something else."""
    num_plans = len(list(plans(facts, 1)))
    lengths = [1 + (7 * number) % min(facts.max_tokens, 40) for number in range(num_plans)]
    return [
        work_of(facts, length, list(plans(facts, length))[number]) for number, length in enumerate(lengths)
    ]


def works_wanting_vectors(facts: ModelFacts, lengths: list[int]) -> list[Work]:
    """Texts that want no more than the last hidden state, or a vector of it."""
    works = []
    for number, length in enumerate(lengths):
        some = [
            plan
            for plan in plans(facts, length)
            if plan.hidden_indices(facts.num_layers) == {facts.num_layers} and plan.hidden_states is None
        ]
        works.append(work_of(facts, length, some[number % len(some)]))
    return works

"""Different texts, lengths, outputs and types from many threads at once: batched is the same as alone."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reference import Input, Reference, assert_result
from strategies import Request, requests

import layertap
from families import FAMILIES

NUM_THREADS = 12
# One of each kind, which `make test` takes: plain, shared layers, windows, a tokenizer in Python, and two that
# run padded. The single outputs are compared for all families in test_parity_outputs.py.
VARIED = ("bert", "albert", "modernbert", "esm", "deberta_v2", "t5")

MIXES = settings(
    max_examples=6,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    # No shrinking: batches are formed by chance, so that a smaller example is not meaningful.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(
    params=[name if name in VARIED else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
)
def reference(request: pytest.FixtureRequest, references: dict[str, Reference]) -> Reference:
    return references[request.param]


def ask_all(client: layertap.Client, calls: Sequence[Request]) -> list[list[layertap.Result]]:
    """All calls at once, each from a thread of its own as far as there are threads."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(lambda call: client.encode(call[0], **call[1]), calls))


@MIXES
@given(data=st.data())
def test_any_mix(client: layertap.Client, reference: Reference, data: st.DataObject) -> None:
    calls = data.draw(st.lists(requests(reference), min_size=4, max_size=NUM_THREADS))
    for (items, options), results in zip(calls, ask_all(client, calls), strict=True):
        for item, result in zip(items, results, strict=True):
            assert_result(result, reference.encode(item), options)


@MIXES
@given(data=st.data())
def test_any_mix_over_all_families(
    client: layertap.Client, references: dict[str, Reference], data: st.DataObject
) -> None:
    """One queue for each model, side by side."""
    any_request = st.sampled_from(sorted(references)).flatmap(lambda name: requests(references[name], 2))
    calls = data.draw(st.lists(any_request, min_size=8, max_size=2 * NUM_THREADS))
    for (items, options), results in zip(calls, ask_all(client, calls), strict=True):
        for item, result in zip(items, results, strict=True):
            assert_result(result, references[options["model"]].encode(item), options)


def test_mixed_lengths_of_last_hidden_state_alone(client: layertap.Client, reference: Reference) -> None:
    """Nothing but raw rows, of every length: and calls really did share forward passes."""
    options: layertap.EncodeOptions = {"model": reference.name, "last_hidden_state": True}
    items = [
        layertap.TokenIds([5 + (length * step) % 27 for step in range(length)]) for length in range(1, 65, 3)
    ]
    shared = 0
    for _ in range(
        20
    ):  # which requests share a batch is chance: up to a few rounds; the first is nearly always enough
        calls: list[Request] = [([item], options) for item in items]
        for item, (result,) in zip(items, ask_all(client, calls), strict=True):
            assert_result(result, reference.encode(item), options)
            shared = max(shared, result.timing.batch_inputs)
        if shared > 1:
            break
    assert shared > 1


def test_nobody_gets_the_answer_of_another(client: layertap.Client, reference: Reference) -> None:
    """Calls alike in all but the content: only the values tell them apart."""
    options: layertap.EncodeOptions = {"model": reference.name, "embeddings": True, "attentions": [0]}
    items = [layertap.TokenIds([5 + (start + step) % 27 for step in range(9)]) for start in range(27)]
    calls: list[Request] = [([item], options) for item in items]
    for item, (result,) in zip(items, ask_all(client, calls), strict=True):
        assert_result(result, reference.encode(item), options)


def test_one_call_of_many_inputs(client: layertap.Client, reference: Reference) -> None:
    """More texts than one pass takes, and more bytes than one message holds: each comes back in its place."""
    items: list[Input] = [
        layertap.TokenIds([5 + (length + step) % 23 for step in range(length + 1)]) for length in range(64)
    ]
    options: Any = {"embeddings": True, "hidden_states": [-1], "attentions": True}
    results = client.encode(items, model=reference.name, **options)
    for item, result in zip(items, results, strict=True):
        assert_result(result, reference.encode(item), options)

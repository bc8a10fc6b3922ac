"""Selections that name an index again and again: computed once, and what they take is known before they run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.selections import described, random_request, works_of
from families import build
from layertap.v1 import encoder_pb2 as pb
from layertap_server import errors
from layertap_server.engine import Engine, LoadedModel, load_model
from layertap_server.engine.attention_maps import MapTap
from layertap_server.engine.cpu.library import AttentionKernel
from layertap_server.engine.memory import HeldBytes
from layertap_server.engine.repeats import put_in_places
from layertap_server.plan import OutputCost, Work

MEAN, SUM, CONCAT = pb.LAYER_MERGE_MEAN, pb.LAYER_MERGE_SUM, pb.LAYER_MERGE_CONCAT
# In addition to what a pass takes in any case.
MIB = 2**20
USUAL_BYTES = 2 * MIB


@pytest.fixture(scope="module", params=["bert", "mpnet"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """One that runs packed, and one that runs padded."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder)
    return load_model(
        "model", str(folder), device="cpu", dtype="float32", trust_remote_code=False, max_input_tokens=0
    )


def request_of(outputs: pb.OutputSelection, num_tokens: int = 30, num_inputs: int = 1) -> pb.EncodeRequest:
    ids = [5 + i % 20 for i in range(num_tokens)]
    return pb.EncodeRequest(inputs=[pb.Input(token_ids=pb.TokenIds(ids=ids))] * num_inputs, outputs=outputs)


def maps(**fields: Any) -> pb.OutputSelection:
    return pb.OutputSelection(attentions=pb.AttentionSelection(**fields))


def vectors(*specs: pb.EmbeddingSpec) -> pb.OutputSelection:
    return pb.OutputSelection(embeddings=specs)


def answers(loaded: LoadedModel, request: pb.EncodeRequest) -> list[Any]:
    """The tensors of the first input."""
    outputs = Engine(loaded).run(works_of(request, loaded.facts))
    return [one.data for one in outputs[0]]


def peak_of(loaded: LoadedModel, works: Sequence[Work]) -> int:
    with HeldBytes() as held:
        Engine(loaded).run(works)
    return held.peak


# ---------------------------------------------------------------------------- right answers


def test_what_is_named_repeatedly_is_the_same_everywhere(loaded: LoadedModel) -> None:
    layers, heads, rows = [2, 0, 2, -1, 2], [1, 1, 3, 0, 1], [4, -1, 4, 0, 0, 29]
    states, some = answers(
        loaded,
        request_of(
            pb.OutputSelection(
                hidden_states=pb.HiddenStateSelection(layers=layers),
                attentions=pb.AttentionSelection(layers=layers, heads=heads, query_positions=rows),
            )
        ),
    )
    all_states, all_maps = answers(
        loaded,
        request_of(
            pb.OutputSelection(hidden_states=pb.HiddenStateSelection(), attentions=pb.AttentionSelection())
        ),
    )
    np.testing.assert_allclose(states, all_states[layers], atol=1e-6)
    np.testing.assert_allclose(some, all_maps[np.ix_(layers, heads, rows)], atol=1e-6)


@pytest.mark.parametrize("portion", [4, 2**16])
def test_rows_are_put_in_their_places(portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layertap_server.engine.repeats.PLACED_ROWS", portion)
    computed = torch.randn(2, 3, 4, 5)
    for places in ([(1, 0, 1), None, None], [None, (2, 2), (3, 0, 3, 1)], [(0, 0, 1), (1, 0, 1), (0, 0)]):
        index = [range(n) if one is None else one for one, n in zip(places, computed.shape, strict=False)]
        expected = computed.numpy()[np.ix_(*index)]
        whole = torch.empty(expected.shape)
        put_in_places(computed, places, whole)
        np.testing.assert_array_equal(whole.numpy(), expected)


@pytest.mark.parametrize("repeats", [1, 700])
def test_a_mean_counts_a_head_as_often_as_it_is_named(loaded: LoadedModel, repeats: int) -> None:
    heads = [0, 2, 2, 3] * repeats
    [mean] = answers(loaded, request_of(maps(heads=heads, mean_over_heads=True)))
    [whole] = answers(loaded, request_of(maps()))
    expected = whole[:, heads].astype(np.float64).mean(1, keepdims=True)
    np.testing.assert_allclose(mean, expected, atol=2e-6)


@pytest.mark.parametrize("merge", [MEAN, SUM, CONCAT])
@pytest.mark.parametrize("pooling", list(pb.Pooling.values())[1:6])
@pytest.mark.parametrize("layers", [[3], [3, 3], [2, 2, -1, 0, 2], [0, 1, 2] * 40])
def test_layers_are_merged_as_often_as_they_are_named(
    loaded: LoadedModel, merge: int, pooling: int, layers: list[int]
) -> None:
    width = loaded.facts.hidden_size * (len(layers) if merge == CONCAT else 1) * (2 if pooling == 5 else 1)
    cuts = sorted({0, 5, min(70, width), max(width - 3, 1)})
    asked: dict[str, Any] = {"pooling": pooling, "layers": layers, "layer_merge": merge}
    specs = [pb.EmbeddingSpec(**asked, normalize=cut == 70, dimensions=cut) for cut in cuts]
    spans = [(0, 30), (2, 9), (5, 6), (0, 30), (29, 30)]
    specs.append(pb.EmbeddingSpec(**asked, normalize=False))
    for first, last in spans:
        specs[-1].spans.add(start=first, end=last, unit=pb.Span.UNIT_TOKEN)
    got = answers(loaded, request_of(vectors(*specs)))
    [states] = answers(loaded, request_of(pb.OutputSelection(hidden_states=pb.HiddenStateSelection())))
    chosen = states[layers].astype(np.float64)
    merged = {MEAN: chosen.mean(0), SUM: chosen.sum(0)}.get(merge, np.concatenate(chosen, -1))

    def pooled(first: int, last: int) -> Any:
        rows = merged[first:last]
        mean, most = rows.mean(0), rows.max(0)
        return [mean, rows[0], most, rows[-1], np.concatenate([mean, most])][pooling - 1]

    for vector, cut in zip(got, cuts, strict=False):
        expected = pooled(0, 30)[: cut or None]
        if cut == 70:
            expected = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(vector, expected, atol=2e-5 * max(1, len(layers) / 4), rtol=1e-4)
    np.testing.assert_allclose(
        got[-1], [pooled(*span) for span in spans], atol=2e-5 * max(1, len(layers) / 4), rtol=1e-4
    )


def test_long_vectors_are_encoded_in_portions(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = pb.EmbeddingSpec(layers=[0, 1, 2] * 20, normalize=True, encoding=pb.EMBEDDING_ENCODING_INT8)
    for first in range(12):
        spec.spans.add(start=first, end=first + 9, unit=pb.Span.UNIT_TOKEN)
    [work] = works_of(request_of(vectors(spec)), loaded.facts)
    [whole] = Engine(loaded).run([work])[0]
    monkeypatch.setattr(
        "layertap_server.engine.pooled_outputs.SCRATCH_BYTES", 5 * 4 * work.plan.embeddings[0].dimensions
    )
    [portions] = Engine(loaded).run([work])[0]
    np.testing.assert_array_equal(portions.data, whole.data)
    np.testing.assert_array_equal(portions.scales, whole.scales)


# ---------------------------------------------------------------------- known, and bounded


def test_repeats_cost_no_more_than_their_places() -> None:
    """Of the work that is counted before a request runs."""
    from scheduling.fake_engine import facts

    def cost(outputs: pb.OutputSelection) -> OutputCost:
        [work] = works_of(request_of(outputs, 250), facts())
        return work.cost

    once, often = (
        cost(maps(heads=[1], layers=[0])),
        cost(maps(heads=[1] * 60000, layers=[0], mean_over_heads=True)),
    )
    assert often == once
    every = list(range(13))
    merged = [cost(vectors(pb.EmbeddingSpec(layers=every * times, layer_merge=MEAN))) for times in (1, 4000)]
    assert merged[0] == merged[1]
    cut = [cost(vectors(pb.EmbeddingSpec(layers=[0] * times, dimensions=1))) for times in (1, 4000)]
    assert cut[0] == cut[1]
    few, many = (
        cost(pb.OutputSelection(hidden_states=pb.HiddenStateSelection(layers=[3] * times)))
        for times in (2, 200)
    )
    assert (few.map_elements, few.num_steps) == (many.map_elements, many.num_steps)


def test_a_cut_vector_needs_no_layer_behind_the_cut(loaded: LoadedModel) -> None:
    size = loaded.facts.hidden_size
    [work] = works_of(
        request_of(vectors(pb.EmbeddingSpec(layers=[1, 0, 2, 4], dimensions=size + 1))), loaded.facts
    )
    assert work.plan.num_layers_needed(loaded.facts.num_layers) == 1


@pytest.mark.parametrize(
    "outputs",
    [
        maps(layers=[0], heads=[1] * 60000, mean_over_heads=True),
        maps(layers=[0], heads=[1, 2] * 4000, mean_over_heads=True),
        vectors(pb.EmbeddingSpec(layers=list(range(5)) * 12000, layer_merge=MEAN)),
        vectors(pb.EmbeddingSpec(layers=list(range(5)) * 12000, layer_merge=SUM, pooling=pb.POOLING_MAX)),
        vectors(pb.EmbeddingSpec(layers=[0, 1] * 2000, dimensions=1)),
        vectors(*[pb.EmbeddingSpec(layers=[0, 1] * 100, dimensions=i + 1) for i in range(256)]),
        maps(layers=[0, 1, 0] * 100, heads=[2] * 100, query_positions=[3] * 2),
        pb.OutputSelection(hidden_states=pb.HiddenStateSelection(layers=[1, 2] * 3000)),
    ],
    ids=["heads", "two heads", "mean", "maxima", "cut", "kinds", "maps", "states"],
)
def test_memory_is_bounded_by_the_reply_and_the_model(
    loaded: LoadedModel, outputs: pb.OutputSelection
) -> None:
    works = works_of(request_of(outputs), loaded.facts)
    assert peak_of(loaded, works) <= USUAL_BYTES + 2 * sum(work.result_bytes for work in works)


class Counted(TorchDispatchMode):  # type: ignore[misc]  # torch is not followed by the type checker
    """Counts the operations while it is on, and the elements that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = self.num_elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.num_operations += 1
        self.num_elements += sum(one.numel() for one in tree_leaves(result) if isinstance(one, torch.Tensor))
        return result


@pytest.fixture
def counted_maps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Elements of maps that the kernel has computed since it was last asked."""
    elements = 0
    write = AttentionKernel.write_maps

    def counted(self: Any, query: Any, key: Any, map_taps: Sequence[MapTap], *rest: Any) -> None:
        nonlocal elements
        for tap in map_taps:
            elements += len(tap.heads) * tap.num_queries * (tap.end - tap.start)
        write(self, query, key, map_taps, *rest)

    def since() -> int:
        nonlocal elements
        now, elements = elements, 0
        return now

    monkeypatch.setattr(AttentionKernel, "write_maps", counted)
    return since


def random_works(loaded: LoadedModel, number: int) -> Iterator[tuple[pb.EncodeRequest, list[Work]]]:
    chance = random.Random(20)
    while number:
        request = random_request(chance, loaded.facts, max_tokens=256, most=6000)
        try:
            works = works_of(request, loaded.facts)
        except errors.RequestError:
            continue
        if sum(work.result_bytes for work in works) <= 8 * 2**20:
            number -= 1
            yield request, works


def test_no_selection_does_more_than_is_counted_for_it(
    loaded: LoadedModel, counted_maps: Callable[[], int]
) -> None:
    """By operations and elements, which are the same on every machine."""
    engine = Engine(loaded)
    for request, works in random_works(loaded, 60):
        num_tokens, num_bytes = (
            sum(len(work.input_ids) for work in works),
            sum(work.result_bytes for work in works),
        )
        cost = [sum(parts) for parts in zip(*(work.cost for work in works), strict=True)]
        map_elements, pooled_elements, num_steps = cost
        counted_maps()
        with Counted() as counted:
            engine.run(works)
        said = described(request)
        assert counted_maps() <= map_elements, said
        assert counted.num_operations <= 1000 + 24 * num_tokens + 12 * num_steps, said
        of_layers = 400 * loaded.facts.hidden_size * (num_tokens + 16)
        if not loaded.facts.packed:
            of_layers += (
                60 * sum(len(work.input_ids) ** 2 for work in works) * loaded.facts.num_attention_heads
            )
        most = of_layers + 4 * num_bytes + 4 * map_elements + 4 * pooled_elements
        assert counted.num_elements <= most, said


def test_no_selection_takes_more_memory_than_is_reckoned_with(loaded: LoadedModel) -> None:
    for request, works in random_works(loaded, 40):
        needed = loaded.memory.of_pass(works, packed=loaded.facts.packed)
        assert peak_of(loaded, works) <= 1.6 * needed + MIB, described(request)

"""What a head of a checkpoint becomes: its scores in steps, its bits, its memory, and the reason where it is not served."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import heads
from layertap_server.engine import engine_for, load_model
from layertap_server.engine import heads as engine_heads
from layertap_server.engine.heads import STEP_BYTES, Head, Reads, activated, highest
from layertap_server.engine.memory import HeldBytes
from layertap_server.engine.model import LoadedModel
from layertap_server.enums import Activation, DType, HeadKind, OutputField
from layertap_server.model_facts import ModelFacts
from layertap_server.output_plans import LogitsPlan
from layertap_server.plan import OutputPlan, Outputs, Work


def load(folder: Path, **settings: Any) -> LoadedModel:
    defaults = {"device": "cpu", "dtype": "float32", "trust_remote_code": False, "max_input_tokens": 0}
    return load_model("m", str(folder), **(defaults | settings))


def work(facts: ModelFacts, length: int, **logits: Any) -> Work:
    plan = OutputPlan(DType.FLOAT32, logits=LogitsPlan(facts.num_labels, facts.head.scores_tokens, **logits))
    ids = np.arange(5, 5 + length, dtype=np.int64) * length % 90 + 5
    return Work(ids, None, plan, plan.specs(length, facts.hidden_size))


def scores(loaded: LoadedModel, works: Sequence[Work]) -> list[np.ndarray[Any, Any]]:
    return [outputs[0].data for outputs in engine_for(loaded).run(works)]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    heads.build("bert", "masked", folder)
    return folder


# ------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("num_rows", [1, 3, 1000])
def test_scores_are_computed_in_steps(masked: Path, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(masked)
    facts = loaded.facts
    model = heads.read(masked, "masked")
    works = [work(facts, 9), work(facts, 5, positions=(4, 0, 4)), work(facts, 1), work(facts, 30)]
    sizes: list[int] = []
    of_rows = Head.of_rows

    def counted(head: Head, rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return of_rows(head, rows)

    monkeypatch.setattr(Head, "of_rows", counted)
    monkeypatch.setattr(engine_heads, "STEP_BYTES", 4 * facts.num_labels * num_rows)
    given = scores(loaded, works)
    assert sum(sizes) == 9 + 3 + 1 + 30
    assert max(sizes) == min(num_rows, sum(sizes))
    for one, actual in zip(works, given, strict=True):
        expected = heads.own_logits(model, one.input_ids)
        positions = one.plan.logits and one.plan.logits.positions
        wanted = expected if positions is None else expected[list(positions)]
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=2e-5)


def test_of_equal_scores_the_lowest_id_comes_first() -> None:
    rows = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0], [float("nan"), 0.0, 5.0, 5.0, -1.0]])
    assert highest(rows, 4).tolist() == [[1, 3, 2, 4], [0, 2, 3, 1]]


def test_the_highest_are_chosen_before_an_activation_rounds_them() -> None:
    rows = torch.tensor([[60.0, 70.0, 80.0]])
    given, ids = activated(rows, 2, Activation.SIGMOID)
    assert given.tolist() == [[1.0, 1.0]]
    assert ids is not None
    assert ids.tolist() == [[2, 1]]


def test_only_the_rows_that_are_asked_for_pass_through_the_head(
    masked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(masked)
    sizes: list[int] = []
    of_rows = Head.of_rows
    monkeypatch.setattr(
        Head,
        "of_rows",
        lambda head, rows: sizes.append(len(rows)) or of_rows(head, rows),  # type: ignore[func-returns-value]
    )
    last = OutputPlan(DType.FLOAT32, last_hidden_state=True)
    other = Work(np.arange(5, 45), None, last, last.specs(40, loaded.facts.hidden_size))
    engine_for(loaded).run([other, work(loaded.facts, 20, positions=(3,), top_k=1), other])
    assert sizes == [1]


# -------------------------------------------------------------------------------- the same bits in any batch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "masked"), ("bert", "sequence"), ("modernbert", "sequence")]
)
def test_batch_invariant_scores(tmp_path: Path, family: str, kind: str, dtype: str) -> None:
    settings = {"classifier_pooling": "mean"} if family == "modernbert" else {}
    heads.build(family, kind, tmp_path, **settings)
    loaded = load(tmp_path, dtype=dtype, batch_invariant=True)
    engine, facts = engine_for(loaded), loaded.facts
    assert facts.head is not HeadKind.NONE
    ways: list[Callable[[list[Work]], list[Outputs]]] = [engine.run]
    with ThreadPoolExecutor(1, initializer=engine.use_one_core) as one_core:
        if engine.num_cores > 1:
            ways.append(lambda works: one_core.submit(engine.run, works).result())
        asked = [{}, {"top_k": 2, "activation": Activation.SOFTMAX}, {"activation": Activation.SIGMOID}]
        texts = [work(facts, length, **asked[length % 3]) for length in (1, 4, 9, 20, 37, 64)]
        alone = [engine.run([text])[0] for text in texts]
        for size in (1, 4, 24):
            company = [work(facts, 1 + 7 * number % 60, **asked[number % 3]) for number in range(size)]
            for run in ways:
                for mine, expected in zip(run([*texts, *company]), alone, strict=False):
                    for one, wanted in zip(mine, expected, strict=True):
                        assert one.data.tobytes() == wanted.data.tobytes()


# --------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("lengths", [[64], [64] * 24, [1] * 40])
def test_the_memory_of_scores_is_known(masked: Path, lengths: list[int]) -> None:
    loaded = load(masked)
    engine = engine_for(loaded)
    works = [work(loaded.facts, length, activation=Activation.SOFTMAX) for length in lengths]
    engine.run(works)
    with HeldBytes() as counted:
        engine.run(works)
    known = loaded.memory.of_pass(works, packed=loaded.facts.packed)
    assert counted.peak <= known
    plain = [replace(one, plan=OutputPlan(DType.FLOAT32, last_hidden_state=True), specs=()) for one in works]
    assert known - loaded.memory.of_pass(plain, packed=True) <= 6 * STEP_BYTES + sum(
        one.result_bytes for one in works
    )


def test_a_tied_table_is_in_memory_once(masked: Path) -> None:
    loaded = load(masked)
    assert loaded.head is not None
    decoder = loaded.head.module.cls.predictions.decoder.weight
    assert decoder.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr()
    sizes = {parameter.data_ptr(): parameter.numel() for parameter in loaded.head.module.parameters()}
    assert sum(sizes.values()) < 2 * decoder.numel()


# ------------------------------------------------------------------------------------- heads that are none


@pytest.fixture
def sequence(tmp_path: Path) -> Path:
    heads.build("bert", "sequence", tmp_path)
    return tmp_path


def why_not(folder: Path, caplog: pytest.LogCaptureFixture, **settings: Any) -> str:
    """The reason why the head is not served; the model itself still is."""
    loaded = load(folder, **settings)
    facts = loaded.facts
    assert (facts.head, facts.num_labels, facts.labels, loaded.head) == (HeadKind.NONE, 0, (), None)
    warnings = [record.message for record in caplog.records if "head is not served" in record.message]
    assert len(warnings) == (1 if facts.head_unsupported else 0)
    plan = OutputPlan(DType.FLOAT32, last_hidden_state=True)
    ids = np.arange(5, 12)
    [[output]] = engine_for(loaded).run([Work(ids, None, plan, plan.specs(7, facts.hidden_size))])
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder).eval()(torch.from_numpy(ids)[None]).last_hidden_state[0]
    np.testing.assert_allclose(output.data, expected, rtol=1e-4, atol=2e-5)
    return facts.head_unsupported


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def test_a_head_without_weights(sequence: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(sequence, lambda weights: weights.pop("classifier.weight"))
    assert why_not(sequence, caplog) == "the checkpoint lacks weights of it, such as 'classifier.weight'"


def test_a_head_behind_a_pooler_without_weights(sequence: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(sequence, lambda weights: weights.pop("bert.pooler.dense.weight"))
    said = "the checkpoint lacks weights of the pooler before it, such as 'bert.pooler.dense.weight'"
    assert why_not(sequence, caplog) == said


def test_a_masked_language_head_without_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As of a base model that is saved with the class name of another one."""
    heads.build("roberta", "masked", tmp_path)
    edit_weights(tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if "lm_head" in name])
    assert "lacks weights of it, such as 'lm_head." in why_not(tmp_path, caplog)


def test_a_head_of_another_size(sequence: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(sequence, lambda weights: weights.update({"classifier.weight": torch.ones(5, 32)}))
    assert "it cannot be loaded: " in why_not(sequence, caplog)


def test_a_head_of_numbers_that_are_none(sequence: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(sequence, lambda weights: weights["classifier.bias"].fill_(float("nan")))
    assert why_not(sequence, caplog) == "its scores are not finite (NaN or infinity) in float32"


@pytest.mark.parametrize("architecture", ["BertModel", "BertForQuestionAnswering", "BertForPreTraining"])
def test_classes_without_a_head_that_is_served(
    sequence: Path, architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(sequence, architectures=[architecture])
    assert why_not(sequence, caplog) == ""


def test_a_class_that_the_library_does_not_have(sequence: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may compute anything with these weights."""
    edit_config(sequence, architectures=["MyBertForSequenceClassification"])
    assert "'MyBertForSequenceClassification'" in why_not(sequence, caplog)


def test_a_head_whose_scores_differ_in_the_served_model(
    sequence: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Head, "of_rows", spoiled(Head.of_rows, after=1))
    assert "differs from that of the original model" in why_not(sequence, caplog)


def spoiled(of_rows: Any, *, after: int) -> Any:
    """Of the calls, those `after` the first ones give scores that are off by a hundredth."""
    numbers: Iterator[int] = iter(range(1_000_000))
    return lambda head, rows: of_rows(head, rows) * (1.0 if next(numbers) < after else 1.01)


def test_labels_are_those_of_the_configuration(sequence: Path) -> None:
    facts = load(sequence).facts
    assert (facts.head, facts.num_labels, facts.labels) == (HeadKind.SEQUENCE_CLASSIFICATION, 3, heads.LABELS)


def test_a_head_that_reads_the_first_row_needs_no_other(sequence: Path) -> None:
    head = load(sequence).head
    assert head is not None
    assert head.reads is Reads.FIRST_ROWS
    assert not hasattr(head.module.bert, "encoder")
    assert OutputField.LOGITS in {spec.field for spec in work(load(sequence).facts, 3).specs}

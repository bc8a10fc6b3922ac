"""What is served gives what transformers gives; what cannot is refused in one line that says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import families
from every_model import build, randomize
from layertap_server.engine import ModelLoadError, engine_for, load_model
from layertap_server.engine.loading.checkpoint import check_finite
from layertap_server.engine.model import LoadedModel
from layertap_server.enums import DType, Encoding, LayerMerge, OutputField, Pooling
from layertap_server.output_plans import EmbeddingPlan
from layertap_server.plan import OutputPlan, Work

Outputs = dict[OutputField, Any]


def load(folder: Path, dtype: str = "float32", max_input_tokens: int = 0) -> LoadedModel:
    return load_model(
        "m",
        str(folder),
        device="cpu",
        dtype=dtype,
        trust_remote_code=False,
        max_input_tokens=max_input_tokens,
    )


def refusal(folder: Path, **options: Any) -> str:
    """The one line that the model is refused with; it names the folder."""
    with pytest.raises(ModelLoadError) as caught:
        load(folder, **options)
    said = str(caught.value)
    assert "\n" not in said
    assert str(folder) in said
    return said


def ids_of(length: int, offset: int = 5) -> Any:
    return np.arange(offset, offset + length, dtype=np.int64) % 40 + 5


def answers(loaded: LoadedModel, texts: Sequence[Any], **wanted: Any) -> list[Outputs]:
    facts = loaded.facts
    plan = OutputPlan(DType.FLOAT32, **(wanted or {"last_hidden_state": True}))
    works = [Work(ids, None, plan, plan.specs(len(ids), facts.hidden_size)) for ids in texts]
    return [
        {spec.field: output.data for spec, output in zip(work.specs, outputs, strict=True)}
        for work, outputs in zip(works, engine_for(loaded).run(works), strict=True)
    ]


@torch.no_grad()
def own(model: Any, ids: Any) -> Any:
    return model(torch.from_numpy(ids)[None], output_hidden_states=True)


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(content | changes), "utf-8")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    families.build("bert", tmp_path)
    return tmp_path


# -------------------------------------------------------------------- answers that depend on nothing else


@pytest.mark.parametrize("model_type", ["mobilebert", "fnet", "convbert", "nystromformer", "yoso"])
def test_neighbours_in_a_batch_change_nothing_where_layers_mix_rows(model_type: str, tmp_path: Path) -> None:
    build(model_type, tmp_path)
    loaded = load(tmp_path)
    texts = [ids_of(6), ids_of(7, 9), ids_of(30, 2)]
    for text, together in zip(texts, answers(loaded, texts), strict=True):
        [alone] = answers(loaded, [text])
        for field, expected in alone.items():
            np.testing.assert_allclose(together[field], expected, rtol=1e-4, atol=2e-5)


@pytest.fixture
def block_sparse(tmp_path: Path) -> Path:
    """A BigBird whose blocks are so small that texts of more than 14 tokens are sparse."""
    torch.manual_seed(0)
    config = transformers.BigBirdConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=96,
        attention_type="block_sparse",
        block_size=2,
        num_random_blocks=1,
    )
    model = AutoModel.from_config(config)
    randomize(model, 3.0)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_short_text_does_not_make_the_next_one_dense(block_sparse: Path) -> None:
    loaded = load(block_sparse)
    assert loaded.facts.max_tokens == 96
    texts = [ids_of(40), ids_of(6), ids_of(41, 9), ids_of(14), ids_of(15), ids_of(96)]
    given = answers(loaded, texts, last_hidden_state=True, hidden_states=(0, 1, 2, 3), pooler_output=True)
    is_sparse = []
    for text, outputs in zip(texts, given, strict=True):
        fresh = AutoModel.from_pretrained(block_sparse).eval()
        expected = own(fresh, text)
        is_sparse.append(fresh.attention_type == "block_sparse")
        for field, wanted in (
            (OutputField.LAST_HIDDEN_STATE, expected.last_hidden_state[0]),
            (OutputField.HIDDEN_STATES, torch.cat([one[:, : len(text)] for one in expected.hidden_states])),
            (OutputField.POOLER_OUTPUT, expected.pooler_output[0]),
        ):
            np.testing.assert_allclose(outputs[field], wanted, rtol=1e-4, atol=2e-5)
    assert is_sparse == [True, False, True, False, True, True]


def test_the_last_hidden_state_may_be_behind_a_norm_of_its_own(tmp_path: Path) -> None:
    """CLIP's text model: hidden state L is before its final norm, and its pooler takes the row of the last token."""
    model = build("clip_text_model", tmp_path)
    loaded = load(tmp_path)
    assert loaded.facts.is_last_apart
    assert loaded.facts.has_pooler
    ids = ids_of(9)
    ids[6] = model.config.eos_token_id
    expected = own(AutoModel.from_pretrained(tmp_path).eval(), ids)
    vector = EmbeddingPlan(
        Pooling.LAST_TOKEN,
        (loaded.facts.last_index,),
        LayerMerge.CONCAT,
        False,
        32,
        Encoding.FLOAT32,
        ((0, 9),),
        False,
    )
    [given] = answers(
        loaded, [ids], last_hidden_state=True, hidden_states=(0, 3), pooler_output=True, embeddings=(vector,)
    )
    [shallow] = answers(loaded, [ids], hidden_states=(3,))
    assert not torch.allclose(expected.hidden_states[3], expected.last_hidden_state, atol=1e-2)
    for actual, wanted in (
        (given[OutputField.LAST_HIDDEN_STATE], expected.last_hidden_state[0]),
        (given[OutputField.HIDDEN_STATES][0], expected.hidden_states[0][0]),
        (given[OutputField.HIDDEN_STATES][1], expected.hidden_states[3][0]),
        (shallow[OutputField.HIDDEN_STATES][0], expected.hidden_states[3][0]),
        (given[OutputField.POOLER_OUTPUT], expected.pooler_output[0]),
        (given[OutputField.EMBEDDINGS], expected.last_hidden_state[0, -1]),
    ):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=2e-5)


# ----------------------------------------------------------------------------------------- numbers that are none


def test_weights_too_large_for_float16_are_refused_for_it(bert: Path) -> None:
    file = bert / "model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.endswith("intermediate.dense.weight"):
            weights[name] *= 3e4
        if name.endswith(".output.dense.weight") and "attention" not in name:
            weights[name] /= 3e4
    save_file(weights, file, {"format": "pt"})
    assert load(bert).facts.compute_dtype is DType.FLOAT32
    said = refusal(bert, dtype="float16")
    assert "in float16, " in said
    assert said.endswith("is not finite, but that of the original model in float32 is; use --dtype float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(bert: Path, value: float) -> None:
    file = bert / "model.safetensors"
    weights = load_file(file)
    weights["encoder.layer.2.output.dense.weight"][3, 4] = value
    save_file(weights, file, {"format": "pt"})
    assert "'encoder.layer.2.output.dense.weight'" in refusal(bert)


def test_a_token_without_numbers_spoils_only_its_own_texts(
    bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = bert / "model.safetensors"
    weights = load_file(file)
    weights["embeddings.word_embeddings.weight"][41] = float("nan")
    save_file(weights, file, {"format": "pt"})
    loaded = load(bert)
    assert "1 rows of 'embeddings.word_embeddings.weight' are not finite, the first is 41" in caplog.text
    bad, good = answers(loaded, [np.array([5, 41, 7]), np.array([5, 6, 7])])
    assert np.isnan(bad[OutputField.LAST_HIDDEN_STATE]).all()
    assert np.isfinite(good[OutputField.LAST_HIDDEN_STATE]).all()


def test_large_weights_that_sum_to_infinity_are_finite() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.data.fill_(3e38)
    check_finite("m", model)


# ------------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("model_type", "limit"),
    [("data2vec-text", 64), ("longformer", 64), ("xmod", 64), ("bert", 66), ("t5", 512)],
)
def test_the_longest_text_is_the_one_that_the_model_takes(
    model_type: str, limit: int, tmp_path: Path
) -> None:
    build(model_type, tmp_path)
    loaded = load(tmp_path)
    assert loaded.facts.max_tokens == limit
    [outputs] = answers(loaded, [np.full(limit, 7)])
    assert np.isfinite(outputs[OutputField.LAST_HIDDEN_STATE]).all()


@pytest.mark.parametrize(
    ("model_type", "asked", "limit"),
    [("t5", 700, 700), ("deberta-v2", 100, 100), ("bert", 100, 66), ("bert", 20, 20), ("roberta", 66, 64)],
)
def test_the_limit_may_be_raised_where_no_table_of_positions_ends(
    model_type: str, asked: int, limit: int, tmp_path: Path
) -> None:
    model = build(model_type, tmp_path)
    if model_type == "deberta-v2":
        model.config.position_biased_input, model.config.relative_attention = False, True
        AutoModel.from_config(model.config).save_pretrained(tmp_path)
    assert load(tmp_path, max_input_tokens=asked).facts.max_tokens == limit


# ----------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "setting",
    [
        {"return_dict": False},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_2"},
        {"output_hidden_states": True, "output_attentions": True},
    ],
)
def test_how_a_checkpoint_was_used_does_not_matter(bert: Path, setting: dict[str, Any]) -> None:
    edit(bert / "config.json", **setting)
    assert load(bert).facts.num_layers == families.NUM_LAYERS


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def write_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "x"}', "utf-8"
    )


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "cannot load the model"),
    "empty weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "cannot load the model",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load the model"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{", "utf-8"), "cannot load the model"),
    "unknown type": (
        lambda folder: edit(folder / "config.json", model_type="nothing"),
        "cannot load the model",
    ),
    "sizes": (lambda folder: edit(folder / "config.json", hidden_size=64), "cannot load the model"),
    "vocabulary": (lambda folder: edit(folder / "config.json", vocab_size=1000), "cannot load the model"),
    "activation": (
        lambda folder: edit(folder / "config.json", hidden_act="nothing"),
        "cannot load the model",
    ),
    "heads": (lambda folder: edit(folder / "config.json", num_attention_heads=5), "cannot load the model"),
    "more layers": (
        lambda folder: edit(folder / "config.json", num_hidden_layers=2),
        "that the model of its configuration does not have",
    ),
    "fewer layers": (lambda folder: edit(folder / "config.json", num_hidden_layers=6), "lacks"),
    "decoder": (lambda folder: edit(folder / "config.json", is_decoder=True), "is a decoder"),
    "quantized": (
        lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "are quantized (method 'gptq')",
    ),
    "unknown quantization": (
        lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "new"}),
        "are quantized (method 'new')",
    ),
    "unnamed quantization": (
        lambda folder: edit(folder / "config.json", quantization_config={"bits": 4}),
        "are quantized (method 'unknown')",
    ),
    "adapter": (write_adapter, "has an adapter"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(bert: Path, fault: str) -> None:
    break_it, said = BROKEN[fault]
    break_it(bert)
    assert said in refusal(bert)


def test_adapters_inside_of_the_weights_are_refused(bert: Path) -> None:
    file = bert / "model.safetensors"
    weights = load_file(file)
    weights["encoder.layer.0.attention.self.query.adapter.weight"] = torch.zeros(4, 4)
    save_file(weights, file, {"format": "pt"})
    assert (
        "that the model of its configuration does not have, such as 'encoder.layer.0.attention.self.query.adapter.weight'"
        in refusal(bert)
    )


def test_a_head_and_old_buffers_are_no_surplus(tmp_path: Path) -> None:
    families.build("bert", tmp_path)
    config = transformers.BertConfig.from_pretrained(tmp_path)
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["bert.embeddings.position_ids"] = torch.arange(config.max_position_embeddings)[None]
    weights["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    assert not loaded.facts.has_pooler  # it was not in the checkpoint


@pytest.mark.parametrize(
    "model_type", ["gpt2", "llama", "openai-gpt", "qwen3", "mamba", "bert-generation", "git"]
)
def test_decoders_are_refused(model_type: str, tmp_path: Path) -> None:
    model = build(model_type, tmp_path)
    if model_type == "bert-generation":
        model.config.is_decoder = True
        model.config.save_pretrained(tmp_path)
    assert "is a decoder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("bart", "transformers has no encoder for 'bart'"),
        ("bros", "token ids without other inputs"),
        ("dpr", "it returns no last_hidden_state"),
        ("reformer", "does not return a hidden state for each layer and token"),
        ("vit", "it does not read token ids"),
        ("wav2vec2", "it has no table of token embeddings"),
    ],
)
def test_what_is_no_encoder_of_text_is_refused(model_type: str, said: str, tmp_path: Path) -> None:
    build(model_type, tmp_path)
    assert said in refusal(tmp_path)


def test_results_that_do_not_repeat_are_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = transformers.models.bert.modeling_bert.BertEmbeddings.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        embedded = right(*args, **kwargs)
        return embedded + 0.01 * torch.randn_like(embedded)

    monkeypatch.setattr(transformers.models.bert.modeling_bert.BertEmbeddings, "forward", forward)
    assert "its results are not repeatable" in refusal(bert)

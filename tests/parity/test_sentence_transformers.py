"""The configured embedding is what sentence-transformers' `encode` gives, whatever its folder is made of."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

import harness
import layertap
from families import HIDDEN_SIZE, MAX_TOKENS, build, sentences
from harness import Running
from layertap.v1 import encoder_pb2 as pb
from layertap.v1.encoder_pb2_grpc import EncoderServiceStub
from layertap_server.config import Config
from layertap_server.engine.loading import load as loading
from layertap_server.engine.loading import ways
from layertap_server.engine.loading.sentence_transformers import UnsupportedError, read_embedding_config
from layertap_server.engine.projection import load_projection
from layertap_server.engine_host import EngineHost
from layertap_server.tokenization import encoder as text_encoding

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        CNN,
        Dense,
        Dropout,
        LayerNorm,
        Normalize,
        Pooling,
        Transformer,
    )

WIDE, NARROW = 48, 20
TOLERANCE = 1e-5
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
TEXTS = [
    "",
    "Short.",
    "the CASE of Its letters, ÄÖÜ, is kept or NOT",
    *(" ".join(sentences()[40 + i : 41 + i * 3]) for i in range(6)),
]
# About forty tokens: more than any configured limit here, and fewer than the model's limit.
TEXT = "random words of one text, which has some forty tokens or a few more than that"
PROMPT = "query: "


def linear_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Other than what a module begins with, where that would be an identity."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return module


def dense(size: int, into: int, activation: torch.nn.Module | None = None, **options: Any) -> torch.nn.Module:
    return linear_weights(Dense(size, into, activation_function=activation or torch.nn.Tanh(), **options))


def pooled(mode: Any = "mean", size: int = HIDDEN_SIZE, **options: Any) -> list[torch.nn.Module]:
    return [Pooling(size, mode, **options)]


def edit(folder: Path, filename: str, **changes: Any) -> None:
    path = folder / filename
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, **changes}))


def legacy(folder: Path) -> None:
    """As the library's first versions saved it: the model in a folder, flags for poolings, older names."""
    kept = {"modules.json", "config_sentence_transformers.json", "README.md"}
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in kept:
            shutil.move(path, inner / path.name)
    (inner / "sentence_bert_config.json").unlink()
    edit(inner, "sentence_roberta_config.json", max_seq_length=17, do_lower_case=True)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rsplit(".", 1)[-1]
    (folder / "modules.json").write_text(json.dumps(modules))
    flags = {f"pooling_mode_{mode}": mode in ("cls_token", "mean_tokens", "max_tokens") for mode in FLAGS}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": HIDDEN_SIZE, **flags})
    )
    weights = folder / "2_Dense" / "model.safetensors"
    torch.save(
        SentenceTransformer(str(folder), device="cpu")[2].state_dict(), weights.with_name("pytorch_model.bin")
    )
    weights.unlink()


FLAGS = (
    "mean_tokens",
    "cls_token",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A folder that sentence-transformers saves, and what is then changed in it."""

    modules: Callable[[], list[torch.nn.Module]]
    family: str = "bert"
    max_seq_length: int | None = None
    changes: Callable[[Path], None] | None = None
    options: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    **{mode: Case(lambda mode=mode: pooled(mode)) for mode in MODES},  # type: ignore[misc]
    "several poolings": Case(lambda: [*pooled(("mean", "cls", "weightedmean", "max")), Normalize()]),
    "mean and max": Case(lambda: pooled(("mean", "max"))),
    "dense": Case(lambda: [*pooled(), dense(HIDDEN_SIZE, WIDE), Normalize()]),
    "several dense": Case(
        lambda: [
            *pooled(("max", "lasttoken")),
            Normalize(),
            dense(2 * HIDDEN_SIZE, WIDE, torch.nn.GELU(), bias=False),
            Dropout(0.5),
            linear_weights(LayerNorm(WIDE)),
            dense(WIDE, NARROW, torch.nn.Identity()),
        ]
    ),
    "residual": Case(
        lambda: [
            *pooled(),
            dense(HIDDEN_SIZE, WIDE, torch.nn.ReLU(), use_residual=True),
            Normalize(),
            Normalize(),
        ]
    ),
    "dense on tokens": Case(
        lambda: [
            dense(HIDDEN_SIZE, WIDE, module_input_name="token_embeddings"),
            Normalize(module_input_name="token_embeddings"),
            *pooled(("mean", "weightedmean"), WIDE),
            dense(2 * WIDE, NARROW, torch.nn.Sigmoid()),
        ],
        max_seq_length=30,
    ),
    "named values": Case(
        lambda: [
            *pooled(),
            dense(HIDDEN_SIZE, WIDE, module_output_name="other"),
            dense(WIDE, NARROW, module_input_name="other", module_output_name="sentence_embedding"),
            dense(WIDE, NARROW, module_input_name="other", module_output_name="unread"),
        ]
    ),
    "truncated": Case(lambda: [*pooled(), Normalize()], options={"truncate_dim": 10}),
    "truncated dense": Case(
        lambda: [*pooled(), dense(HIDDEN_SIZE, WIDE), Normalize()], options={"truncate_dim": 11}
    ),
    "max_seq_length": Case(lambda: [*pooled(), Normalize()], max_seq_length=12),
    "older max_seq_length": Case(
        pooled,
        changes=lambda folder: edit(
            folder, "sentence_bert_config.json", max_seq_length=9, do_lower_case=False
        ),
    ),
    "tokenizer_args": Case(
        pooled,
        changes=lambda folder: edit(
            folder, "sentence_bert_config.json", max_seq_length=9, tokenizer_args={"model_max_length": 14}
        ),
    ),
    "lower case": Case(
        pooled,
        family="roberta",
        changes=lambda folder: edit(folder, "sentence_bert_config.json", do_lower_case=True),
    ),
    "prompts": Case(
        lambda: [*pooled(("mean", "cls", "weightedmean", "lasttoken"), include_prompt=False), Normalize()],
        max_seq_length=24,
        options={"prompts": {"query": PROMPT, "bare": "quer", "long": "many words of a prompt " * 5}},
    ),
    "prompts of bytes": Case(
        lambda: pooled("mean", include_prompt=False),
        family="roberta",
        options={"prompts": {"query": PROMPT, "bare": "quer"}},
    ),
    "default prompt": Case(
        lambda: [*pooled(), Normalize()],
        options={"prompts": {"query": PROMPT}, "default_prompt_name": "query"},
    ),
    "legacy": Case(
        lambda: [*pooled(("cls", "max", "mean")), dense(3 * HIDDEN_SIZE, WIDE), Normalize()], changes=legacy
    ),
    "padded": Case(
        lambda: [
            dense(HIDDEN_SIZE, WIDE, module_input_name="token_embeddings"),
            *pooled(("weightedmean", "mean_sqrt_len_tokens"), WIDE),
        ],
        family="deberta",
    ),
    "t5": Case(
        lambda: [*pooled(), dense(HIDDEN_SIZE, WIDE, torch.nn.Identity(), bias=False), Normalize()], "t5"
    ),
}


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, file, **changes)


def with_module(folder: Path, kind: str, path: str = "2_Other") -> None:
    """With one more module of that class, and nothing in its folder."""
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": len(modules), "name": str(len(modules)), "path": path, "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))


# Embeddings that are not supported, and what the error must name.
MODULES = "sentence_transformers.sentence_transformer.modules"
UNSUPPORTED: dict[str, tuple[Case, str]] = {
    "cnn": (
        Case(lambda: [CNN(HIDDEN_SIZE, 8), *pooled("mean", 24)]),
        r"CNN.*1_CNN.*unknown",
    ),
    "of the repository": (
        Case(pooled, changes=lambda folder: with_module(folder, "custom_st.Whitening")),
        r"custom_st\.Whitening.*2_Other",
    ),
    "newer": (
        Case(pooled, changes=lambda folder: with_module(folder, f"{MODULES}.whitening.Whitening")),
        "Whitening",
    ),
    "outside": (
        Case(pooled, changes=lambda folder: with_module(folder, f"{MODULES}.Dense", "../elsewhere")),
        "outside.*elsewhere",
    ),
    "activation": (
        Case(
            lambda: [*pooled(), dense(HIDDEN_SIZE, WIDE)],
            changes=edited("2_Dense/config.json", activation_function="custom.Swish"),
        ),
        r"2_Dense.*custom\.Swish",
    ),
    "activation that is no module": (
        Case(
            lambda: [*pooled(), dense(HIDDEN_SIZE, WIDE)],
            changes=edited("2_Dense/config.json", activation_function="torch.hub.load"),
        ),
        r"2_Dense.*torch\.hub\.load",
    ),
    "no weights": (
        Case(
            lambda: [*pooled(), dense(HIDDEN_SIZE, WIDE)],
            changes=lambda folder: (folder / "2_Dense/model.safetensors").unlink(),
        ),
        "2_Dense.*no weights",
    ),
    "does not fit": (Case(lambda: [*pooled(), dense(WIDE, NARROW)]), "dimensions"),
    "pooling": (Case(pooled, changes=edited("1_Pooling/config.json", pooling_mode="median")), "median"),
    "reads nothing": (
        Case(lambda: [*pooled(), dense(HIDDEN_SIZE, WIDE, module_input_name="other")]),
        "2_Dense.*'other'",
    ),
    "no pooling": (Case(lambda: [Dropout(0.1)]), "no Pooling"),
    "sparse": (
        Case(pooled, changes=edited("config_sentence_transformers.json", model_type="SparseEncoder")),
        "SparseEncoder",
    ),
    "task": (
        Case(pooled, changes=edited("sentence_bert_config.json", transformer_task="fill-mask")),
        "fill-mask",
    ),
    "pooler": (
        Case(
            pooled,
            changes=edited(
                "sentence_bert_config.json",
                modality_config={"text": {"method": "forward", "method_output_name": "pooler_output"}},
            ),
        ),
        "Transformer",
    ),
    "processing": (
        Case(
            pooled,
            changes=edited(
                "sentence_bert_config.json", processing_kwargs={"text": {"add_special_tokens": False}}
            ),
        ),
        "add_special_tokens",
    ),
    "adapter": (Case(pooled, changes=edited("adapter_config.json", peft_type="LORA")), "PEFT"),
    "default prompt": (
        Case(pooled, changes=edited("config_sentence_transformers.json", default_prompt_name="none")),
        "default prompt",
    ),
    "limit": (Case(pooled, changes=edited("sentence_bert_config.json", max_seq_length="many")), "limit"),
}

# Two of these are also loaded by a server: one is rejected for its configuration files, one for its weights.
REFUSED = ("cnn", "does not fit")


def save(case: Case, folder: Path, transformer: Transformer) -> None:
    model = SentenceTransformer(modules=[transformer, *case.modules()], device="cpu", **case.options)
    own = model.max_seq_length
    model.max_seq_length = case.max_seq_length or own
    model.save(str(folder), create_model_card=False)
    model.max_seq_length = own
    if case.changes is not None:
        case.changes(folder)


def name_of(case: str) -> str:
    return case.replace(" ", "-")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models so small gain nothing by more, and wait for each other's threads where a machine is busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sentence-transformers")
    transformers: dict[str, Transformer] = {}
    cases = {name_of(name): case for name, case in CASES.items()}
    cases |= {f"not-{name_of(name)}": case for name, (case, _) in UNSUPPORTED.items()}
    for name, case in cases.items():
        if case.family not in transformers:
            build(case.family, root / f"base-{case.family}")
            transformers[case.family] = Transformer(str(root / f"base-{case.family}"))
        save(case, root / name, transformers[case.family])
    build("bert", root / "plain")
    return root


def once_for_each_tokenizer(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    made: dict[str, Any] = {}

    def cached(tokenizer: Any) -> Any:
        described = tokenizer.to_str()
        if described not in made:
            made[described] = make(tokenizer)
        return made[described]

    return cached


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[Running]:
    names = [*map(name_of, CASES), *(f"not-{name_of(name)}" for name in REFUSED), "plain"]
    with pytest.MonkeyPatch.context() as patched:
        # Tests of these families that other files have too, and that would take most of the time here.
        patched.setattr(EngineHost, "warm_up", lambda _: None)
        patched.setattr(ways, "device_modules", lambda *_: {})
        patched.setattr(loading, "verify", lambda *_: None)
        patched.setattr(ways, "prepare_linears", lambda *_, **__: {})
        patched.setattr(text_encoding, "wordpiece_of", once_for_each_tokenizer(text_encoding.wordpiece_of))
        patched.setattr(harness, "START_TIMEOUT_S", 600)
        with harness.serve({name: root / name for name in names}, threads=1) as running:
            yield running


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[layertap.Client]:
    with layertap.Client(running.address) as client:
        yield client


@cache
def library_model(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def theirs(folder: Path, texts: list[Any], **options: Any) -> np.ndarray:
    return library_model(folder).encode(texts, convert_to_numpy=True, **options)


def ours(client: layertap.Client, model: str, texts: list[Any], **options: Any) -> np.ndarray:
    embeddings = options.pop("embeddings", layertap.Embedding())
    results = client.encode(texts, model=model, embeddings=embeddings, truncation="end", **options)
    return np.stack([result.embeddings[0] for result in results])


def same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_encode_gives(root: Path, client: layertap.Client, name: str) -> None:
    model = name_of(name)
    same(ours(client, model, TEXTS), theirs(root / model, TEXTS))
    pairs = [layertap.Pair("one text", "and ANOTHER"), layertap.Pair(TEXTS[5], TEXTS[2])]
    same(ours(client, model, pairs), theirs(root / model, [(one.first, one.second) for one in pairs]))
    assert client.model(model).embedding_unsupported == ""


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_given_has_a_reason(root: Path, name: str) -> None:
    folder = str(root / f"not-{name_of(name)}")
    config = read_embedding_config(folder)
    said = config.unsupported
    if not said:
        with pytest.raises(UnsupportedError) as unsupported:
            load_projection(folder, config, HIDDEN_SIZE, torch.device("cpu"), trust_remote_code=False)
        said = str(unsupported.value)
    assert re.search(UNSUPPORTED[name][1], said), said


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_given_is_refused_by_name(client: layertap.Client, name: str) -> None:
    model, reason = f"not-{name_of(name)}", UNSUPPORTED[name][1]
    facts = client.model(model)
    assert re.search(reason, facts.embedding_unsupported), facts.embedding_unsupported
    assert facts.default_pooling == ""
    with pytest.raises(layertap.FailedPrecondition, match=reason) as refused:
        client.encode("a text", model=model, embeddings=True)
    assert refused.value.reason == "EMBEDDING_UNSUPPORTED"
    assert refused.value.violations[0][0] == "outputs.embeddings[0].pooling"
    own = client.encode("a text", model=model, last_hidden_state=True, embeddings=layertap.Embedding("mean"))
    np.testing.assert_allclose(own.embedding, own.last_hidden_state.mean(0), atol=1e-5)


def test_the_default_model_takes_as_many_tokens_as_it_is_configured_for() -> None:
    """Which are half of those that it has positions for."""
    (folder,) = Config().models().values()
    texts = [" ".join(sentences()[:40]), "a short text"]
    with (
        harness.serve({"minilm": folder}, threads=1) as running,
        layertap.Client(running.address) as client,
    ):
        facts = client.model()
        assert (facts.max_tokens, facts.default_pooling, facts.default_normalize) == (512, "mean", True)
        same(ours(client, "minilm", texts), theirs(Path(folder), texts))
        cut = client.encode(texts[0], embeddings=True, truncation="end")
        whole = client.encode(texts[0], embeddings=True, truncation="end", max_tokens=512)
        assert (cut.token_count, whole.token_count) == (256, 512)
        assert cut.embedding @ whole.embedding < 0.99


def test_a_folder_without_modules_is_pooled_to_the_mean(root: Path, client: layertap.Client) -> None:
    same(ours(client, "plain", TEXTS), theirs(root / "plain", TEXTS))
    facts = client.model("plain")
    assert (facts.default_pooling, facts.default_normalize) == ("mean", False)


# ------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("name", ["query", "bare", "long"])
@pytest.mark.parametrize("model", ["prompts", "prompts-of-bytes"])
def test_the_tokens_of_a_prompt_are_left_out(
    root: Path, client: layertap.Client, model: str, name: str
) -> None:
    if name not in client.model(model).prompts:
        pytest.skip("it has no such prompt")
    expected = theirs(root / model, TEXTS, prompt_name=name)
    same(ours(client, model, TEXTS, prompt_name=name), expected)
    pairs = [layertap.Pair("one", "other"), layertap.Pair(TEXTS[4], TEXTS[3])]
    expected = theirs(root / model, [(one.first, one.second) for one in pairs], prompt_name=name)
    same(ours(client, model, pairs, prompt_name=name), expected)


def test_the_default_prompt_is_put_before_what_encode_would_put_it_before(
    root: Path, client: layertap.Client
) -> None:
    model, folder = "default-prompt", root / "default-prompt"
    same(ours(client, model, TEXTS[:3], prompt_name="document"), theirs(folder, TEXTS[:3], prompt=""))
    mean = layertap.Embedding("mean")
    same(ours(client, model, TEXTS[:3], embeddings=mean), theirs(folder, TEXTS[:3], prompt=""))
    text = TEXTS[1]
    plain = client.encode(text, model=model, tokens=True)
    assert plain.token_count == client.tokenize(text, model=model).ids.size
    prompted = client.encode(text, model=model, tokens=True, embeddings=True)
    assert prompted.token_count > plain.token_count
    # Ids and words are the caller's to prompt.
    ids = layertap.TokenIds(plain.tokens.ids)
    words = layertap.Words(["short", "text"])
    for one in client.encode([ids, words], model=model, embeddings=True, tokens=True):
        assert one.token_count in (plain.token_count, 4)


def test_words_beside_a_prompt_that_is_left_out(client: layertap.Client) -> None:
    ids = client.tokenize("a text", model="prompts").ids
    by_id = client.encode(layertap.TokenIds(ids), model="prompts", embeddings=True).embedding
    np.testing.assert_allclose(
        by_id, client.encode("a text", model="prompts", embeddings=True).embedding, atol=TOLERANCE
    )


# ------------------------------------------------------------------------------ the token limit


def test_the_configured_limit_is_that_of_the_configured_embedding_alone(client: layertap.Client) -> None:
    model, text = "max_seq_length", TEXT
    assert client.model(model).max_tokens == MAX_TOKENS
    num_tokens = client.tokenize(text, model=model).ids.size
    assert 12 < num_tokens <= MAX_TOKENS
    for embeddings in (True, [layertap.Embedding("mean"), layertap.Embedding()]):
        with pytest.raises(layertap.InvalidArgument, match=r"max_seq_length. 12.*max_tokens.*64") as refused:
            client.encode([text], model=model, embeddings=embeddings)
        assert (refused.value.reason, refused.value.violations[0][0]) == (
            "TOO_MANY_TOKENS",
            "inputs[0].text",
        )
    for cut, count in (("end", 12), ("start", 12)):
        one = client.encode(text, model=model, embeddings=True, truncation=cut, tokens=True)
        assert (one.token_count, one.truncated_tokens) == (count, num_tokens - count)
    assert client.encode(text, model=model, last_hidden_state=True).token_count == num_tokens
    assert client.encode(text, model=model, embeddings=layertap.Embedding("mean")).token_count == num_tokens


def test_max_tokens_overrides_it(root: Path, client: layertap.Client) -> None:
    model, text = "max_seq_length", TEXT
    theirs_wide = SentenceTransformer(str(root / model), device="cpu")
    for limit in (5, 20, MAX_TOKENS):
        theirs_wide.max_seq_length = limit
        same(ours(client, model, [text, TEXTS[8]], max_tokens=limit), theirs_wide.encode([text, TEXTS[8]]))
    with pytest.raises(layertap.InvalidArgument, match="more than the model's 64") as refused:
        client.encode(text, model=model, embeddings=True, max_tokens=MAX_TOKENS + 1)
    assert refused.value.violations[0][0] == "max_tokens"


# The special tokens of a text and of a pair: native code, the Rust tokenizer, and one without [CLS].
NUM_SPECIAL = {"older-max_seq_length": (2, 3), "lower-case": (2, 4), "t5": (1, 2)}


@pytest.mark.parametrize("family", NUM_SPECIAL)
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("cut", ["end", "start"])
def test_it_is_the_limit_of_any_request(client: layertap.Client, family: str, limit: int, cut: str) -> None:
    text = TEXT
    inputs = [
        text,
        layertap.Pair(text, TEXTS[2]),
        layertap.Words(text.split()),
        layertap.TokenIds(range(10, 40)),
    ]
    for one in inputs:
        with pytest.raises(layertap.InvalidArgument, match=f"max_tokens of {limit}"):
            client.encode(one, model=family, last_hidden_state=True, max_tokens=limit)
        num_special = NUM_SPECIAL[family][isinstance(one, layertap.Pair)]
        options = {"model": family, "max_tokens": limit, "truncation": cut, "last_hidden_state": True}
        if limit < num_special and not isinstance(one, layertap.TokenIds):
            with pytest.raises(layertap.InvalidArgument, match="more special tokens than that"):
                client.encode(one, **options)
            continue
        short = client.encode(one, tokens=True, **options)
        assert short.token_count == limit
        assert short.truncated_tokens > 0
        assert len(short.tokens.ids) == len(short.last_hidden_state) == limit


# -------------------------------------------------------------------------- a caller's own wishes


def test_a_pooling_of_ones_own_is_not_projected(client: layertap.Client) -> None:
    text = TEXT
    wanted = [
        layertap.Embedding("mean", normalize=False),
        layertap.Embedding(),
        layertap.Embedding(normalize=False),
    ]
    one = client.encode(text, model="dense", last_hidden_state=True, embeddings=wanted)
    own, configured, not_normalized = one.embeddings
    np.testing.assert_allclose(own, one.last_hidden_state.mean(0), atol=1e-5)
    assert (len(configured), len(not_normalized)) == (WIDE, WIDE)
    np.testing.assert_allclose(not_normalized / np.linalg.norm(not_normalized), configured, atol=1e-6)


@pytest.mark.parametrize("name", ["dense", "truncated dense", "several dense", "dense on tokens", "mean"])
def test_without_projection_it_is_what_the_pooling_gives(root: Path, running: Running, name: str) -> None:
    """What the library's Pooling module gives, normalized where the model ends with that."""
    model, library = name_of(name), library_model(root / name_of(name))
    features = library.preprocess([TEXT])
    with torch.inference_mode():
        for module in library:
            features = module(features)
            if isinstance(module, Pooling):
                break
    expected = features["sentence_embedding"][0]
    if isinstance(library[-1], Normalize):
        expected = torch.nn.functional.normalize(expected, dim=-1)
    request = pb.EncodeRequest(
        model=model,
        inputs=[pb.Input(text=TEXT)],
        outputs=pb.OutputSelection(
            embeddings=[pb.EmbeddingSpec(without_projection=True), pb.EmbeddingSpec()]
        ),
        truncation=pb.TRUNCATION_END,
    )
    with grpc.insecure_channel(running.address) as channel:
        [result] = EncoderServiceStub(channel).Encode(request).results
    pooled, configured = (np.frombuffer(tensor.data, np.float32) for tensor in result.embeddings)
    same(pooled, expected.numpy())
    same(configured, theirs(root / model, [TEXT])[0])


def test_dimensions_are_cut_behind_the_modules_and_before_normalizing(
    root: Path, client: layertap.Client
) -> None:
    for model in ("dense", "truncated-dense"):
        got = ours(client, model, TEXTS, embeddings=layertap.Embedding(dimensions=9))
        same(got, theirs(root / model, TEXTS, truncate_dim=9, normalize_embeddings=True))
        whole = ours(client, model, TEXTS, embeddings=layertap.Embedding(dimensions=WIDE))
        same(whole, theirs(root / model, TEXTS, truncate_dim=WIDE))
    with pytest.raises(layertap.InvalidArgument, match=f"{WIDE + 1} is more than the vector's {WIDE}"):
        client.encode("a", model="dense", embeddings=layertap.Embedding(dimensions=WIDE + 1))


def test_other_layers_are_projected_where_they_fit(client: layertap.Client) -> None:
    one = client.encode(
        "a text", model="dense", embeddings=layertap.Embedding(layers=[-1, 2], layer_merge="mean")
    )
    assert one.embedding.shape == (WIDE,)
    with pytest.raises(layertap.InvalidArgument, match="64 dimensions") as refused:
        client.encode("a text", model="dense", embeddings=layertap.Embedding(layers=[-1, 2]))
    assert refused.value.reason == "LAYERS_DO_NOT_FIT"
    assert refused.value.violations[0][0] == "outputs.embeddings[0].layers"
    both = client.encode("a text", model="several-poolings", embeddings=layertap.Embedding(layers=[-1, 2]))
    assert both.embedding.shape == (4 * 2 * HIDDEN_SIZE,)


@pytest.mark.parametrize("name", ["dense", "weightedmean", "dense on tokens", "several poolings"])
def test_spans_are_pooled_as_configured(root: Path, client: layertap.Client, name: str) -> None:
    """Each as the library's modules make it of those tokens alone."""
    model, text = name_of(name), TEXT
    num_tokens = client.tokenize(text, model=model).ids.size
    ends = [(0, num_tokens), (1, 3), (2, num_tokens - 1), (1, 3)]
    spans = [layertap.Span(start, end, "token") for start, end in ends]
    got = client.encode(text, model=model, embeddings=layertap.Embedding(spans=spans)).embedding
    library = library_model(root / model)
    for row, (start, end) in zip(got, ends, strict=True):
        features = library.preprocess([text])
        with torch.inference_mode():
            for module in library:
                if isinstance(module, Pooling):
                    mask = torch.zeros_like(features["attention_mask"])
                    mask[:, start:end] = 1
                    features["attention_mask"] = mask
                    weighted = "weightedmean" in module.pooling_mode
                features = module(features)
        if not weighted:  # the library weights by the distance from the first token that it sees
            same(row, features["sentence_embedding"][0].numpy())
    same(got[0], theirs(root / model, [text])[0])
    assert np.array_equal(got[1], got[3])


def test_what_the_model_says_of_its_pooling(client: layertap.Client) -> None:
    said = {name: client.model(name_of(name)).default_pooling for name in CASES}
    assert said["mean"] == said["dense"] == "mean"
    assert said["mean and max"] == "mean_max"
    assert (said["cls"], said["max"], said["lasttoken"]) == ("cls", "max", "last_token")
    assert said["weightedmean"] == "weighted_mean"
    assert said["several poolings"] == said["legacy"] == ""
    normalized = {name for name in CASES if client.model(name_of(name)).default_normalize}
    assert {"dense", "residual", "t5"} <= normalized
    assert not {"several dense", "mean", "named values"} & normalized


def test_texts_of_one_kind_are_projected_in_one_product(running: Running, client: layertap.Client) -> None:
    model = running.models["dense"]
    projection = model.scheduler.engine._loaded.projection
    rows: list[int] = []
    of_vectors = type(projection).of_vectors

    def counted(self: Any, vectors: torch.Tensor) -> torch.Tensor:
        rows.append(len(vectors))
        return of_vectors(self, vectors)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(projection), "of_vectors", counted)
        client.encode(["a", "text", "and another"] * 5, model="dense", embeddings=True)
        assert rows == [15]
        client.encode(["a"], model="dense", embeddings=layertap.Embedding("mean"))
        assert rows == [15], "who does not ask pays nothing"

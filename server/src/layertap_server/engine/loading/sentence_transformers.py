"""The configuration of a checkpoint's embedding, read from its files as sentence-transformers reads them.

Sources: sentence-transformers' `BaseModel._load_config_modules`, `Transformer.load_config` and the `load` of
each module. Where a checkpoint configures something that this server does not support,
`EmbeddingConfig.unsupported` says what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PureWindowsPath
from typing import Any

from transformers.utils import cached_file

from layertap_server.enums import Pooling
from layertap_server.model_facts import TokenizerOptions

# The names of the pooling modes, and the flags of older files, in the
# order in which their vectors are concatenated.
POOLINGS = {
    "mean": Pooling.MEAN,
    "cls": Pooling.CLS,
    "max": Pooling.MAX,
    "lasttoken": Pooling.LAST_TOKEN,
    "mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN,
    "weightedmean": Pooling.WEIGHTED_MEAN,
}
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Files that may hold the Transformer module's configuration; the first one that is not empty is used.
TRANSFORMER_FILES = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Older names of settings, and their current names.
RENAMED = {
    "model_args": "model_kwargs",
    "tokenizer_args": "processor_kwargs",
    "config_args": "config_kwargs",
}
# Arguments about where and how files are fetched: ignored when they come from a configuration.
HUB_ARGUMENTS = {
    "subfolder",
    "token",
    "cache_dir",
    "revision",
    "code_revision",
    "local_files_only",
    "trust_remote_code",
}
# Arguments of the model that change its results by no more than rounding.
HARMLESS_MODEL_ARGUMENTS = {
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "low_cpu_mem_usage",
    "use_safetensors",
    "add_pooling_layer",
    "device_map",
}
# Settings of text processing that this server follows, or that make no difference here.
PROCESSING_SETTINGS = {"max_length", "padding", "truncation", "return_tensors"}
# Names of the prompts that every sentence-transformers model has; empty unless configured.
EMPTY_PROMPTS = ("query", "document")
TOKENS, VECTOR = "token_embeddings", "sentence_embedding"
# The kinds of models, in config_sentence_transformers.json: one vector for a text, and one for each token, as
# sentence-transformers and PyLate call them.
ONE_VECTOR, MULTI_VECTOR, PYLATE = MODEL_TYPES = ("SentenceTransformer", "MultiVectorEncoder", "ColBERT")
# Modules of other packages that are the same as one of sentence-transformers.
ALIASES = {"pylate.models.Dense.Dense": "sentence_transformers.base.modules.dense.Dense"}


class UnsupportedError(Exception):
    """The configured embedding cannot be computed; the message says why."""


@dataclass(frozen=True, slots=True)
class ModuleConfig:
    """A sentence-transformers module that transforms vectors: `Dense`, `LayerNorm` or `Normalize`."""

    kind: str
    # The module's folder in the checkpoint.
    path: str
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EmbeddingConfig:
    """The configured embedding of a model.

    The defaults are those of a checkpoint without any of these files: the mean over all tokens, including
    those of the prompt, not normalized.
    """

    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    # Arguments that override the model's configuration.
    config_arguments: Mapping[str, Any] = field(default_factory=dict)
    # Applied to the last hidden state before pooling.
    token_modules: tuple[ModuleConfig, ...] = ()
    poolings: tuple[Pooling, ...] = (Pooling.MEAN,)
    pool_prompt: bool = True
    # Applied to the pooled vectors; final `Normalize` modules are expressed by `normalize` instead.
    vector_modules: tuple[ModuleConfig, ...] = ()
    normalize: bool = False
    # Number of leading dimensions that the finished vector keeps; 0: all.
    dimensions: int = 0
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str = ""
    # Of a multi-vector model: what its library does in addition, and the server does not.
    left_to_caller: tuple[str, ...] = ()
    unsupported: str = ""

    def with_token_vectors(
        self, modules: tuple[ModuleConfig, ...], normalize: bool, left_to_caller: tuple[str, ...]
    ) -> EmbeddingConfig:
        """The same with a vector for each token, to which the modules are applied."""
        return replace(
            self,
            poolings=(Pooling.NONE,),
            vector_modules=modules,
            normalize=normalize,
            left_to_caller=left_to_caller,
        )

    @property
    def subfolder(self) -> str:
        """The folder of the checkpoint that holds the model; empty for the root."""
        return self.tokenizer.subfolder


# Name of a value → whether it has one vector for each token, and the modules that have been applied to it.
Values = dict[str, tuple[bool, tuple[ModuleConfig, ...]]]


def find_file(source: str, filename: str) -> str | None:
    """The path of a file of the checkpoint; None if it has no such file. None too if there is no checkpoint:
    the code that reads the model's own files reports that."""
    try:
        path: str | None = cached_file(
            source,
            filename,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return path


def read_json(source: str, filename: str) -> Any:
    """The content of a JSON file of the checkpoint; None if there is no such file.

    Raises `UnsupportedError` if the file cannot be read.
    """
    path = find_file(source, filename)
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"its {filename} cannot be read: {error}") from None


def read_settings(source: str, filename: str) -> dict[str, Any]:
    """Like `read_json` for a file that must hold a JSON object; empty if there is no such file."""
    content = read_json(source, filename)
    if content is not None and not isinstance(content, dict):
        raise UnsupportedError(f"its {filename} is not a JSON object")
    return content or {}


def read_embedding_config(source: str) -> EmbeddingConfig:
    """Reads the configuration of `source`, a hub name or a folder. Does not raise `UnsupportedError`: its
    message is in the result's `unsupported`."""
    from layertap_server.engine.loading import multi_vector  # it reads its files by this module's functions

    found = EmbeddingConfig()
    try:
        modules = read_json(source, "modules.json")
        if modules is None:
            return without_modules(source, found)
        first = modules_of(modules)[0]
        found = replace(found, tokenizer=TokenizerOptions(path_of(first)))
        # The prompts and the settings of the tokenizer and the model are read before the checks: they are
        # used even if the embedding turns out to be unsupported.
        settings = read_settings(source, "config_sentence_transformers.json")
        is_multi_vector = multi_vector.is_multi_vector(settings)
        if is_multi_vector:
            found = replace(found, prompts=multi_vector.prompts_of(settings))
        else:
            found = with_prompts(found, settings)
        found, transformer = with_transformer(source, found)
        if is_multi_vector:
            found = multi_vector.with_documents(found, settings, transformer)
        check_first(first, settings, transformer)
        check_adapter(source, found.subfolder)
        if is_multi_vector:
            rest = modules_of(modules)[1:]
            found = multi_vector.with_token_modules(source, rest, found, settings, transformer)
            return with_default_settings(found, {**settings, "truncate_dim": None})
        return with_default_settings(with_modules(source, modules_of(modules)[1:], found), settings)
    except UnsupportedError as error:
        return replace(found, unsupported=str(error))


def without_modules(source: str, found: EmbeddingConfig) -> EmbeddingConfig:
    """The embedding of a model that was not saved by sentence-transformers:
    the mean, or the last token of a causal language model."""
    found = with_prompts(found, read_settings(source, "config_sentence_transformers.json"))
    config = read_settings(source, "config.json")
    [architecture, *_] = config.get("architectures") or [""]
    if architecture == "HF_ColBERT":
        raise UnsupportedError(
            "it was saved by stanford-nlp's ColBERT, whose projection is not read; save it with "
            "sentence-transformers' MultiVectorEncoder"
        )
    if str(architecture).endswith("ForCausalLM") and config.get("is_causal", True):
        found = replace(found, poolings=(Pooling.LAST_TOKEN,))
    check_adapter(source, "")
    template = read_settings(source, "tokenizer_config.json").get("chat_template")
    if template or find_file(source, "chat_template.jinja") is not None:
        raise UnsupportedError("its tokenizer has a chat template, which would be put around each text")
    return found


def modules_of(modules: Any) -> list[dict[str, Any]]:
    is_list = isinstance(modules, list) and modules
    if not is_list or not all(isinstance(one, dict) and isinstance(one.get("type"), str) for one in modules):
        raise UnsupportedError("its modules.json is not a list of modules")
    return list(modules)


def path_of(module: Mapping[str, Any]) -> str:
    """The module's folder. Raises `UnsupportedError` if it lies outside of the checkpoint."""
    path = module.get("path", "")
    if not isinstance(path, str) or PureWindowsPath(path).anchor or ".." in PureWindowsPath(path).parts:
        raise UnsupportedError(f"its modules.json names a folder outside of it: {path!r}")
    return path


def file_in(path: str, filename: str) -> str:
    return f"{path}/{filename}" if path else filename


def kind_of(module: Mapping[str, Any], also: tuple[str, ...] = ()) -> str:
    """The class name of a module: one that this server knows, or one of `also`. Raises `UnsupportedError` for
    any other."""
    name: str = ALIASES.get(module["type"], module["type"])
    package, _, kind = name.rpartition(".")
    known = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout", *also)
    if not f"{package}.".startswith("sentence_transformers.") or kind not in known:
        raise UnsupportedError(f"its module '{name}' ({path_of(module) or module.get('name')}) is unknown")
    return kind


# ------------------------------------------------------------------------- the model, its prompts


def with_prompts(found: EmbeddingConfig, settings: Mapping[str, Any]) -> EmbeddingConfig:
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict):
        raise UnsupportedError("its prompts are not a JSON object")
    return replace(found, prompts={str(name): str(prompt or "") for name, prompt in prompts.items()})


def with_transformer(source: str, found: EmbeddingConfig) -> tuple[EmbeddingConfig, dict[str, Any]]:
    """Adds the tokenizer's and the model's settings from the Transformer module's file. Also returns all
    settings of that file, with the text processing settings as "processing"."""
    settings: dict[str, Any] = {}
    for filename in TRANSFORMER_FILES:
        if settings := read_settings(source, file_in(found.subfolder, filename)):
            break
    settings = {RENAMED.get(key, key): value for key, value in settings.items()}
    arguments = own_arguments(settings, "processor_kwargs")
    if settings.get("max_seq_length") is not None:
        arguments.setdefault("model_max_length", settings["max_seq_length"])
    processing = settings.get("processing_kwargs") or {}
    of_text = {**(processing.get("common") or {}), **(processing.get("text") or {})}
    if "max_length" in of_text:
        arguments["model_max_length"] = of_text["max_length"]
    limit = arguments.get("model_max_length", 1)
    if not isinstance(limit, int) or limit < 1:
        del arguments["model_max_length"]
        raise UnsupportedError(f"its token limit is not a positive number: {limit!r}")
    options = TokenizerOptions(found.subfolder, arguments, bool(settings.get("do_lower_case", False)))
    found = replace(found, tokenizer=options, config_arguments=own_arguments(settings, "config_kwargs"))
    return found, settings | {"processing": of_text}


def own_arguments(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in (settings.get(key) or {}).items() if name not in HUB_ARGUMENTS}


def check_first(
    first: Mapping[str, Any], settings: Mapping[str, Any], transformer: Mapping[str, Any]
) -> None:
    """Refuses a model whose first module does not return the last hidden state."""
    model_type = settings.get("model_type", ONE_VECTOR)
    if model_type not in MODEL_TYPES:
        raise UnsupportedError(f"it is configured as a {model_type}, not as a SentenceTransformer")
    if kind_of(first) != "Transformer":
        raise UnsupportedError(f"its first module '{first['type']}' is not a Transformer")
    check_transformer(transformer, "feature-extraction", "feature-extraction", "last_hidden_state")


def check_transformer(transformer: Mapping[str, Any], task: str, default_task: str, output: str) -> None:
    """Refuses a Transformer module that is not configured for `task`, or does not return that `output` of the
    model for each token."""
    configured = transformer.get("transformer_task", default_task)
    if configured != task:
        raise UnsupportedError(f"its Transformer module is configured for '{configured}'")
    modalities = transformer.get("modality_config")
    if modalities is not None:
        of_text = modalities.get("text") or {}
        gives = of_text.get("method_output_name")
        name = gives[0] if isinstance(gives, list) and len(gives) == 1 else gives
        is_plain = of_text.get("method") == "forward" and name == output
        if not is_plain or "message" in modalities or transformer.get("module_output_name") != TOKENS:
            raise UnsupportedError(f"its Transformer module does not return the {output.replace('_', ' ')}")
    for what, unknown in (
        ("processing_kwargs", set(transformer["processing"]) - PROCESSING_SETTINGS),
        ("model_kwargs", set(own_arguments(transformer, "model_kwargs")) - HARMLESS_MODEL_ARGUMENTS),
        ("setting", {"tokenizer_name_or_path"} & {key for key, value in transformer.items() if value}),
    ):
        if unknown:
            raise UnsupportedError(f"its Transformer module has an unknown {what}: {min(unknown)}")


def check_adapter(source: str, subfolder: str) -> None:
    if find_file(source, file_in(subfolder, "adapter_config.json")) is not None:
        raise UnsupportedError("it has an adapter (PEFT), which is not loaded")


# -------------------------------------------------------------- the modules after the Transformer


def with_modules(source: str, modules: list[dict[str, Any]], found: EmbeddingConfig) -> EmbeddingConfig:
    """Follows the modules in order, from the value that each one reads to the value that it writes."""
    values: Values = {TOKENS: (True, ())}
    has_pooling = False
    for module in modules:
        kind, path = kind_of(module), path_of(module)
        config = read_settings(source, file_in(path, "config.json"))
        if kind == "Transformer" or (kind == "Pooling" and has_pooling):
            raise UnsupportedError(f"it has a second {kind} module: {path}")
        if kind == "Pooling":
            has_pooling = True
            is_of_tokens, token_modules = values[TOKENS]
            if not is_of_tokens:
                raise UnsupportedError(
                    f"its Pooling module does not follow a module with token outputs: {path}"
                )
            values[VECTOR] = (False, ())
            found = replace(
                found,
                token_modules=token_modules,
                poolings=poolings_of(config, path),
                pool_prompt=bool(config.get("include_prompt", True)),
            )
        elif kind != "Dropout":  # Dropout is active only in training
            follow(ModuleConfig(kind, path, config), values)
    if not has_pooling:
        raise UnsupportedError("it has no Pooling module")
    is_of_tokens, vector_modules = values[VECTOR]
    if is_of_tokens:
        raise UnsupportedError("its modules return a vector for each token")
    vector_modules, normalize = without_final_norms(vector_modules)
    return replace(found, vector_modules=vector_modules, normalize=normalize)


def without_final_norms(modules: tuple[ModuleConfig, ...]) -> tuple[tuple[ModuleConfig, ...], bool]:
    """The modules without the `Normalize` modules at their end, and whether there are such."""
    kept = modules
    while kept and kept[-1].kind == "Normalize":
        kept = kept[:-1]
    return kept, len(kept) < len(modules)


def follow(module: ModuleConfig, values: Values) -> None:
    is_named = module.kind != "LayerNorm"
    read = (module.config.get("module_input_name") if is_named else None) or VECTOR
    written = (module.config.get("module_output_name") if is_named else None) or read
    if read in values:
        is_of_tokens, before = values[read]
        values[written] = (is_of_tokens, (*before, module))
    elif module.kind != "Normalize":  # Normalize does nothing if its input does not exist
        raise UnsupportedError(
            f"its {module.kind} module {module.path} reads '{read}', which no earlier module returns"
        )


def poolings_of(config: Mapping[str, Any], path: str) -> tuple[Pooling, ...]:
    if not config:
        raise UnsupportedError(f"its Pooling module has no {path}/config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if not modes or (unknown := [mode for mode in modes if mode not in POOLINGS]):
        raise UnsupportedError(
            f"the mode of its Pooling module is unknown: {unknown[0] if modes else 'none'}"
        )
    return tuple(POOLINGS[mode] for mode in modes)


def with_default_settings(found: EmbeddingConfig, settings: Mapping[str, Any]) -> EmbeddingConfig:
    """Adds the default prompt and the configured number of dimensions."""
    name, dimensions = settings.get("default_prompt_name"), settings.get("truncate_dim")
    if dimensions is not None:
        if not isinstance(dimensions, int) or dimensions < 1:
            raise UnsupportedError(f"its truncate_dim is not a positive number: {dimensions!r}")
        found = replace(found, dimensions=dimensions)
    if name is not None:
        prompts = {**dict.fromkeys(EMPTY_PROMPTS, ""), **found.prompts}
        if name not in prompts:
            raise UnsupportedError(f"its default prompt is not one of its prompts: {name!r}")
        found = replace(found, prompts=prompts, default_prompt_name=name)
    return found

"""From a checkpoint to a model that is ready to run, and the facts about it.

The configuration is not trusted: layers, heads and limits are found by running the
model, a checkpoint that lacks weights is refused, and a model is served only after it
has reproduced the results of its own eager float32 code. The ways to run it (ways.py)
are tried from the fastest to the plainest, and each is checked by `verification`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from layertap_server.engine import attention
from layertap_server.engine.hooks import LayerHooks
from layertap_server.engine.loading.checkpoint import (
    ModelLoadError,
    check_finite,
    check_room,
    one_line,
    read_config,
    read_weights,
)
from layertap_server.engine.loading.contacts import contact_head_of, with_contacts, with_own_contacts
from layertap_server.engine.loading.families import FAMILIES, Family, depends_on_longest, sparse_blocks
from layertap_server.engine.loading.heads import NoHeadError, ReadHead, head_facts, named_head, read_head
from layertap_server.engine.loading.heads import make_invariant as head_in_one_order
from layertap_server.engine.loading.probing import (
    INVARIANT_LENGTHS,
    is_batch_invariant,
    layer_modules,
    measure_memory,
    num_token_types,
    token_limit,
)
from layertap_server.engine.loading.reference import (
    Reference,
    UnfitModelError,
    embedding_rows,
    references,
    relative_error,
    text_config,
)
from layertap_server.engine.loading.sentence_transformers import (
    EmbeddingConfig,
    UnsupportedError,
    read_embedding_config,
)
from layertap_server.engine.loading.sparse_config import SparseConfig, read_sparse_config
from layertap_server.engine.loading.verification import verify, verify_head
from layertap_server.engine.loading.ways import MAY_DIFFER, PADDED, watched_or_none, ways
from layertap_server.engine.memory import MemoryCost, keep_freed_memory
from layertap_server.engine.model import LoadedModel
from layertap_server.engine.packed import run_packed
from layertap_server.engine.padded import run_padded
from layertap_server.engine.projection import Projection, load_projection
from layertap_server.engine.taps import TORCH_DTYPES
from layertap_server.enums import DType
from layertap_server.model_facts import ModelFacts

logger = logging.getLogger(__name__)

# One model is loaded at a time: the attention implementations and the
# log level of transformers are process-wide.
_loading = threading.Lock()

# Two tensors whose relative difference is at most this are considered the same.
SAME = 1e-6
# Functions of `torch.cpu` that tell whether the processor has instructions for products in bfloat16.
BFLOAT16_PROCESSORS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def load_model(
    name: str,
    source: str,
    *,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    max_input_tokens: int,
    batch_invariant: bool = False,
) -> LoadedModel:
    """Loads `source` (a hub name or a local folder) to be served as `name`.

    Raises `ModelLoadError`, whose message is one line, if the model cannot be served correctly.
    """
    with _loading:
        attention.register()
        keep_freed_memory()
        torch_device = choose_device(device)
        torch_dtype, reason = choose_dtype(dtype, torch_device)
        logger.info(
            "%s: computes in %s on %s%s", name, str(torch_dtype).removeprefix("torch."), torch_device, reason
        )
        embedding, config = read_configurations(source, trust_remote_code)
        loading = Loading(name, source, config, embedding, torch_device, trust_remote_code)
        check_room(source, loading.config, torch_device, trust_remote_code)
        try:
            # Before the model, so that the weights are in memory only once at a time.
            head, no_head = loading.read_head()
            ready = loading.ready(torch_dtype, max_input_tokens, may_widen=dtype == "auto")
            ready = loading.with_head(ready, head, no_head)
            if batch_invariant:
                ready = make_invariant(ready)
            memory = measure_memory(ready, run_packed if ready.facts.packed else run_padded)
            memory = replace(
                memory,
                projected_row_bytes=projected_row_bytes(ready),
                head_row_bytes=4 * max(ready.facts.num_labels, ready.facts.hidden_size),
            )
            return replace(ready, memory=memory)
        except UnfitModelError as error:
            raise ModelLoadError(f"cannot serve the model '{source}': {error}") from error
        except ModelLoadError:
            raise
        except Exception as error:  # the model's own code may come from anyone and raise anything
            logger.debug("cannot serve the model '%s'", source, exc_info=error)
            raise ModelLoadError(f"cannot serve the model '{source}': {one_line(error)}") from error


def read_configurations(source: str, trust_remote_code: bool) -> tuple[EmbeddingConfig, Any]:
    """The configuration of the embedding, in sentence-transformers'
    format, and the configuration of the model.

    Raises `ModelLoadError` if the configuration or the files already show that the model cannot be served.
    """
    embedding = read_embedding_config(source)
    return embedding, read_config(source, trust_remote_code, embedding.subfolder, embedding.config_arguments)


@dataclass(slots=True)
class Loading:
    """The loading of one checkpoint."""

    name: str
    source: str
    config: Any
    embedding: EmbeddingConfig
    device: torch.device
    trust_remote_code: bool
    # None for a model that must run padded.
    family: Family | None = field(init=False)
    sparse: SparseConfig = field(init=False, default=SparseConfig())

    def __post_init__(self) -> None:
        self.family = None if depends_on_longest(self.config) else FAMILIES.get(self.config.model_type)

    def ready(self, dtype: torch.dtype, max_input_tokens: int, *, may_widen: bool) -> LoadedModel:
        """The model prepared for the fastest way to run that reproduces its reference results.

        If no way does so in `dtype` and `may_widen` is true, the model is loaded again in float32.
        """
        model, missing = self.read()
        check_finite(self.source, model)
        plain, expected = self.examine(model, missing, max_input_tokens)
        models = self.models(model)
        del model
        for way, loaded in ways(plain, self.family, models, dtype):
            difference = verify(loaded, expected)
            if difference is None:
                logger.info("%s: runs %s", self.name, way)
                return with_contacts(loaded, expected)
            level = logging.INFO if way in MAY_DIFFER else logging.WARNING
            logger.log(level, "%s: cannot run %s: %s", self.name, way, difference)
            if difference.is_overflow:
                break
        if dtype is torch.float32:
            raise UnfitModelError(str(difference))
        short = str(dtype).removeprefix("torch.")
        if not may_widen:
            raise UnfitModelError(f"in {short}, {difference}; use --dtype float32")
        logger.warning("%s: computes in float32, because in %s, %s", self.name, short, difference)
        del loaded, models, plain
        return self.ready(torch.float32, max_input_tokens, may_widen=False)

    def read(self) -> tuple[Any, set[str]]:
        """The model with its weights, in host memory, and the names
        of the weights that the checkpoint lacks."""
        model, missing = read_weights(
            self.source,
            self.config,
            attention.NAME if self.family is not None else "eager",
            self.trust_remote_code,
            self.embedding.subfolder,
        )
        return model.eval().requires_grad_(False), missing

    def models(self, first: Any) -> Iterator[Any]:
        """Yields `first`, and then a model that is read from the checkpoint again for each further item:
        preparing a model changes it irreversibly."""
        yield first
        del first
        while True:
            yield self.read()[0].to(self.device)

    # ------------------------------------------------------------------------------------ its head

    def read_head(self) -> tuple[ReadHead | None, str]:
        """The checkpoint's head, in host memory; or None, and the reason if it has one that cannot be served.
        A model that gives sparse vectors has a masked-language head whatever its class is named."""
        self.sparse = read_sparse_config(self.source, self.embedding)
        task = "ForMaskedLM" if self.sparse.pooling is not None else named_head(self.config)
        if not task:
            return None, ""
        try:
            subfolder = self.embedding.subfolder
            return read_head(self.source, self.config, task, self.trust_remote_code, subfolder), ""
        except Exception as error:  # the model's own code may raise anything
            logger.debug("reading the head of '%s' failed", self.source, exc_info=error)
            return None, reason_of(error)

    def with_head(self, loaded: LoadedModel, read: ReadHead | None, no_head: str) -> LoadedModel:
        """Adds the head, if the model gives the checkpoint's own scores with it, or the reason why not; and
        what depends on it."""
        if read is not None:
            try:
                head = read.with_table(loaded.model, self.device)
                scoring = replace(loaded, head=head, facts=head_facts(loaded.facts, head, self.config))
                difference = verify_head(scoring, read.texts)
                if difference is None:
                    loaded = scoring
                no_head = "" if difference is None else str(difference)
            except Exception as error:  # the device may raise anything
                no_head = reason_of(error)
        if no_head:
            logger.warning("%s: its head is not served: %s", self.name, no_head)
        sparse, unsupported = self.sparse, self.sparse.unsupported
        if sparse.pooling is not None and loaded.head is None:
            unsupported = f"its masked-language head is not served: {no_head}"
        elif unsupported:
            logger.warning("%s: its sparse vectors are not supported: %s", self.name, unsupported)
        facts = replace(
            loaded.facts,
            head_unsupported=no_head,
            has_sparse=sparse.pooling is not None and loaded.head is not None,
            sparse_unsupported=unsupported,
            max_sparse_entries=sparse.max_entries,
        )
        return replace(loaded, facts=facts, sparse=sparse.pooling if facts.has_sparse else None)

    # ------------------------------------------------------------------------------- what it is

    def examine(
        self, model: Any, missing: set[str], max_input_tokens: int
    ) -> tuple[LoadedModel, list[Reference]]:
        """The facts about the model, as a `LoadedModel` that has no model yet, and the reference results.

        Moves the model to the device. The token limit is found before that, on the CPU: on a CUDA device an
        index outside of a table makes the device unusable for the rest of the process.
        """
        if not layer_modules(model):  # the checkpoint's own code, under the name of a known family
            self.family = None
        family = self.family
        begin_anew = sparse_blocks(model)
        num_rows = embedding_rows(model)
        first = first_layer(model, family)
        max_tokens = token_limit(model, first, max_input_tokens)
        num_types = num_token_types(model)
        model.to(self.device)
        expected = references(
            self.source,
            model,
            self.device,
            max_tokens=max_tokens,
            num_types=num_types,
            begin_anew=begin_anew,
            first_layer=None if family is None else first,
        )
        short = expected[0]
        assert short.last_hidden_state is not None
        num_layers, hidden_size = len(short.hidden_states) - 1, short.last_hidden_state.shape[-1]
        pooled = short.pooler_output
        has_pooler = pooled is not None and not any(key.startswith("pooler") for key in missing)
        if has_pooler and pooled is not None and len(pooled) != hidden_size:
            logger.info(
                "%s: its pooler output is not served: it has %d dimensions, not %d",
                self.name,
                len(pooled),
                hidden_size,
            )
            has_pooler = False
        config, embedding = model.config, self.embedding
        facts = ModelFacts(
            name=self.name,
            architecture=config.model_type,
            revision=getattr(config, "_commit_hash", None) or "",
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=int(short.maps.shape[1]) if short.maps is not None else num_heads(config),
            vocab_size=num_rows,
            type_vocab_size=num_types,
            max_tokens=max_tokens,
            has_pooler=has_pooler,
            has_attentions=short.maps is not None,
            default_pooling=embedding.poolings[0] if len(embedding.poolings) == 1 else embedding.poolings,
            default_normalize=embedding.normalize,
            pool_prompt=embedding.pool_prompt,
            prompts=embedding.prompts,
            compute_dtype=DType.FLOAT32,
            device=str(self.device),
            packed=False,
            attention=PADDED,
            is_last_apart=relative_error(short.last_hidden_state, short.hidden_states[-1]) > SAME,
            default_prompt_name=embedding.default_prompt_name,
            tokenizer=embedding.tokenizer,
        )
        contact_head = None
        if facts.has_attentions:
            shape = (facts.num_layers, facts.num_attention_heads)
            contact_head = contact_head_of(model, missing, *shape, self.device)
        if contact_head is not None:
            expected = with_own_contacts(model, self.device, expected)
        plain = LoadedModel(
            model=None,
            layers=(),
            hooks=LayerHooks(),
            watched=None,
            one_text_per_pass=begin_anew is not None or depends_on_longest(config),
            pooler=None,
            family=family or Family(),
            facts=facts,
            device=self.device,
            pad_token_id=getattr(config, "pad_token_id", None) or 0,
            memory=MemoryCost(0, 0, 0),  # measured when the model is ready
            contact_head=contact_head,
        )
        return with_embedding(plain, self.source, embedding, self.trust_remote_code), expected


def reason_of(error: Exception) -> str:
    """Why a head is not served."""
    return str(error) if isinstance(error, NoHeadError) else one_line(error)


def with_embedding(
    loaded: LoadedModel, source: str, embedding: EmbeddingConfig, trust_remote_code: bool
) -> LoadedModel:
    """Adds the modules of the configured embedding, or the reason why it is not supported."""
    facts, unsupported = loaded.facts, embedding.unsupported
    projection: Projection | None = None
    if not unsupported:
        try:
            projection = load_projection(
                source, embedding, facts.hidden_size, loaded.device, trust_remote_code
            )
        except UnsupportedError as error:
            unsupported = str(error)
    if unsupported:
        logger.warning("%s: its configured embedding is not supported: %s", facts.name, unsupported)
        return replace(loaded, facts=replace(facts, embedding_unsupported=unsupported))
    if embedding.left_to_caller:
        logger.info(
            "%s: its configured embedding is a vector for each token; left to the caller: %s",
            facts.name,
            "; ".join(embedding.left_to_caller),
        )
    size = projection.size if projection else facts.hidden_size * len(embedding.poolings)
    facts = replace(
        facts,
        projected_size=projection.size if projection and projection.vector_modules else 0,
        projected_token_size=projection.token_size if projection and projection.token_modules else 0,
        default_dimensions=embedding.dimensions if embedding.dimensions < size else 0,
    )
    return replace(loaded, facts=facts, projection=projection)


def projected_row_bytes(loaded: LoadedModel) -> int:
    """Bytes that the configured embedding needs for each token in addition to its hidden state: the float32
    output of the modules before the pooling."""
    projection = loaded.projection
    return 4 * projection.token_size if projection and projection.token_modules else 0


def first_layer(model: Any, family: Family | None) -> nn.Module | None:
    """The module that receives the embeddings; None if it is not found. The model must be on the CPU."""
    if family is not None:
        return layer_modules(model)[0]
    watched = watched_or_none(model, torch.device("cpu"))
    return None if watched is None else watched.receivers[0]


def num_heads(config: Any) -> int:
    """The configured number of attention heads, for a model that
    gives no attention maps; 0 if not configured."""
    named = getattr(text_config(config), "num_attention_heads", None)
    return named if isinstance(named, int) else 0


def make_invariant(loaded: LoadedModel) -> LoadedModel:
    """Makes each text's results independent of its batch, to the bit: texts share a pass only if trials show
    that their results stay the same; else each text runs in a batch of one."""
    facts = loaded.facts
    if loaded.pooler is not None:
        loaded = replace(loaded, pooler=partial(pool_one_by_one, loaded.pooler))
    if loaded.projection is not None:
        loaded = replace(loaded, projection=replace(loaded.projection, by_row=True))
    may_share = facts.packed and loaded.device.type == "cpu" and not loaded.one_text_per_pass
    may_share = may_share and (loaded.projection is None or loaded.projection.sums_in_one_order)
    if loaded.head is not None:
        head, may_share_too = head_in_one_order(loaded.head, facts.hidden_size, INVARIANT_LENGTHS)
        loaded, may_share = replace(loaded, head=head), may_share and may_share_too
    if may_share and is_batch_invariant(loaded, run_packed):
        logger.info(
            "%s: in all batches that were tried, a text's results do not depend on its batch, to the bit",
            facts.name,
        )
        return loaded
    logger.info(
        "%s: results of shared forward passes depend on the batch; each text runs in a pass of its own",
        facts.name,
    )
    return replace(loaded, one_text_per_pass=True)


def pool_one_by_one(pooler: Callable[[torch.Tensor], torch.Tensor], first_rows: torch.Tensor) -> torch.Tensor:
    """The pooler's outputs, (texts, H), of the texts' first rows, (texts, 1, H), each computed by itself."""
    return torch.cat([pooler(row) for row in first_rows.split(1)])


def choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelLoadError(f"--device {device}: torch finds no CUDA device; use --device cpu")
    if device.startswith("cuda") and find_spec("triton") is None:
        raise ModelLoadError(f"--device {device} needs Triton: pip install triton, or use --device cpu")
    return torch.device("cuda:0" if device == "cuda" else device)


def choose_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type to compute in and, for `dtype` "auto", the reason as text for the log."""
    if dtype != "auto":
        return TORCH_DTYPES[DType[dtype.upper()]], ""
    if device.type != "cpu":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, " (--dtype auto: 16 bits on CUDA, and this device has bfloat16)"
        return torch.float16, " (--dtype auto: 16 bits on CUDA, and this device has no bfloat16)"
    reason = " (--dtype auto: on a CPU, results equal those of transformers in float32"
    if any(getattr(torch.cpu, name, bool)() for name in BFLOAT16_PROCESSORS):
        reason += "; this CPU also supports bfloat16: --dtype bfloat16 is faster and less exact"
    return torch.float32, reason + ")"

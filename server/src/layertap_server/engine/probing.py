"""What a model is, found by running it: its layers and heads, and whether our passes give what its own does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from layertap_server.engine.families import Family
from layertap_server.engine.memory import SMALL_SHARE, HeldBytes, MemoryCost, free_bytes
from layertap_server.engine.model import LoadedModel, Pass, Watched
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import Taps
from layertap_server.engine.threads import use_one_thread
from layertap_server.plan import AttentionPlan, DType, Int64Array, OutputPlan, Work

# Largest relative Frobenius error, in float32, between a pass of ours and the model's own.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
# Of the longer text that memory is measured with. Padded, attention is what takes most only in long texts.
PACKED_TOKENS, PADDED_TOKENS = 128, 512

# Texts, and how many texts of 1 and of 29 tokens they are tried with: passes of 270 to 1,800 rows.
INVARIANT_LENGTHS = (1, 3, 7, 12, 18, 33, 64, 130)
INVARIANT_COMPANY = ((0, 0), (1, 0), (5, 1), (2, 5), (11, 13), (3, 30), (1, 52))

Probes = list[tuple[Int64Array, torch.Tensor]]


class UnfitModelError(Exception):
    """The model does not give what an encoder gives."""


def probe_ids(num_tokens: int, vocab_size: int, offset: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Ordinary ids, away from the special tokens at the vocabulary's start where it is large enough."""
    return (np.arange(num_tokens, dtype=np.int64) * 37 + offset) % max(vocab_size - 5, 1) + min(
        4, vocab_size - 1
    )


@torch.inference_mode()
def probe(model: Any, device: torch.device) -> tuple[int, int, int]:
    """(layers, heads, hidden size), counted on the model's own outputs; 0 heads: it gives no maps."""
    ids = torch.from_numpy(probe_ids(6, model.get_input_embeddings().num_embeddings, 1))[None].to(device)
    with eager_attention(model):
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            output_hidden_states=True,
            output_attentions=True,
        )
    hidden_states = output.hidden_states
    if not hidden_states or hidden_states[0].shape != hidden_states[-1].shape:
        raise UnfitModelError(f"'{model.config.model_type}' does not give one hidden state a layer and token")
    num_layers = len(hidden_states) - 1
    attentions: Sequence[Any] = output.attentions or ()
    uniform = len(attentions) == num_layers and all(
        weights is not None and weights.ndim == 4 and weights.shape[-2:] == (6, 6) for weights in attentions
    )
    return num_layers, int(attentions[0].shape[1]) if uniform else 0, int(hidden_states[-1].shape[-1])


@torch.inference_mode()
def own_hidden_states(model: Any, device: torch.device, max_tokens: int) -> Probes:
    """A few texts, and all hidden states (L+1, T, H) that the model's eager attention gives each alone."""
    vocab_size = model.get_input_embeddings().num_embeddings
    probes = []
    with eager_attention(model):
        for length in (3, 7, 5):
            ids = probe_ids(min(length, max_tokens), vocab_size, length)
            output = model(input_ids=torch.from_numpy(ids)[None].to(device), output_hidden_states=True)
            probes.append((ids, torch.cat(output.hidden_states)))
    return probes


@torch.inference_mode()
def watch(model: Any, device: torch.device, num_layers: int, *, has_maps: bool) -> Watched | None:
    """Finds the layers of a model by watching one pass: who receives the very tensors that it calls its
    hidden states, and who gives its attention maps. None where they are handed on in other forms."""
    received: list[tuple[nn.Module, Any]] = []
    given: list[tuple[nn.Module, Any]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append((module, args[0] if args else kwargs.get("hidden_states")))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given.append((module, output))

    ids = torch.from_numpy(probe_ids(6, model.get_input_embeddings().num_embeddings, 1))[None].to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in model.modules()]
    handles += [module.register_forward_hook(after) for module in model.modules()]
    try:
        output = model(**inputs, output_hidden_states=True, output_attentions=has_maps)
        receivers = [
            [module for module, tensor in received if tensor is hidden]
            for hidden in output.hidden_states[:num_layers]
        ]
        # The outermost of one class that receives each of them: not an encoder that receives the first alone.
        classes = set.intersection(*({type(module) for module in modules} for modules in receivers))
        layer_class = next((type(module) for module in receivers[-1] if type(module) in classes), None)
        if layer_class is None:
            return None
        layers = unique(module for modules in receivers for module in modules if type(module) is layer_class)
        if not has_maps:
            return Watched(layers, (), 0, gives_maps_if_told=False)

        # The innermost, which is the first to be done: those around it only pass the maps on.
        places = [place_of(maps, given) for maps in output.attentions]
        found = [place for place in places if place is not None]
        if len(found) < len(places) or len({(type(module), number) for module, number in found}) != 1:
            return None
        givers, number = unique(module for module, _ in found), found[0][1]
        given.clear()
        model(**inputs, output_attentions=False)
        unasked = [result for module, result in given if module in givers]
        gives_unasked = all(
            isinstance(result, tuple) and len(result) > number and getattr(result[number], "ndim", 0) == 4
            for result in unasked
        )
        return Watched(layers, givers, number, gives_maps_if_told=not gives_unasked)
    finally:
        for handle in handles:
            handle.remove()


def unique(modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    return tuple(dict.fromkeys(modules))


def place_of(tensor: torch.Tensor, given: list[tuple[nn.Module, Any]]) -> tuple[nn.Module, int] | None:
    """The first module that gave this very tensor in a tuple, and its place there."""
    for module, output in given:
        if isinstance(output, tuple):
            for number, one in enumerate(output):
                if one is tensor:
                    return module, number
    return None


@torch.inference_mode()
def agrees(
    loaded: LoadedModel, run: Pass, probes: Probes, tolerance: float = AGREEMENT[torch.float32]
) -> bool:
    """Whether the texts in one pass give what the model itself gave each alone."""
    plan = OutputPlan(DType.FLOAT32, hidden_states=tuple(range(loaded.facts.num_layers + 1)))
    works = [Work(ids, None, plan, plan.specs(len(ids), loaded.facts.hidden_size)) for ids, _ in probes]
    packing = Packing.of(works)
    taps = Taps(packing, loaded.facts.num_layers, loaded.device)
    run(loaded, packing, taps)
    for (together,), position in zip(taps.buffers, packing.order, strict=True):
        alone = probes[position][1]
        if together is None or not (together - alone).norm() <= tolerance * alone.norm():
            return False
    return True


@torch.inference_mode()
def measure_memory(loaded: LoadedModel, run: Pass) -> MemoryCost:
    """What passes over a short and a longer text hold at most, as a cost for each row and each pair of tokens."""
    facts = loaded.facts
    vocab_size = loaded.model.get_input_embeddings().num_embeddings
    longer = min(PACKED_TOKENS if facts.packed else PADDED_TOKENS, facts.max_tokens)
    lengths, peaks = (max(longer // 4, 1), longer), []
    plan = OutputPlan(DType.FLOAT32, hidden_states=(facts.num_layers,))
    for length in lengths:
        packing = Packing.of(
            [Work(probe_ids(length, vocab_size, 1), None, plan, plan.specs(length, facts.hidden_size))]
        )
        taps = Taps(packing, facts.num_layers, loaded.device)
        with HeldBytes() as counted:
            run(loaded, packing, taps)
        num_rows = packing.num_rows if facts.packed else length
        peaks.append((num_rows, counted.peak))
    (few, less), (many, more) = peaks
    # more = many·row + many²·pair, and so for less
    pair_bytes = max((more / many - less / few) / (many - few), 0.0) if many > few else 0.0
    row_bytes = max(more / many - many * pair_bytes, 0.0)
    small_bytes = SMALL_SHARE * free_bytes(loaded.device) if loaded.device.type == "cuda" else 0.0
    return MemoryCost(row_bytes, pair_bytes, 4 * facts.hidden_size, small_bytes)


@torch.inference_mode()
def same_in_any_company(loaded: LoadedModel, run: Pass) -> bool:
    """Whether texts of several lengths give the same bits alone and in passes of many sizes, of one thread too.

    Kernels for matrices are chosen by the number of rows, and the last few elements of a row of memory
    may be computed in another way than the rest: whether either shows, only trying tells.
    """
    facts = loaded.facts
    vocab_size = loaded.model.get_input_embeddings().num_embeddings
    maps = AttentionPlan((0,), (0,), False, None) if facts.has_attentions else None
    plan = OutputPlan(DType.FLOAT32, hidden_states=tuple(range(facts.num_layers + 1)), attentions=maps)

    def texts_of(lengths: Iterable[int]) -> list[Work]:
        ids = [probe_ids(min(length, facts.max_tokens), vocab_size, length) for length in lengths]
        return [Work(one, None, plan, plan.specs(len(one), facts.hidden_size)) for one in ids]

    @torch.inference_mode()
    def outputs_of(works: list[Work]) -> dict[int, list[torch.Tensor | None]]:
        packing = Packing.of(works)
        taps = Taps(packing, facts.num_layers, loaded.device)
        run(loaded, packing, taps)
        return dict(zip(packing.order, taps.buffers, strict=True))

    texts = texts_of(INVARIANT_LENGTHS)
    alone = [outputs_of([text])[0] for text in texts]
    with ThreadPoolExecutor(1, initializer=use_one_thread) as one_core:
        for num_short, num_long in INVARIANT_COMPANY:
            company = [*texts, *texts_of([1] * num_short), *texts_of([29] * num_long)]
            for together in (outputs_of(company), one_core.submit(outputs_of, company).result()):
                for number, expected in enumerate(alone):
                    pairs = zip(together[number], expected, strict=True)
                    if not all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs):
                        return False
    return True


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """The library's own attention for a while; the config is read at every pass."""
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = implementation


def layer_modules(model: Any) -> list[nn.Module]:
    """The modules whose outputs are the hidden states, as transformers itself records them."""
    recorded = model._can_record_outputs["hidden_states"]
    layer_class = getattr(recorded, "target_class", recorded)
    return [module for module in model.modules() if isinstance(module, layer_class)]


def token_limit(config: Any, family: Family | None) -> int:
    """Tokens of the longest text that the model has positions for."""
    num_positions = (
        getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 512
    )
    if family is not None:
        token_id = 0 if config.pad_token_id else 1  # any but padding
        no_outputs = OutputPlan(DType.FLOAT32)
        one_token = Packing.of([Work(np.array([token_id]), None, no_outputs, ())])
        num_positions -= int(family.positions(one_token, config)[0])
    elif config.model_type == "mpnet":
        num_positions -= 2  # counted from behind its padding_idx, which is 1 whatever its config says
    return int(num_positions)

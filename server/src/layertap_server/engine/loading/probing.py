"""Properties of a model that are found by running it: where its layers are, how long a text may be, how much
memory a pass takes, and whether results depend on the batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from typing import Any

import torch
from torch import nn

from layertap_server.engine.attention import NAME
from layertap_server.engine.loading.reference import (
    attention_named,
    embedding_rows,
    first_finite_row,
    names_token_types,
    probe_ids,
    text_config,
)
from layertap_server.engine.memory import SMALL_SHARE, HeldBytes, MemoryCost, free_bytes
from layertap_server.engine.model import LoadedModel, Pass, Watched
from layertap_server.engine.packing import Packing
from layertap_server.engine.taps import DepthReachedError, Taps
from layertap_server.engine.threads import use_one_thread
from layertap_server.enums import DType
from layertap_server.output_plans import AttentionPlan
from layertap_server.plan import OutputPlan, Work

logger = logging.getLogger(__name__)

# Length of the longer of the two texts that memory is measured with. In a padded pass, attention takes most
# of the memory only in long texts.
PACKED_TOKENS, PADDED_TOKENS = 128, 512
# Longest text that is run to see whether the model has positions for
# it; a larger limit is accepted if a text of this length works.
MAX_TRIED_TOKENS = 8192
FEW_TOKENS = 8
# Number of token types if the configuration does not name it: the two texts of a pair, and XLNet's [CLS].
UNNAMED_TYPES = 3
# Token limit if the configuration does not name one.
DEFAULT_MAX_TOKENS = 512

# Lengths of the texts that are compared, and the batch mates that they are tried with: the numbers of further
# texts of 1 and of 29 tokens. The passes have 270 to 1,800 rows.
INVARIANT_LENGTHS = (1, 3, 7, 12, 18, 33, 64, 130)
INVARIANT_COMPANY = ((0, 0), (1, 0), (5, 1), (2, 5), (11, 13), (3, 30), (1, 52))


@torch.inference_mode()
def watch(model: Any, device: torch.device) -> Watched | None:
    """Finds the layers of a model by observing one pass: the modules that receive the same tensor objects
    that the model returns as hidden states, and the modules that return its attention maps. None if they are
    not found, because the tensors are passed on in another form."""
    received: list[tuple[nn.Module, Any]] = []
    given: list[tuple[nn.Module, Any]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append((module, args[0] if args else kwargs.get("hidden_states")))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given.append((module, output))

    ids = torch.from_numpy(probe_ids(6, embedding_rows(model), 1))[None].to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in model.modules()]
    handles += [module.register_forward_hook(after) for module in model.modules()]
    try:
        with attention_named(model, "eager"):
            output = model(**inputs, output_hidden_states=True, output_attentions=True)
        *below, last = output.hidden_states
        receivers = [[module for module, tensor in received if tensor is hidden] for hidden in below]
        # A class of modules that receives every hidden state, the outermost such class. This excludes an
        # encoder module, which receives only the first one.
        classes = (
            set.intersection(*({type(module) for module in modules} for modules in receivers))
            if below
            else set()
        )
        layer_class = (
            next((type(module) for module in receivers[-1] if type(module) in classes), None)
            if below
            else None
        )
        if layer_class is None:
            return None
        layers = unique(module for modules in receivers for module in modules if type(module) is layer_class)
        # The module that receives the output of the last layer, such as a final norm, if there is one.
        after_last = next((module for module, tensor in received if tensor is last), None)
        attentions = output.attentions or ()
        if len(attentions) != len(below):
            return Watched(layers, after_last, (), 0, gives_maps_if_told=False)

        # Of the modules that return a map, the innermost one is the
        # first to finish: the others only pass it on.
        places = [place_of(maps, given) for maps in attentions]
        found = [place for place in places if place is not None]
        if len(found) < len(places) or len({(type(module), number) for module, number in found}) != 1:
            return None
        givers, number = unique(module for module, _ in found), found[0][1]
        given.clear()
        with attention_named(model, "eager"):
            model(**inputs, output_attentions=False)
        unasked = [result for module, result in given if module in givers]
        gives_unasked = all(
            isinstance(result, tuple) and len(result) > number and getattr(result[number], "ndim", 0) == 4
            for result in unasked
        )
        return Watched(layers, after_last, givers, number, gives_maps_if_told=not gives_unasked)
    finally:
        for handle in handles:
            handle.remove()


def uncalled_linears(model: Any, device: torch.device, max_tokens: int) -> set[nn.Module]:
    """The linear layers that a pass does not call. A model may read the weight of such a layer instead, as
    LayoutLMv3 does with its relative positions. Empty if the pass fails: computing the reference results will
    report why."""
    found = {module for module in model.modules() if type(module) is nn.Linear}
    handles = [module.register_forward_pre_hook(lambda one, _: found.discard(one)) for module in list(found)]
    ids = torch.from_numpy(probe_ids(min(16, max_tokens), embedding_rows(model), 1))[None].to(device)
    try:
        with torch.inference_mode(), attention_named(model, "eager"):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:
        logger.debug("looking for linear layers that are not called failed", exc_info=error)
        return set()
    finally:
        for handle in handles:
            handle.remove()
    return found


def unique(modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    return tuple(dict.fromkeys(modules))


def place_of(tensor: torch.Tensor, given: list[tuple[nn.Module, Any]]) -> tuple[nn.Module, int] | None:
    """The first module that returned this tensor object in a tuple, and its index in the tuple."""
    for module, output in given:
        if isinstance(output, tuple):
            for number, one in enumerate(output):
                if one is tensor:
                    return module, number
    return None


@torch.inference_mode()
def measure_memory(loaded: LoadedModel, run: Pass) -> MemoryCost:
    """Measures the peak memory of passes over a short and a longer text, and derives from them a cost for
    each row and for each pair of tokens."""
    facts = loaded.facts
    vocab_size = embedding_rows(loaded.model)
    longer = min(PACKED_TOKENS if facts.packed else PADDED_TOKENS, facts.max_tokens)
    lengths, peaks = (max(longer // 4, 1), longer), []
    plan = OutputPlan(DType.FLOAT32, last_hidden_state=True)
    for length in lengths:
        packing = Packing.of(
            [Work(probe_ids(length, vocab_size, 1), None, plan, plan.specs(length, facts.hidden_size))]
        )
        taps = Taps(packing, facts.num_layers, loaded.device, facts.last_index)
        with HeldBytes() as counted:
            run(loaded, packing, taps)
        num_rows = packing.num_rows if facts.packed else length
        peaks.append((num_rows, counted.peak))
    (few, less), (many, more) = peaks
    # more = many·row + many²·pair, and less = few·row + few²·pair
    pair_bytes = max((more / many - less / few) / (many - few), 0.0) if many > few else 0.0
    row_bytes = max(more / many - many * pair_bytes, 0.0)
    small_bytes = SMALL_SHARE * free_bytes(loaded.device) if loaded.device.type == "cuda" else 0.0
    return MemoryCost(row_bytes, pair_bytes, 4 * facts.hidden_size, small_bytes)


@torch.inference_mode()
def is_batch_invariant(loaded: LoadedModel, run: Pass) -> bool:
    """Whether texts of several lengths have the same results, to the bit, in a batch of one and in batches of
    many sizes, computed by all threads and by one.

    Libraries choose matrix kernels by the number of rows, and may compute the last few elements of a row of
    memory in another way than the rest. Whether that changes any bits can only be found by trying.
    """
    facts = loaded.facts
    vocab_size = embedding_rows(loaded.model)
    maps = AttentionPlan((0,), (0,), False, None) if facts.has_attentions else None
    plan = OutputPlan(DType.FLOAT32, hidden_states=tuple(range(facts.num_layers + 1)), attentions=maps)

    def texts_of(lengths: Iterable[int]) -> list[Work]:
        ids = [probe_ids(min(length, facts.max_tokens), vocab_size, length) for length in lengths]
        return [Work(one, None, plan, plan.specs(len(one), facts.hidden_size)) for one in ids]

    @torch.inference_mode()
    def outputs_of(works: list[Work]) -> dict[int, list[torch.Tensor | None]]:
        packing = Packing.of(works)
        taps = Taps(packing, facts.num_layers, loaded.device, facts.last_index)
        run(loaded, packing, taps)
        return dict(zip(packing.order, taps.buffers, strict=True))

    texts = texts_of(INVARIANT_LENGTHS)
    alone = [outputs_of([text])[0] for text in texts]
    with ThreadPoolExecutor(1, initializer=use_one_thread) as one_core:
        for num_short, num_long in INVARIANT_COMPANY:
            batch_mates = [*texts, *texts_of([1] * num_short), *texts_of([29] * num_long)]
            for together in (outputs_of(batch_mates), one_core.submit(outputs_of, batch_mates).result()):
                for number, expected in enumerate(alone):
                    pairs = zip(together[number], expected, strict=True)
                    if not all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs):
                        return False
    return True


@torch.inference_mode()
def num_token_types(model: Any) -> int:
    """The number of token types that the model distinguishes; 0 if it takes none."""
    if "token_type_ids" not in signature(model.forward).parameters:
        return 0
    if names_token_types(model):
        return int(text_config(model.config).type_vocab_size)
    ids = torch.full((1, UNNAMED_TYPES), first_finite_row(model))
    try:  # XLNet takes any type numbers, and only compares them; TAPAS needs seven types for each token
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.arange(UNNAMED_TYPES)[None],
        )
    except Exception:
        return 0
    return UNNAMED_TYPES


def layer_modules(model: Any) -> list[nn.Module]:
    """The modules whose outputs transformers itself records as the
    hidden states; empty if it records none."""
    recorded = (getattr(model, "_can_record_outputs", None) or {}).get("hidden_states")
    layer_class = getattr(recorded, "target_class", recorded)
    if not isinstance(layer_class, type):
        return []
    return [module for module in model.modules() if isinstance(module, layer_class)]


def token_limit(model: Any, first_layer: nn.Module | None, wanted: int) -> int:
    """The length of the longest text that the model has positions
    for, in tokens, including special tokens; found by running it.

    `wanted` is an upper limit; 0 means the limit that the configuration names. `wanted` may exceed the
    configured limit if the model has no table of positions.
    """
    config = text_config(model.config)
    named = [getattr(config, name, None) or 0 for name in ("max_position_embeddings", "n_positions")]
    limit = wanted or next((int(number) for number in named if number > 0), DEFAULT_MAX_TOKENS)
    tried = min(limit, MAX_TRIED_TOKENS)
    # Our attention is used if the model's code works with it, since it needs no masks. Those of a long text
    # take more time and memory than everything else here.
    can_do_without = first_layer is not None and takes(model, first_layer, min(tried, FEW_TOKENS), NAME)
    attention = NAME if can_do_without else "eager"
    if takes(model, first_layer, tried, attention):
        return limit
    works, fails = 1, tried
    while fails - works > 1:
        middle = (works + fails) // 2
        if takes(model, first_layer, middle, attention):
            works = middle
        else:
            fails = middle
    return works


@torch.inference_mode()
def takes(model: Any, first_layer: nn.Module | None, num_tokens: int, attention: str) -> bool:
    """Whether a text of `num_tokens` runs through the model's embeddings or, if `first_layer` is None,
    through the whole model."""

    def stop(*_: Any) -> None:
        raise DepthReachedError

    ids = torch.full((1, num_tokens), first_finite_row(model))
    handle = None if first_layer is None else first_layer.register_forward_pre_hook(stop)
    try:
        with attention_named(model, attention):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except DepthReachedError:
        return True
    except Exception:  # an index outside of the table of positions, or shapes that do not match
        return False
    finally:
        if handle is not None:
            handle.remove()
    return True

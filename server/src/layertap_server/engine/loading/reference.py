"""What the model itself gives, by its own eager attention in float32, each text alone: what all our ways are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from layertap_server.engine.attention import NAME
from layertap_server.engine.loading.checkpoint import decoder_error, one_line
from layertap_server.engine.taps import DepthReachedError
from layertap_server.plan import Int64Array

# Tokens of the texts that are tried. Some are near enough to share a padded pass; together they are 128, a number of
# rows that calibration meets as well: oneDNN prepares a kernel for each such number, which takes longer than the pass.
SHORT_LENGTHS = (33, 7, 1, 40, 6, 41)
# Of the longest that goes through all layers, if the model takes so many: beyond the blocks and windows that families
# have, and still quick. Those that run packed have windows of 128 tokens at most.
LONG_TOKENS, LONG_PACKED_TOKENS = 1024, 256
# Of a text no maps are compared where all of them would take more than this.
MAX_MAP_BYTES = 2**28
# Largest relative Frobenius error between two runs of one text by the same code.
REPEATABLE = 1e-5


class UnfitModelError(Exception):
    """The model does not give what an encoder gives; the message says what is missing."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """One text and the model's own results for it: T tokens, L layers, A heads, H hidden size."""

    input_ids: Int64Array  # (T,)
    token_type_ids: Int64Array | None  # (T,)
    hidden_states: torch.Tensor  # (L+1, T, H); (1, T, H) of a text that went no further than the embeddings
    last_hidden_state: torch.Tensor | None  # (T, H); None where the text went no further
    maps: torch.Tensor | None  # (L, A, T, T); None where there are none, or too many to keep
    pooler_output: torch.Tensor | None  # (P,)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def name(self) -> str:
        return f"a text of {self.num_tokens} token{'s' * (self.num_tokens != 1)}"


def probe_ids(num_tokens: int, vocab_size: int, offset: int, last_id: int | None = None) -> Int64Array:
    """Ordinary ids, away from the special tokens at the vocabulary's start where it is large enough; the last one is
    the token that ends a text, where there is such."""
    ids = (np.arange(num_tokens, dtype=np.int64) * 37 + offset) % max(vocab_size - 5, 1) + min(
        4, vocab_size - 1
    )
    if last_id is not None and num_tokens > 1:
        ids[-1] = last_id
    return ids


def ids_that_end(config: Any, vocab_size: int) -> int | None:
    """The token that ends a text, by the configuration: some poolers look for it."""
    for name in ("eos_token_id", "sep_token_id"):
        token_id = getattr(config, name, None)
        if isinstance(token_id, int) and 0 <= token_id < vocab_size:
            return token_id
    return None


def references(
    source: str,
    model: Any,
    device: torch.device,
    *,
    max_tokens: int,
    num_types: int,
    begin_anew: Callable[[], None] | None,
    first_layer: torch.nn.Module | None,
) -> list[Reference]:
    """The model's own results for a few short texts and a long one.

    Raises `UnfitModelError` where they are not an encoder's, and `ModelLoadError` for a decoder. `first_layer` is that
    of a family that may run packed: its code keeps nothing of one pass for the next, and of a text as long as the
    model takes its embeddings are enough, where positions are looked up.
    """
    vocab_size = embedding_rows(model)
    last_id = ids_that_end(model.config, vocab_size)
    usual_id = first_finite_row(model)
    lengths = list(dict.fromkeys(min(length, max_tokens) for length in SHORT_LENGTHS))
    if max_tokens > max(lengths):
        lengths.append(min(max_tokens, LONG_TOKENS if first_layer is None else LONG_PACKED_TOKENS))

    def inputs(length: int) -> tuple[Int64Array, Int64Array | None]:
        ids = probe_ids(length, vocab_size, length, last_id)
        ids[~are_finite(model, ids)] = usual_id
        return ids, np.arange(length, dtype=np.int64) * 3 // length % num_types if num_types > 1 else None

    def text(length: int) -> Reference:
        own: Reference = own_results(model, device, *inputs(length), begin_anew)
        return own

    found = [text(length) for length in lengths]
    check_uniform(found)
    quick = min(1, len(found) - 1)
    check_repeatable(found[quick], text(lengths[quick]))
    if first_layer is None:
        check_repeatable(found[-1], text(lengths[-1]))
    if is_decoder(model, device, found[quick]):
        raise decoder_error(source)
    if first_layer is not None and max_tokens > max(lengths):
        found.append(own_embeddings(model, device, *inputs(max_tokens), first_layer))
    return found


@torch.inference_mode()
def own_results(
    model: Any,
    device: torch.device,
    ids: Int64Array,
    types: Int64Array | None,
    begin_anew: Callable[[], None] | None,
) -> Reference:
    """Raises `UnfitModelError` with what the model's code says, or what it does not give."""
    inputs = model_inputs(device, ids, types)
    num_tokens = len(ids)
    wants_maps = num_maps(model.config) * num_tokens**2 * 4 <= MAX_MAP_BYTES
    if begin_anew is not None:
        begin_anew()
    try:
        with attention_named(model, "eager"):
            output = model(**inputs, output_hidden_states=True, output_attentions=wants_maps)
    except Exception as error:  # whatever a model's code may raise
        raise UnfitModelError(
            f"its own code fails on token ids alone ({num_tokens} of them): {one_line(error)}"
        ) from error
    last, hidden_states = (getattr(output, name, None) for name in ("last_hidden_state", "hidden_states"))
    if not isinstance(last, torch.Tensor):
        raise UnfitModelError("it gives no last_hidden_state")
    # Some give rows of padding of their own behind the text's.
    hidden_states = [one[:, :num_tokens] if one.ndim == 3 else one for one in hidden_states or ()]
    if not hidden_states or any(
        one.shape != last.shape or one.shape[1] != num_tokens for one in hidden_states
    ):
        raise UnfitModelError(
            "it does not give one hidden state a layer and token, each as wide as last_hidden_state "
            f"({', '.join(sorted({shape_of(one) for one in [*hidden_states, last]}))})"
        )
    attentions: Sequence[Any] = getattr(output, "attentions", None) or ()
    num_layers = len(hidden_states) - 1
    are_maps = len(attentions) == num_layers and all(
        maps is not None
        and maps.ndim == 4
        and maps.shape == attentions[0].shape
        and maps.shape[-2:] == (num_tokens,) * 2
        for maps in attentions
    )
    pooled = getattr(output, "pooler_output", None)
    return Reference(
        ids,
        types,
        torch.cat(hidden_states),
        last[0],
        torch.cat(list(attentions)) if are_maps and num_layers else None,
        pooled[0] if isinstance(pooled, torch.Tensor) and pooled.ndim == 2 else None,
    )


@torch.inference_mode()
def own_embeddings(
    model: Any,
    device: torch.device,
    ids: Int64Array,
    types: Int64Array | None,
    first_layer: torch.nn.Module,
) -> Reference:
    """Of a text that goes no further than the embeddings; by an attention that needs no masks of its square."""
    received: list[torch.Tensor] = []

    def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append(args[0] if args else kwargs["hidden_states"])
        raise DepthReachedError

    handle = first_layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with attention_named(model, NAME), suppress(DepthReachedError):
            model(**model_inputs(device, ids, types))
    finally:
        handle.remove()
    return Reference(ids, types, received[0], None, None, None)


def model_inputs(device: torch.device, ids: Int64Array, types: Int64Array | None) -> dict[str, torch.Tensor]:
    """Of one text: each (1, T)."""
    inputs = {"input_ids": torch.from_numpy(ids)[None].to(device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if types is not None:
        inputs["token_type_ids"] = torch.from_numpy(types)[None].to(device)
    return inputs


def num_maps(config: Any) -> int:
    """Of one text, as configured; 0 where that does not tell."""
    counts = [getattr(text_config(config), name, 0) for name in ("num_hidden_layers", "num_attention_heads")]
    return math.prod(count if isinstance(count, int) else 0 for count in counts)


def shape_of(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def check_uniform(found: Sequence[Reference]) -> None:
    """All texts have as many layers, and results that are numbers."""
    if len({len(one.hidden_states) for one in found}) != 1:
        raise UnfitModelError("the number of its hidden states depends on the text")
    for one in found:
        if not bool(torch.isfinite(one.hidden_states).all()):
            raise UnfitModelError(
                f"its own results for {one.name} are not finite (NaN or infinity), in float32"
            )


def check_repeatable(first: Reference, again: Reference) -> None:
    """A model that draws lots, or that keeps something of the texts before, has no right answer."""
    error = relative_error(again.hidden_states, first.hidden_states)
    if error > REPEATABLE:
        raise UnfitModelError(
            f"its own results are not repeatable: {first.name} gives others when it comes again (by {error:.2g}, "
            "relative)"
        )


@torch.inference_mode()
def is_decoder(model: Any, device: torch.device, text: Reference) -> bool:
    """Whether each token sees only those before it, in a model made to generate. (The text towers of CLIP and its
    kin see no more, and are encoders.)"""
    generates = is_generator(model)
    if not generates or text.num_tokens < 2:
        return False
    ids = text.input_ids.copy()
    ids[-1] = ids[0] if ids[-1] != ids[0] else ids[1]
    other = own_results(model, device, ids, text.token_type_ids, None)
    before = relative_error(other.hidden_states[:, :-1], text.hidden_states[:, :-1])
    return before < REPEATABLE


def is_generator(model: Any) -> bool:
    """Whether the library generates text with models of this kind, or this one keeps a cache to do so."""
    from inspect import signature

    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    parameters = signature(model.forward).parameters
    return type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING or bool(
        {"past_key_values", "cache", "cache_params", "use_cache"} & parameters.keys()
    )


def relative_error(one: torch.Tensor, expected: torch.Tensor) -> float:
    """The Frobenius norm of the difference over that of what is expected; 0 / 0 is 0."""
    difference, norm = float((one - expected).norm()), float(expected.norm())
    return difference / norm if norm else (0.0 if not difference else float("inf"))


def embedding_rows(model: Any) -> int:
    """The number of token ids that the model knows; raises `UnfitModelError` where it takes no token ids."""
    try:
        table = model.get_input_embeddings()
    except Exception as error:  # NotImplementedError, or what the model's own code raises
        raise UnfitModelError("it has no table of token embeddings") from error
    weight = getattr(table, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not is_table(table):
        raise UnfitModelError("it takes no token ids")
    return int(weight.shape[0])


def are_finite(model: Any, ids: Int64Array) -> npt.NDArray[np.bool_]:
    """Of each token, whether its embedding is made of numbers."""
    rows: torch.Tensor = model.get_input_embeddings().weight[torch.from_numpy(ids)]
    finite: npt.NDArray[np.bool_] = torch.isfinite(rows).all(-1).cpu().numpy()
    return finite


def first_finite_row(model: Any) -> int:
    """A token id with an embedding of numbers, away from the special tokens where possible."""
    sums = model.get_input_embeddings().weight.sum(-1)
    finite = torch.isfinite(sums).nonzero().flatten()
    if not len(finite):
        raise UnfitModelError("none of its token embeddings is finite")
    return int(finite[min(5, len(finite) - 1)])


def names_token_types(model: Any) -> bool:
    """Whether the model has a table of token types, whose first is the default."""
    return isinstance(getattr(text_config(model.config), "type_vocab_size", None), int)


def is_table(module: Any) -> bool:
    """Of embeddings, and no product: images and sounds go through one."""
    return isinstance(module, torch.nn.Embedding) or hasattr(module, "padding_idx")


def text_config(config: Any) -> Any:
    """Of the text's part, where a model has several."""
    get = getattr(config, "get_text_config", None)
    return config if get is None else get()


@contextmanager
def attention_named(model: Any, name: str) -> Iterator[None]:
    """Another attention for a while; the configuration is read at every pass. "eager" is the library's own."""
    implementation = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = implementation

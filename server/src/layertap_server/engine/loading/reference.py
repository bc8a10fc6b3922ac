"""Reference results: the unmodified model with its own eager attention in float32, in batches of one.

Every way to run the model must reproduce them (ways.py, verification.py).
"""

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

# Lengths of the short texts, in tokens. Some are similar enough to share a padded pass. Together they have
# 128 tokens, a number of rows that calibration uses as well: oneDNN prepares a kernel for each number of
# rows, which takes longer than the pass itself.
SHORT_LENGTHS = (33, 7, 1, 40, 6, 41)
# Length of the longest text that goes through all layers, if the model accepts that many tokens, for models
# that run padded and packed. It exceeds the block sizes and attention windows of the known families, and is
# still quick. Families that run packed have windows of 128 tokens at most.
LONG_TOKENS, LONG_PACKED_TOKENS = 1024, 256
# The maps of a text are not compared if all of them together take more than this.
MAX_MAP_BYTES = 2**28
# Largest relative Frobenius error between two runs of one text by the same code.
REPEATABLE = 1e-5


class UnfitModelError(Exception):
    """The model does not return what an encoder returns; the message says what is missing."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """One text and the model's own results for it: T tokens, L layers, A heads, H hidden size."""

    input_ids: Int64Array  # (T,)
    token_type_ids: Int64Array | None  # (T,)
    hidden_states: torch.Tensor  # (L+1, T, H); (1, T, H) if only the embeddings were computed
    last_hidden_state: torch.Tensor | None  # (T, H); None if only the embeddings were computed
    maps: torch.Tensor | None  # (L, A, T, T); None if the model has none, or if they are too large
    pooler_output: torch.Tensor | None  # (P,)
    contacts: torch.Tensor | None = None  # (T-2, T-2), of some texts of a model with a contact head

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def name(self) -> str:
        return f"a text of {self.num_tokens} token{'s' * (self.num_tokens != 1)}"


def probe_ids(num_tokens: int, vocab_size: int, offset: int, last_id: int | None = None) -> Int64Array:
    """Token ids for a test text: none of the special tokens at the vocabulary's start, if the vocabulary is
    large enough. With `last_id`, the last one is the token that ends a text."""
    ids = (np.arange(num_tokens, dtype=np.int64) * 37 + offset) % max(vocab_size - 5, 1) + min(
        4, vocab_size - 1
    )
    if last_id is not None and num_tokens > 1:
        ids[-1] = last_id
    return ids


def ids_that_end(config: Any, vocab_size: int) -> int | None:
    """The id of the token that ends a text, from the configuration:
    some poolers search for it. None: not known."""
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

    `first_layer` is given for a family that may run packed, else None. The code of such a family keeps no
    state between passes, so the repeatability of the long text is not checked. Of a text of `max_tokens` only
    the embeddings are then computed: they are where positions are looked up. Raises `UnfitModelError` where
    the results are not those of an encoder, and `ModelLoadError` for a decoder.
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
    """The model's own results for one text.

    Raises `UnfitModelError` with the error that the model's code
    raises, or with what is missing in its output.
    """
    inputs = model_inputs(device, ids, types)
    num_tokens = len(ids)
    wants_maps = num_maps(model.config) * num_tokens**2 * 4 <= MAX_MAP_BYTES
    if begin_anew is not None:
        begin_anew()
    try:
        with attention_named(model, "eager"):
            output = model(**inputs, output_hidden_states=True, output_attentions=wants_maps)
    except Exception as error:  # the model's code may raise anything
        raise UnfitModelError(
            f"its code fails on {num_tokens} token ids without other inputs: {one_line(error)}"
        ) from error
    last, hidden_states = (getattr(output, name, None) for name in ("last_hidden_state", "hidden_states"))
    if not isinstance(last, torch.Tensor):
        raise UnfitModelError("it returns no last_hidden_state")
    # Some models pad their input, and return the rows of that padding after those of the text.
    hidden_states = [one[:, :num_tokens] if one.ndim == 3 else one for one in hidden_states or ()]
    if not hidden_states or any(
        one.shape != last.shape or one.shape[1] != num_tokens for one in hidden_states
    ):
        raise UnfitModelError(
            "it does not return a hidden state for each layer and token with the width of last_hidden_state "
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
    """The embeddings of one text: the pass is stopped at the first layer. It runs under our attention's name,
    so that the library builds no (T, T) mask."""
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
    """The arguments of the model's forward for one text, (1, T) each."""
    inputs = {"input_ids": torch.from_numpy(ids)[None].to(device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if types is not None:
        inputs["token_type_ids"] = torch.from_numpy(types)[None].to(device)
    return inputs


def num_maps(config: Any) -> int:
    """The number of attention maps of one text, layers times heads,
    from the configuration; 0 if it does not say."""
    counts = [getattr(text_config(config), name, 0) for name in ("num_hidden_layers", "num_attention_heads")]
    return math.prod(count if isinstance(count, int) else 0 for count in counts)


def shape_of(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def check_uniform(found: Sequence[Reference]) -> None:
    """Checks that all texts have the same number of hidden states, and that these are finite."""
    if len({len(one.hidden_states) for one in found}) != 1:
        raise UnfitModelError("the number of its hidden states depends on the text")
    for one in found:
        if not bool(torch.isfinite(one.hidden_states).all()):
            raise UnfitModelError(f"its results for {one.name} are not finite (NaN or infinity) in float32")


def check_repeatable(first: Reference, again: Reference) -> None:
    """Refuses a model that uses random numbers or keeps state between texts: it has no reference results."""
    error = relative_error(again.hidden_states, first.hidden_states)
    if error > REPEATABLE:
        raise UnfitModelError(
            f"its results are not repeatable: a second pass over {first.name} differs by {error:.2g} "
            "(relative)"
        )


@torch.inference_mode()
def is_decoder(model: Any, device: torch.device, text: Reference) -> bool:
    """Whether the model is made to generate text, and each of its tokens attends only to the tokens up to
    itself. (The text encoders of CLIP and similar models are causal too, but do not generate text.)"""
    generates = is_generator(model)
    if not generates or text.num_tokens < 2:
        return False
    ids = text.input_ids.copy()
    ids[-1] = ids[0] if ids[-1] != ids[0] else ids[1]
    other = own_results(model, device, ids, text.token_type_ids, None)
    before = relative_error(other.hidden_states[:, :-1], text.hidden_states[:, :-1])
    return before < REPEATABLE


def is_generator(model: Any) -> bool:
    """Whether transformers has a causal language model for this
    configuration, or the forward takes a cache."""
    from inspect import signature

    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    parameters = signature(model.forward).parameters
    return type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING or bool(
        {"past_key_values", "cache", "cache_params", "use_cache"} & parameters.keys()
    )


def relative_error(one: torch.Tensor, expected: torch.Tensor) -> float:
    """The Frobenius norm of the difference, divided by that of `expected`; 0 / 0 is 0."""
    difference, norm = float((one - expected).norm()), float(expected.norm())
    return difference / norm if norm else (0.0 if not difference else float("inf"))


def embedding_rows(model: Any) -> int:
    """The number of token ids that the model knows. Raises
    `UnfitModelError` if it does not take token ids."""
    try:
        table = model.get_input_embeddings()
    except Exception as error:  # NotImplementedError, or what the model's own code raises
        raise UnfitModelError("it has no table of token embeddings") from error
    weight = getattr(table, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not is_table(table):
        raise UnfitModelError("it does not read token ids")
    return int(weight.shape[0])


def are_finite(model: Any, ids: Int64Array) -> npt.NDArray[np.bool_]:
    """For each token id, whether its embedding is finite."""
    rows: torch.Tensor = model.get_input_embeddings().weight[torch.from_numpy(ids)]
    finite: npt.NDArray[np.bool_] = torch.isfinite(rows).all(-1).cpu().numpy()
    return finite


def first_finite_row(model: Any) -> int:
    """A token id with a finite embedding: the sixth such id or, where there are fewer, the last one, to avoid
    the special tokens at the start of the vocabulary."""
    sums = model.get_input_embeddings().weight.sum(-1)
    finite = torch.isfinite(sums).nonzero().flatten()
    if not len(finite):
        raise UnfitModelError("none of its token embeddings is finite")
    return int(finite[min(5, len(finite) - 1)])


def names_token_types(model: Any) -> bool:
    """Whether the configuration names the size of a table of token types. Type 0 is then the default."""
    return isinstance(getattr(text_config(model.config), "type_vocab_size", None), int)


def is_table(module: Any) -> bool:
    """Whether the module is a table of embeddings. (Models of images and audio have a projection here.)"""
    return isinstance(module, torch.nn.Embedding) or hasattr(module, "padding_idx")


def text_config(config: Any) -> Any:
    """The configuration of the text model, where the model has parts for several modalities."""
    get = getattr(config, "get_text_config", None)
    return config if get is None else get()


@contextmanager
def attention_named(model: Any, name: str) -> Iterator[None]:
    """Switches the model to another attention implementation within the context. The library reads the
    configuration at every pass; "eager" is its own plain implementation."""
    implementation = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = implementation

"""Loads one model as the `Config` says, with its tokenizer and its engine, and warms it up."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from layertap_server.config import Config
from layertap_server.engine_host import EngineHost
from layertap_server.local_model import LocalModel
from layertap_server.model_facts import ModelFacts
from layertap_server.start_checks import StartError

logger = logging.getLogger(__name__)


def check_configurations(sources: Sequence[str], config: Config) -> None:
    """Raises a `StartError` if the configuration of a model shows that it cannot be served. It is called
    before the weights of any model are read. Blocking; imports torch."""
    from layertap_server.engine import ModelLoadError, read_configurations

    try:
        for source in sources:
            read_configurations(source, config.trust_remote_code)
    except ModelLoadError as error:
        raise StartError(str(error)) from error


def load(name: str, source: str, config: Config) -> LocalModel:
    """Loads one model and warms it up. Blocking; imports torch, after it has logged what it does."""
    begun = time.monotonic()
    logger.info("loading %s from %s", name, source)
    from layertap_server.engine import ModelLoadError, engine_for, load_model
    from layertap_server.engine.threads import use_threads
    from layertap_server.tokenization.tokenizer_loading import TokenizerLoadError, load_tokenizer
    from layertap_server.tokenization.worker import Tokenization

    try:
        use_threads(config.threads)
        engine = engine_for(
            load_model(
                name,
                source,
                device=config.device,
                dtype=config.dtype,
                trust_remote_code=config.trust_remote_code,
                max_input_tokens=config.max_input_tokens,
                batch_invariant=config.batch_invariant,
            )
        )
        tokenizer = load_tokenizer(source, config.trust_remote_code, engine.facts.tokenizer)
        tokenization = Tokenization(
            tokenizer, max_tokens=engine.facts.max_tokens, max_queue_chars=config.max_queue_chars
        )
    except (ModelLoadError, TokenizerLoadError) as error:
        raise StartError(str(error)) from error
    embedding_tokens = min(tokenizer.max_tokens, engine.facts.max_tokens)
    facts = replace(engine.facts, max_embedding_tokens=embedding_tokens)
    if misfit := tokenization.misfit(facts.vocab_size, facts.type_vocab_size):
        logger.warning(
            "%s: its tokenizer has tokens or token types that the model does not have; texts with them are rejected: %s",
            name,
            misfit,
        )
        facts = replace(facts, text_ids_fit=False)
    host = EngineHost(facts, engine, config)
    host.warm_up()
    logger.info("%s: %s, ready in %.1f s", name, describe(facts), time.monotonic() - begun)
    return LocalModel(host, tokenization)


def describe(facts: ModelFacts) -> str:
    """One line for the log: a model's shape, and how it is computed."""
    return (
        f"{facts.architecture}, {facts.num_layers} layers, hidden size {facts.hidden_size}, "
        f"{facts.num_attention_heads} heads, up to {facts.max_tokens} tokens, "
        f"{'with' if facts.has_pooler else 'no'} pooler; {facts.compute_dtype.name.lower()} on {facts.device}, "
        f"attention {facts.attention}"
    )

"""Hooks on a model's own layers, which pass hidden states and
attention maps to the `Taps` of the running batch."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from layertap_server.engine.taps import Taps


class LayerHooks:
    """Hooks on a model's layers that write to the `Taps` of the
    running pass. Each thread has its own running pass."""

    def __init__(self) -> None:
        self._by_thread: dict[int, Taps] = {}

    @property
    def taps(self) -> Taps | None:
        return self._by_thread.get(threading.get_ident())

    @contextmanager
    def feeding(self, taps: Taps) -> Iterator[None]:
        thread = threading.get_ident()
        self._by_thread[thread] = taps
        try:
            yield
        finally:
            del self._by_thread[thread]

    def attach(self, layers: Iterable[nn.Module]) -> None:
        """Attaches hooks to the modules that receive hidden states 0 to L-1."""
        for layer in layers:
            layer.register_forward_pre_hook(self._before, with_kwargs=True)

    def attach_last(self, module: nn.Module) -> None:
        """Attaches a hook to the module that receives hidden state L
        and computes last_hidden_state from it."""

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (taps := self.taps) is not None:
                taps.write_hidden_state(taps.num_layers, args[0] if args else kwargs["hidden_states"])

        module.register_forward_pre_hook(take, with_kwargs=True)

    def attach_maps(self, modules: Iterable[nn.Module], number: int) -> None:
        """Attaches hooks to the modules whose output tuples hold attention maps at index `number`."""

        def take(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            taps = self.taps
            if taps is None or not taps.map_taps:
                return None
            weights = output[number]
            taps.write_padded_maps(weights)
            # Replaced by an empty tensor, since the library would
            # keep the maps of all layers until the pass ends.
            return (*output[:number], weights.new_empty(0), *output[number + 1 :])

        for module in modules:
            module.register_forward_hook(take)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taps = self.taps
        if taps is not None:
            taps.next_hidden_state(args[0] if args else kwargs["hidden_states"])

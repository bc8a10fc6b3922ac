"""One forward pass for one batch: plain data in, host buffers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from layertap_server.engine.model import LoadedModel
from layertap_server.engine.packed import run_packed
from layertap_server.engine.packing import Packing
from layertap_server.engine.padded import run_padded, sub_batches
from layertap_server.engine.pooling import fill_pooled
from layertap_server.engine.taps import Taps
from layertap_server.engine.transfer import to_host
from layertap_server.plan import ModelFacts, Outputs, TensorData, Work

Pass = Callable[[Packing, Taps], None]


class Engine:
    """A loaded model and its passes. Called from one thread at a time."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    @property
    def facts(self) -> ModelFacts:
        return self._loaded.facts

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[Outputs]:
        """Answers a batch, in the order given. Every work wants something of the model."""
        if self.facts.packed:
            return self._answer(works, self._run_packed)
        answers: list[Outputs] = [()] * len(works)
        for group in sub_batches(works):
            outputs = self._answer([works[index] for index in group], self._run_padded)
            for index, output in zip(group, outputs, strict=True):
                answers[index] = output
        return answers

    def _run_packed(self, packing: Packing, taps: Taps) -> None:
        run_packed(self._loaded, packing, taps)

    def _run_padded(self, packing: Packing, taps: Taps) -> None:
        loaded = self._loaded
        run_padded(loaded.model, packing, taps, loaded.pad_token_id, self.facts.type_vocab_size > 0)

    def _answer(self, works: Sequence[Work], run: Pass) -> list[Outputs]:
        packing = Packing.of(works)
        taps = Taps(packing, self.facts.num_layers, self._loaded.device)
        run(packing, taps)
        scales = fill_pooled(taps, self._loaded.pooler)

        tensors = [tensor for buffers in taps.buffers for tensor in buffers if tensor is not None]
        host = iter(to_host([*tensors, *scales.values()]))
        data = [[next(host) for _ in buffers] for buffers in taps.buffers]
        host_scales = dict(zip(scales, host, strict=True))
        answers: list[Outputs] = [()] * len(works)
        for text, position in enumerate(packing.order):
            answers[position] = tuple(
                TensorData(array, host_scales.get((text, number))) for number, array in enumerate(data[text])
            )
        return answers

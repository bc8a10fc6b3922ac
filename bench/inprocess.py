"""The same model without a server, from texts to vectors: transformers with padding, and the packed engine.

This is a separate process, so that the load generator needs no torch. Each line of standard input has a way
and the texts to encode; the answer is the time in seconds, and the first vectors.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer

from layertap_server.engine import Engine, engine_for, load_model
from layertap_server.enums import DType, Encoding, LayerMerge, Pooling
from layertap_server.output_plans import EmbeddingPlan
from layertap_server.plan import OutputPlan, Outputs, Work
from layertap_server.scheduling.calibration import calibrate
from layertap_server.scheduling.cost_model import CostModel
from layertap_server.tokenization.inputs import Encoded, Text, Truncation
from layertap_server.tokenization.tokenizer_loading import load_tokenizer
from layertap_server.tokenization.worker import Tokenization

BATCH_SIZE = 32
NUM_COMPARED = 32
Vectors = npt.NDArray[np.float32]


class Transformers:
    """Mean pooling over padded batches, as is usual with transformers."""

    def __init__(self, source: str, device: str, dtype: str, max_tokens: int) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModel.from_pretrained(source, dtype=getattr(torch, dtype))
        self._model, self._device = model.eval().to(device), device
        self._max_tokens = max_tokens

    def in_arrival_order(self, texts: Sequence[str]) -> Vectors:
        return np.concatenate(
            [self._encode(texts[at : at + BATCH_SIZE]) for at in range(0, len(texts), BATCH_SIZE)]
        )

    def sorted_by_length(self, texts: Sequence[str]) -> Vectors:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = self.in_arrival_order([texts[index] for index in order])
        return vectors[np.argsort(order)]

    def _encode(self, texts: Sequence[str]) -> Vectors:
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        with torch.inference_mode():
            hidden = self._model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None].float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        vectors: Vectors = torch.nn.functional.normalize(pooled).cpu().numpy()
        return vectors


class Packed:
    """The server's engine alone, with batches of the size that the server would choose, in arrival order."""

    def __init__(self, source: str, device: str, dtype: str) -> None:
        loaded = load_model(
            "bench", source, device=device, dtype=dtype, trust_remote_code=False, max_input_tokens=0
        )
        engine = engine_for(loaded)
        self.facts = loaded.facts
        measured = calibrate(engine, self.facts, CostModel())
        engine.num_cores, self._max_batch_tokens = measured.num_cores, measured.batch_tokens
        self._served = Served(engine)
        self._tokenization = Tokenization(load_tokenizer(source), max_tokens=loaded.facts.max_tokens)

    def encode(self, texts: Sequence[str]) -> Vectors:
        outputs = [output for batch in self._served.run(self._batches(texts)) for output in batch]
        return np.stack([output[0].data for output in outputs])

    def _batches(self, texts: Sequence[str]) -> Iterator[list[Work]]:
        [encoded] = self._tokenization.encode_many([([Text(text) for text in texts], Truncation.END)])
        if isinstance(encoded, Exception):
            raise encoded
        batch: list[Work] = []
        num_tokens = 0
        for one in encoded:
            if batch and num_tokens + one.num_tokens > self._max_batch_tokens:
                yield batch
                batch, num_tokens = [], 0
            batch.append(self._work(one))
            num_tokens += one.num_tokens
        yield batch

    def _work(self, encoded: Encoded) -> Work:
        embedding = EmbeddingPlan(
            pooling=Pooling.MEAN,
            layers=(self.facts.num_layers,),
            layer_merge=LayerMerge.CONCAT,
            normalize=True,
            dimensions=self.facts.hidden_size,
            encoding=Encoding.FLOAT32,
            segments=((0, encoded.num_tokens),),
            has_spans=False,
        )
        plan = OutputPlan(DType.FLOAT32, embeddings=(embedding,))
        type_ids = encoded.type_ids if self.facts.type_vocab_size else None
        return Work(encoded.input_ids, type_ids, plan, plan.specs(encoded.num_tokens, self.facts.hidden_size))


class Served:
    """Runs an engine's batches as the server does: one per core at the same time, if the engine supports
    it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = (
            ThreadPoolExecutor(engine.num_cores, initializer=engine.use_one_core)
            if engine.num_cores > 1
            else None
        )

    def run(self, batches: Iterable[Sequence[Work]]) -> Iterator[list[Outputs]]:
        return (
            map(self._engine.run, batches)
            if not self._threads
            else self._threads.map(self._engine.run, batches)
        )


def main(source: str, device: str, dtype: str) -> None:
    packed = Packed(source, device, dtype)
    padded = Transformers(source, device, dtype, packed.facts.max_tokens)
    ways: dict[str, Callable[[Sequence[str]], Vectors]] = {
        "padded": padded.in_arrival_order,
        "sorted": padded.sorted_by_length,
        "packed": packed.encode,
    }
    for line in sys.stdin:
        way, texts = json.loads(line)
        began = time.perf_counter()
        vectors = ways[way](texts)
        seconds = time.perf_counter() - began
        # The first few vectors, which are compared with those of the other ways.
        print(json.dumps({"seconds": seconds, "vectors": vectors[:NUM_COMPARED].tolist()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

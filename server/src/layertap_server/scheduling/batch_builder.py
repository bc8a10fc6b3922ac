"""A batch while it is formed: which inputs it may still take, by its tokens, depth, memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layertap_server.plan import OutputPlan
from layertap_server.scheduling.cost_model import CostModel
from layertap_server.scheduling.fair_queue import Ticket
from layertap_server.scheduling.memory_limit import MemoryLimit

# Time of the embeddings, in layers.
EMBEDDINGS = 0.5
# A request that batches have passed over this many times for its depth is then taken whatever its depth.
MAX_PASSED_OVER = 3


# Upper bound of the time of a batch's outputs, as a multiple of the time of the layers in a full batch.
MAX_OUTPUT_SHARE = 2.0


def depth_of(plan: OutputPlan, num_layers: int) -> float:
    """The part of the model, above 0 and up to 1, that has to run for the plan."""
    deepest = min(plan.num_layers_needed(num_layers), num_layers)
    return (deepest + EMBEDDINGS) / (num_layers + EMBEDDINGS)


def depths_to_batch(
    tokens_by_depth: Mapping[float, int], head: float, max_tokens: int, cost: CostModel
) -> tuple[float, float]:
    """The range of depths, including `head`, whose batch has the largest share of useful work.

    A batch runs as deep as its deepest text, so the further layers of its shallower texts are wasted. A batch
    of few tokens spends much of its time on the fixed time of each batch. The result is a narrow range when
    enough tokens of similar depth are queued, and a wide one otherwise. `tokens_by_depth` are the queued
    tokens.
    """
    if not tokens_by_depth.keys() - {head}:
        return head, head
    depths = sorted({head, *tokens_by_depth})
    best, best_share = (depths[0], depths[-1]), -1.0
    for low in (one for one in depths if one <= head):
        for high in (one for one in depths if one >= head):
            inside = {one: tokens_by_depth.get(one, 0) for one in depths if low <= one <= high}
            waiting = max(sum(inside.values()), 1)
            num_tokens = min(waiting, max_tokens)
            useful = sum(depth * count for depth, count in inside.items()) * num_tokens / waiting
            predicted = cost.predict(num_tokens, depth=high)
            share = useful * cost.per_token_ns / predicted if predicted else 0.0
            # Among equally good ranges, the widest is taken.
            if share > best_share or (share == best_share and high - low > best[1] - best[0]):
                best, best_share = (low, high), share
    return best


@dataclass(slots=True)
class Batch:
    """A batch while it is formed."""

    max_tokens: int
    max_ns: float
    memory_limit: MemoryLimit
    cost: CostModel
    tokens_by_depth: Mapping[float, int]
    num_tokens: int = 0
    num_bytes: int = 0
    output_ns: float = 0.0
    depth: float = 0.0
    depths: tuple[float, float] = (0.0, 1.0)

    def takes(self, ticket: Ticket) -> bool:
        """Adds the ticket's next input if it fits, and returns whether it did. The first input always
        fits."""
        work = ticket.works[ticket.next_work]
        num_tokens = self.num_tokens + work.num_tokens
        num_bytes = self.num_bytes + work.result_bytes
        output_ns = self.output_ns + self.cost.output_ns(work.cost)
        depth = max(self.depth, ticket.depth)
        if not self.num_tokens:
            self.depths = depths_to_batch(self.tokens_by_depth, ticket.depth, self.max_tokens, self.cost)
        elif num_tokens > self.max_tokens or not self.memory_limit.takes(num_tokens, num_bytes):
            return False
        elif (
            not self.depths[0] <= ticket.depth <= self.depths[1] and ticket.num_passed_over < MAX_PASSED_OVER
        ):
            ticket.num_passed_over += 1
            return False
        elif self._takes_too_long(num_tokens, depth, num_bytes, output_ns):
            return False
        self.num_tokens, self.num_bytes, self.depth = num_tokens, num_bytes, depth
        self.output_ns = output_ns
        return True

    @property
    def predicted_ns(self) -> float:
        """The predicted time if the whole engine computes the batch."""
        return self._predict(self.num_tokens, self.depth, self.num_bytes, self.output_ns)

    def _takes_too_long(self, num_tokens: int, depth: float, num_bytes: int, output_ns: float) -> bool:
        layers_ns = self.cost.per_token_ns * self.max_tokens
        if layers_ns and output_ns > MAX_OUTPUT_SHARE * layers_ns:
            return True
        return bool(self.max_ns) and self._predict(num_tokens, depth, num_bytes, output_ns) > self.max_ns

    def _predict(self, num_tokens: int, depth: float, num_bytes: int, output_ns: float) -> float:
        return self.cost.predict(num_tokens, depth=depth, num_bytes=num_bytes, output_ns=output_ns)

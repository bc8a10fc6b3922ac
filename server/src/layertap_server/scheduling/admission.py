"""Admission: a request is refused if it does not fit into the queue, or cannot be done before its
deadline."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from layertap_server.scheduling.cost_model import CostModel, Margin
from layertap_server.scheduling.fair_queue import FairQueue, Priority, Ticket

# When the queue is full, clients that hold less than their share of it may fill this part of its limit on
# top.
RESERVE = 0.25
# Deadlines are checked as if a request had at least the size of this many usual requests. This minimum is
# limited to this part of the work ahead of the request, so that it does not matter for a short deadline with
# little work ahead. Without it, only the shortest texts are accepted under overload: at three times capacity of
# 87 characters on average, with it of 126, where those that come have 147.
LEAST_JUDGED, AHEAD_SHARE = 2.0, 1 / 16
# Weight of the newest request in the moving average of sizes.
USUAL_WEIGHT = 1 / 64


class RefusedError(Exception):
    """The request was not admitted, and nothing of it was queued."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(RefusedError):
    """With this request, the queue would hold more tokens than it may."""


class DeadlineUnreachableError(RefusedError):
    """The request is predicted to be done only after its deadline."""


class ClosedError(RefusedError):
    """The engine is stopping, is started again, or is lost."""


@dataclass(slots=True)
class Admission:
    """Decides which requests one queue admits. Not thread-safe: the scheduler holds its lock."""

    queue: FairQueue
    max_queue_tokens: int
    cost: CostModel = field(default_factory=CostModel)
    margin: Margin = field(default_factory=Margin)
    # Moving average of the requests' sizes, in tokens at full depth; one larger than a batch counts as a
    # batch.
    usual_size: float = 0.0

    def admit(
        self,
        num_tokens: int,
        size: float,
        priority: Priority,
        client: str,
        *,
        now_ns: int,
        batch_tokens: int,
        running_ns: float,
        left_ns: float | None,
    ) -> float:
        """Returns the predicted nanoseconds until the answer, with the margin on all but the expected
        arrivals of others; infinity without a deadline, since nothing is checked then. Raises a
        `RefusedError`.

        `size` is in tokens at full depth, 0 where it is not known yet. `running_ns` is the predicted rest of
        the running batches. `left_ns` is the time until the deadline.

        The deadline is checked with a minimum size (`LEAST_JUDGED`). Under overload, capacity becomes free in
        small amounts. If each request were checked with its own size, the smallest requests would always take
        it first, and larger ones would never be admitted.
        """
        if size:
            self._note_size(min(size, batch_tokens))
        if self.queue.num_tokens and self.queue.num_tokens + num_tokens > self._room(client, num_tokens):
            wait_s = (running_ns + self.cost.predict_backlog(self.queue.size, batch_tokens)) / 1e9
            raise QueueFullError(
                f"the queue has {self.queue.num_tokens} of at most {self.max_queue_tokens} tokens, and this request "
                f"has {num_tokens}; try again in {wait_s:.3f} s",
                wait_s,
            )
        if left_ns is None:
            return math.inf
        ahead = self.queue.size_ahead(priority, client, size)
        judged_size = max(size, min(LEAST_JUDGED * self.usual_size, AHEAD_SHARE * ahead))
        ahead = self.queue.size_ahead(priority, client, judged_size)
        until = now_ns, max(left_ns, 0.0)
        more_ahead = self.queue.size_ahead(priority, client, judged_size, until) - ahead
        more_ns = self.cost.predict_backlog(more_ahead, batch_tokens)
        judged_ns = self._reckon(running_ns, ahead + judged_size, batch_tokens) + more_ns
        # An idle engine admits every request: if its cost estimate is wrong, only running batches can correct
        # it.
        is_idle = not self.queue.num_tokens and not running_ns
        if judged_ns > left_ns and not is_idle:
            raise DeadlineUnreachableError(
                f"the predicted time of {judged_ns / 1e9:.3f} s exceeds the time left; try again later, or set a later deadline",
                (running_ns + self.cost.predict_backlog(ahead, batch_tokens)) / 1e9,
            )
        return self._reckon(running_ns, ahead + size, batch_tokens) + more_ns

    def push(self, ticket: Ticket) -> None:
        """Queues the ticket of a request that `admit` has admitted."""
        self.queue.push(ticket)

    def _note_size(self, size: float) -> None:
        weight = USUAL_WEIGHT if self.usual_size else 1.0
        self.usual_size += weight * (size - self.usual_size)

    def _reckon(self, running_ns: float, size: float, batch_tokens: int) -> float:
        return (running_ns + self.cost.predict_backlog(size, batch_tokens)) * self.margin.factor

    def _room(self, client: str, num_tokens: int) -> float:
        """The tokens that the queue may hold, this request included."""
        room, queue = self.max_queue_tokens, self.queue
        if queue.num_tokens + num_tokens > room:
            held = queue.tokens_by_client
            num_others = len(held) - (client in held)
            share = room / (num_others + 1)
            if num_others and held.get(client, 0) + num_tokens < share:
                # The first client may hold more than the limit, since an empty queue admits a request of any
                # size.
                return max(room, held.get(queue.first_client, 0)) + RESERVE * room
        return room

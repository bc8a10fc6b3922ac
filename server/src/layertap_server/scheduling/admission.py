"""Who is let in: by the room in the queue, and by the time that an answer would take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from layertap_server.scheduling.cost_model import CostModel, Margin
from layertap_server.scheduling.fair_queue import NO_PENDING_LOAD, FairQueue, PendingLoad, Priority, Ticket

# A queue that others have filled takes this part more from clients that hold less than their share.
RESERVE = 0.25
# Whoever asks for less than so many usual requests is judged as if it were so much; by no more than this
# part of what is ahead of it, so that it is nothing to those with little time whom little keeps waiting.
LEAST_JUDGED, AHEAD_SHARE = 2.0, 1 / 16
# Weight of one request in what is usual.
USUAL_WEIGHT = 1 / 64


class RefusedError(Exception):
    """Not admitted: nothing of it was queued."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(RefusedError):
    """The queue holds as many tokens as it may."""


class DeadlineUnreachableError(RefusedError):
    """By prediction it would not be done in time."""


class ClosedError(RefusedError):
    """The engine is stopping, or gone."""


@dataclass(slots=True)
class Admission:
    """The door of one queue. Not thread-safe: the scheduler holds its lock."""

    queue: FairQueue
    max_queue_tokens: int
    cost: CostModel = field(default_factory=CostModel)
    margin: Margin = field(default_factory=Margin)
    # Of a request, in tokens at full depth; a giant counts as a batch.
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
        pending: PendingLoad = NO_PENDING_LOAD,
    ) -> float:
        """The nanoseconds to reckon with until the answer, infinitely many without a deadline: nothing is
        judged by them then. Raises a `RefusedError`.

        `size` is in tokens at full depth, 0 where it is not known yet; `running_ns` is what the engine still
        has to do for the batches it has, by prediction; `left_ns` is until the deadline; `coming` counts
        requests of the usual size that are about to be admitted.

        Above capacity room comes little by little, and was it judged by its own size, the smallest request
        would find it first each time, and the others none.
        """
        if size:
            self._note_size(min(size, batch_tokens))
        if self.queue.num_tokens and self.queue.num_tokens + num_tokens > self._room(client, num_tokens):
            wait_s = (running_ns + self.cost.predict_backlog(self.queue.size, batch_tokens)) / 1e9
            raise QueueFullError(
                f"the queue holds {self.queue.num_tokens} of at most {self.max_queue_tokens} tokens, and this "
                f"request has {num_tokens}; try again in {wait_s:.3f} s",
                wait_s,
            )
        if left_ns is None:
            return math.inf
        pending = {one: number * self.usual_size for one, number in pending.items()}
        ahead = self.queue.size_ahead(priority, client, size, pending)
        judged_size = max(size, min(LEAST_JUDGED * self.usual_size, AHEAD_SHARE * ahead))
        ahead = self.queue.size_ahead(priority, client, judged_size, pending)
        until = now_ns, max(left_ns, 0.0)
        more_ahead = self.queue.size_ahead(priority, client, judged_size, pending, until) - ahead
        more_ns = self.cost.predict_backlog(more_ahead, batch_tokens)
        judged_ns = self._reckon(running_ns, ahead + judged_size, batch_tokens) + more_ns
        # An idle engine takes what comes: were its estimate wrong, only running would mend it.
        is_idle = not self.queue.num_tokens and not running_ns
        if judged_ns > left_ns and not is_idle:
            raise DeadlineUnreachableError(
                f"it would take {judged_ns / 1e9:.3f} s by prediction, which is past the deadline",
                (running_ns + self.cost.predict_backlog(ahead, batch_tokens)) / 1e9,
            )
        return self._reckon(running_ns, ahead + size, batch_tokens) + more_ns

    def push(self, ticket: Ticket) -> None:
        """Of one that was admitted."""
        self.queue.push(ticket)

    def _note_size(self, size: float) -> None:
        weight = USUAL_WEIGHT if self.usual_size else 1.0
        self.usual_size += weight * (size - self.usual_size)

    def _reckon(self, running_ns: float, size: float, batch_tokens: int) -> float:
        return (running_ns + self.cost.predict_backlog(size, batch_tokens)) * self.margin.factor

    def _room(self, client: str, num_tokens: int) -> float:
        """Tokens that the queue may hold with this request in it."""
        room, queue = self.max_queue_tokens, self.queue
        if queue.num_tokens + num_tokens > room:
            held = queue.tokens_by_client
            num_others = len(held) - (client in held)
            share = room / (num_others + 1)
            if num_others and held.get(client, 0) + num_tokens < share:
                # Only an empty queue takes more of one client than it has room for.
                return max(room, held.get(queue.first_client, 0)) + RESERVE * room
        return room

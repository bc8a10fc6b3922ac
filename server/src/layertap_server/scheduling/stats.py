"""Counters of one engine's scheduler since the start, which `metrics` exports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stats:
    """Totals since the start; they only grow."""

    num_admitted: int = 0
    num_answered: int = 0
    num_failed: int = 0
    num_batches: int = 0
    num_failed_batches: int = 0
    num_inputs: int = 0
    num_tokens: int = 0
    # The sum of the token limits of those batches.
    room_tokens: int = 0
    busy_ns: int = 0
    # The sum of the times from submission to the first batch, over all requests that reached one; and their
    # number.
    queue_ns: int = 0
    num_started: int = 0
    num_result_bytes: int = 0
    # By cause and stage: `cancelled` while `queued`, `running` or `sending`; `late` while `queued`.
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count_batch(
        self, num_inputs: int, num_tokens: int, room_tokens: int, elapsed_ns: int, num_bytes: int
    ) -> None:
        self.num_batches += 1
        self.num_inputs += num_inputs
        self.num_tokens += num_tokens
        self.room_tokens += max(room_tokens, num_tokens)
        self.busy_ns += elapsed_ns
        self.num_result_bytes += num_bytes

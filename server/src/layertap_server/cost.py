"""What a batch costs in time, learnt from the batches that ran."""

from __future__ import annotations

from dataclasses import dataclass

# Weight of the past against one new batch: some fifty batches back counts for a third.
DECAY = 0.98
# A batch that took this many times its prediction was disturbed, and teaches less.
MAX_SURPRISE = 4.0


@dataclass(slots=True)
class CostModel:
    """time = fixed + per_token · tokens, by exponentially weighted least squares."""

    fixed_ns: float = 0.0
    per_token_ns: float = 0.0
    _weight: float = 0.0
    _tokens: float = 0.0
    _ns: float = 0.0
    _tokens_tokens: float = 0.0
    _tokens_ns: float = 0.0

    def observe(self, num_tokens: int, elapsed_ns: int) -> None:
        predicted = self.predict(num_tokens, num_batches=1)
        ns = min(float(elapsed_ns), MAX_SURPRISE * predicted) if predicted > 0 else float(elapsed_ns)
        self._weight = DECAY * self._weight + 1
        self._tokens = DECAY * self._tokens + num_tokens
        self._ns = DECAY * self._ns + ns
        self._tokens_tokens = DECAY * self._tokens_tokens + num_tokens * num_tokens
        self._tokens_ns = DECAY * self._tokens_ns + num_tokens * ns
        mean_tokens, mean_ns = self._tokens / self._weight, self._ns / self._weight
        variance = self._tokens_tokens / self._weight - mean_tokens**2
        covariance = self._tokens_ns / self._weight - mean_tokens * mean_ns
        # Batches all of one size say nothing of the slope: then all of the time is the tokens'.
        slope = covariance / variance if variance > 1e-3 * mean_tokens**2 else mean_ns / mean_tokens
        self.per_token_ns = min(max(slope, 0.0), mean_ns / mean_tokens)
        self.fixed_ns = max(mean_ns - self.per_token_ns * mean_tokens, 0.0)

    def predict(self, num_tokens: int, *, num_batches: int) -> float:
        """Nanoseconds for so many tokens in so many batches; 0 before the first observation."""
        return self.fixed_ns * num_batches + self.per_token_ns * num_tokens

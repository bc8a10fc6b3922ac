"""What fits into memory at once, learnt from the batches that did not."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A batch that did not fit is not tried again: the next ones hold this part of it, at most,
SHRINK = 0.75
# and each that fits lets the following be so much larger: some 300 batches back to where it failed.
GROWTH = 1.001


@dataclass(slots=True)
class MemoryLimit:
    """Tokens and result bytes that a batch may hold; without bound until one has failed."""

    max_tokens: float = math.inf
    max_bytes: float = math.inf
    num_failures: int = 0
    # The most that did fit.
    _fitted_tokens: float = 0.0
    _fitted_bytes: float = 0.0

    def __str__(self) -> str:
        limits = ((self.max_tokens, "tokens"), (self.max_bytes, "bytes of results"))
        return " and ".join(f"at most {limit:.0f} {what}" for limit, what in limits if limit < math.inf)

    def takes(self, num_tokens: int, num_bytes: int) -> bool:
        return num_tokens <= self.max_tokens and num_bytes <= self.max_bytes

    def fitted(self, num_tokens: int, num_bytes: int) -> None:
        self._fitted_tokens = max(self._fitted_tokens, num_tokens)
        self._fitted_bytes = max(self._fitted_bytes, num_bytes)
        self.max_tokens *= GROWTH
        self.max_bytes *= GROWTH

    def failed(self, num_tokens: int, num_bytes: int) -> None:
        """Blames the tokens, the bytes, or both: not those of which more have fitted."""
        self.num_failures += 1
        tokens_fitted, bytes_fitted = self._fitted_tokens >= num_tokens, self._fitted_bytes >= num_bytes
        if not tokens_fitted or bytes_fitted:
            self.max_tokens = self._fitted_tokens = SHRINK * min(num_tokens, self.max_tokens)
        if not bytes_fitted or tokens_fitted:
            self.max_bytes = self._fitted_bytes = SHRINK * min(num_bytes, self.max_bytes)

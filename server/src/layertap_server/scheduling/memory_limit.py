"""Limits a batch to what fits into memory, learnt from batches that ran out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

# After a batch that did not fit, the next ones are limited to this part of its size.
SHRINK = 0.75
# With each batch that fits, the limit grows by this factor: it takes some 300 batches to reach the size that
# failed.
GROWTH = 1.001


@dataclass(slots=True)
class MemoryLimit:
    """The tokens and the result bytes that a batch may hold; unlimited until a batch has failed.

    The two are apart because a few tokens may have large results: such a batch would otherwise limit all that
    follow to as few tokens, and each batch has its fixed time.
    """

    max_tokens: float = math.inf
    max_bytes: float = math.inf
    num_failures: int = 0
    # The largest that have fitted.
    _fitted_tokens: float = 0.0
    _fitted_bytes: float = 0.0

    def __str__(self) -> str:
        limits = ((self.max_tokens, "tokens"), (self.max_bytes, "bytes of results"))
        return " and ".join(f"{limit:.0f} {what}" for limit, what in limits if limit < math.inf)

    def takes(self, num_tokens: int, num_bytes: int) -> bool:
        return num_tokens <= self.max_tokens and num_bytes <= self.max_bytes

    def fitted(self, num_tokens: int, num_bytes: int) -> None:
        self._fitted_tokens = max(self._fitted_tokens, num_tokens)
        self._fitted_bytes = max(self._fitted_bytes, num_bytes)
        self.max_tokens *= GROWTH
        self.max_bytes *= GROWTH

    def failed(self, num_tokens: int, num_bytes: int) -> None:
        """Lowers the limit of the tokens, of the bytes, or of both after a batch that did not fit. Where as
        many of one have fitted before, only the other is lowered; if that is so for both, both are."""
        self.num_failures += 1
        tokens_fitted, bytes_fitted = self._fitted_tokens >= num_tokens, self._fitted_bytes >= num_bytes
        if not tokens_fitted or bytes_fitted:
            self.max_tokens = self._fitted_tokens = SHRINK * min(num_tokens, self.max_tokens)
        if not bytes_fitted or tokens_fitted:
            self.max_bytes = self._fitted_bytes = SHRINK * min(num_bytes, self.max_bytes)

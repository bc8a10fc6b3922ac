"""The contact map of a protein, from the attention maps of all layers and heads.

The regression of ESM's contact head is linear over the maps, so each layer's share is added up as soon as its
maps are there: a pass never holds more than the maps of a few heads of one layer. Source: transformers'
`EsmContactPredictionHead` and `EsmModel.predict_contacts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from layertap_server.engine.attention_maps import MAP_SCRATCH_BYTES, MapTap
from layertap_server.engine.transfer import to_device
from layertap_server.plan import NUM_OUTER_TOKENS, Work


@dataclass(frozen=True, slots=True)
class ContactHead:
    """The weights of a model's contact head: a logistic regression over its attention maps."""

    # (L, A), float32, on the model's device.
    weights: torch.Tensor
    bias: float
    # Maps count as 0 where the query or the key is this token.
    eos_id: int

    def taps(self, work: Work, text: int, start: int, end: int, sums: torch.Tensor) -> list[ContactTap]:
        """One tap for each layer, which adds to `sums`: (T-2, T-2), float32. The text covers the rows [start,
        end) of its packing."""
        is_kept = work.input_ids != self.eos_id
        kept = None
        # The first and the last token are left out in any case.
        if not is_kept[1:-1].all():
            kept = to_device(is_kept, self.weights.device).float()
        heads = tuple(range(self.weights.shape[1]))
        return [
            ContactTap(text, start, end, heads, None, False, sums, coefficients=of_layer, kept=kept)
            for of_layer in self.weights
        ]

    def probabilities(self, sums: torch.Tensor) -> torch.Tensor:
        """The contact map, in place of the sums over all maps."""
        return sums.add_(self.bias).sigmoid_()


@dataclass(frozen=True, slots=True)
class ContactTap(MapTap):
    """The share of one layer in the contact map of one text; it is added to `target`, (T-2, T-2) float32."""

    # (heads,) the weight of each head's map.
    coefficients: torch.Tensor | None = None
    # (T,) 0 for the tokens whose rows and columns count as 0, and 1 for all others; None: there are none.
    kept: torch.Tensor | None = None

    @property
    def is_direct(self) -> bool:
        return False

    @property
    def scratch_bytes(self) -> int:
        return self.num_queries * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return len(self.heads) * (self.end - self.start) * 4

    @property
    def num_queries(self) -> int:
        return self.end - self.start

    def pieces(self, max_bytes: int) -> Iterator[MapTap]:
        """Splits the tap by head, since a map is needed as a whole. The division does not depend on the other
        texts of the batch, and so neither do the bits of the sums."""
        assert self.coefficients is not None
        num_heads = max(MAP_SCRATCH_BYTES // (4 * self.num_queries**2), 1)
        for first in range(0, len(self.heads), num_heads):
            some = slice(first, first + num_heads)
            yield replace(self, heads=self.heads[some], coefficients=self.coefficients[some])

    def write(self, weights: torch.Tensor) -> None:
        """Adds the share of these maps, (heads, T, T): symmetric, and less the average product.

        Of a map m, s = m + mᵀ, less r·rᵀ / Σr with the row sums r of s. May change `weights` in place.
        """
        assert self.coefficients is not None
        weights = weights.float()
        if self.kept is not None:
            weights = weights.mul_(self.kept[:, None]).mul_(self.kept)
        inner = weights[:, 1:-1, 1:-1]
        sums = inner.sum(-1) + inner.sum(-2)  # (heads, T-2)
        shares = self.coefficients / sums.sum(-1)
        weighted = (self.coefficients @ weights.flatten(1)).view(weights.shape[1:])[1:-1, 1:-1]
        self.target.add_(weighted).add_(weighted.T).addmm_((sums * shares[:, None]).T, sums, alpha=-1)


def contact_bytes(num_tokens: int) -> int:
    """Bytes that a text's contact map needs in addition to its result: the sums, the maps of some heads and
    of one layer's share."""
    size = 4 * max(num_tokens - NUM_OUTER_TOKENS, 0) ** 2
    return 2 * size + max(MAP_SCRATCH_BYTES, 4 * num_tokens**2) + 3 * 4 * num_tokens**2

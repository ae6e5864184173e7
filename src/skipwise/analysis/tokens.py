"""Token-wise similarity: how like a token's state is to those of its neighbours, by distance and depth.

Source: "Skip to the Good Part" (arXiv 2603.07475), token-wise analysis and recency bias; what the text leaves open is
defined here. A cosine is symmetric, so that the mean over all pairs at a distance is that of left and right neighbours
alike, and a causal and a bidirectional model are compared on the same pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from skipwise.analysis.sums import Sums

NEAR = 4  # the near past: distances 1 to 4
SHORTEST = 2 * NEAR + 2  # tokens of a text whose far context (half its length away or more) is apart from the near past


class TokenStatistics(Sums):
    """Sums over pairs of tokens of one text, at each boundary state. Texts shorter than SHORTEST are left out."""

    def __init__(self, states: int, distances: int):
        super().__init__(near=(states, distances), pairs=(distances,), far=(states,), far_pairs=())

    def add(self, states: Tensor) -> None:
        """states: (n, batch, length, width) of whole texts."""
        batch, length = states.shape[1:3]
        if length < SHORTEST:
            return
        cosines = torch.stack([_by_distance(state) for state in states]).cpu()  # (n, length)
        pairs = batch * torch.arange(length, 0, -1, dtype=torch.float64)
        half = -(-length // 2)
        reach = min(self.totals["pairs"].shape[0], length - 1)
        self.totals["near"][:, :reach] += cosines[:, 1 : reach + 1]
        self.totals["pairs"][:reach] += pairs[1 : reach + 1]
        self.accumulate(far=cosines[:, half:].sum(1), far_pairs=pairs[half:].sum())

    @property
    def similarity(self) -> Tensor:
        """(n, distances): mean cosine of two tokens' states at distances 1, 2, ...; NaN where no text is as long."""
        return self.totals["near"] / self.totals["pairs"]

    @property
    def far(self) -> Tensor:
        """(n,): mean cosine at distances of half the text's length or more."""
        return self.totals["far"] / self.totals["far_pairs"]

    @property
    def recency(self) -> Tensor:
        """(n,): see `recency_index`."""
        return recency_index(self.similarity, self.far)


def _by_distance(state: Tensor) -> Tensor:
    """(length,) float64: over all pairs of one text's tokens, cosines summed by distance; state: (batch, length, d)."""
    length = state.shape[1]
    unit = F.normalize(state.float(), dim=-1, eps=1e-12).transpose(0, 1).flatten(1)  # (length, batch * d)
    cosines = (unit @ unit.T).double().tril()
    place = torch.arange(length, device=state.device)
    sums = cosines.new_zeros(length)
    return sums.index_add_(0, (place[:, None] - place).clamp_min(0).flatten(), cosines.flatten())


def recency_index(similarity: Tensor, far: Tensor) -> Tensor:
    """(n,): (near - far) / (1 - far), near the mean similarity (n, distances) at distances 1 to NEAR, far (n,).

    How much of the way from the similarity to far context (0) to identity (1) the near past covers. States that share a
    component (anisotropy) have cosines a + (1 - a) s instead of s; the index is the same for both, so that models and
    layers of different anisotropy can be compared. 0 where all states are one.
    """
    near = similarity[:, :NEAR].mean(1)
    return (near - far) / (1 - far).clamp_min(1e-9)

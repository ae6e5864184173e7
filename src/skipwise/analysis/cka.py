"""Linear CKA between boundary states, streamed over small groups of tokens.

Centred kernel alignment (Kornblith et al., arXiv 1905.00414) says how alike two sets of representations are whatever
the rotation and scale. In feature space it needs the d x d cross covariance of every pair of layers, which no machine
holds for an 8B model. So we use the minibatch form of Nguyen et al. (arXiv 2010.15327): the unbiased HSIC_1 (Song et
al., 2012) of token Gram matrices over groups of a fixed number of tokens, averaged over the groups before the ratio. It
does not depend on the group size in expectation, and memory depends on it alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skipwise.analysis.sums import Sums

GROUP = 32  # tokens
POOL = 128  # tokens that they are picked from, so that neighbours are seldom picked
SMALLEST = 4  # tokens that an unbiased estimate needs


def unbiased_hsic(grams: Tensor) -> Tensor:
    """(groups, n, n): HSIC_1 of every pair of n Gram matrices; grams: (groups, n, tokens, tokens), tokens >= 4."""
    tokens = grams.shape[-1]
    kernels = grams.clone()
    kernels.diagonal(dim1=-2, dim2=-1).zero_()
    rows = kernels.sum(-1)  # (groups, n, tokens)
    totals = rows.sum(-1)  # (groups, n)
    flat = kernels.flatten(2)
    trace = flat @ flat.mT
    mean = totals[:, :, None] * totals[:, None] / ((tokens - 1) * (tokens - 2))
    cross = rows @ rows.mT * (2 / (tokens - 2))
    return (trace + mean - cross) / (tokens * (tokens - 3))


class CKA(Sums):
    """Sums over token groups of the HSIC_1 of every pair of `states` representations."""

    def __init__(self, states: int):
        super().__init__(tokens=(), hsic=(states, states))

    def add(self, states: Sequence[Tensor], texts: int) -> None:
        """states: n tensors (batch, length, width), of which every `texts` texts on end are one source of tokens.

        A group is GROUP tokens evenly spread over its texts, or all where they have fewer; groups weigh by tokens.
        """
        batch, length, width = states[0].shape
        whole = batch // texts * texts
        for start, end, count in ((0, whole, texts), (whole, batch, batch - whole)):
            tokens = count * length
            if start < end and tokens >= SMALLEST:
                picked = torch.linspace(0, tokens - 1, min(GROUP, tokens)).long().to(states[0].device)
                sources = (state[start:end].reshape(-1, tokens, width) for state in states)
                self._add(torch.stack([source.index_select(1, picked) for source in sources], dim=1))

    def _add(self, states: Tensor) -> None:
        """states: (groups, n, tokens, width)."""
        tokens = states.shape[2]
        states = states.float()
        # HSIC_1 does not mind a shift of all tokens, but float32 does
        states = states - states.mean(2, keepdim=True)
        hsic = unbiased_hsic(states @ states.mT)
        self.accumulate(tokens=tokens * hsic.shape[0], hsic=hsic.sum(0) * tokens)

    @property
    def cka(self) -> Tensor | None:
        """(n, n): 1 on the diagonal, about 0 for unrelated states, and 0 where a state is the same for all tokens.

        None before any group.
        """
        if not self.totals["tokens"]:
            return None
        hsic = self.totals["hsic"] / self.totals["tokens"]
        own = hsic.diagonal()
        return hsic / (own[:, None] * own).clamp_min(torch.finfo(torch.float64).tiny).sqrt()


def texts_a_group(length: int) -> int:
    """How many texts of `length` tokens one group is picked from: POOL tokens or more."""
    return -(-POOL // length)

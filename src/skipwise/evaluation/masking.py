"""Which tokens of a target are masked when its likelihood under a masked diffusion model is estimated.

The bound that is estimated is LLaDA's (Nie et al., arXiv 2502.09992, eq. 6): mask x of the target's n tokens, x uniform
in 1..n and the x tokens uniform too, and weigh the masked tokens' log-probabilities by n / x.
"""

import math
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch

DREAM_EPSILON = 1e-3  # the least noise level that Dream's evaluation draws


class Noised(NamedTuple):
    """A noised target, by positions in the target. The estimate is the sum of weight * log p(scored) over all of them.

    masked: positions that hold the mask token; scored: those of them whose log-probability counts.
    """

    masked: tuple[int, ...]
    scored: tuple[int, ...]
    weight: float


def every_mask(length: int) -> Iterator[Noised]:
    """All 2^length - 1 masks with their probabilities: the bound itself, without an error of sampling."""
    for size in range(1, length + 1):
        weight = 1 / (size * math.comb(length, size))  # P(mask) * n / x = 1 / n / C(n, x) * n / x
        for masked in combinations(range(length), size):
            yield Noised(masked, masked, weight)


def stratified_masks(length: int, count: int, generator: torch.Generator) -> Iterator[Noised]:
    """`count` masks whose sizes are spread evenly over 1..length from a random start, so that each size is uniform."""
    start = int(torch.randint(length, (), generator=generator))
    sizes = [(start + j * length // count) % length + 1 for j in range(count)]
    orders = torch.rand(count, length, generator=generator).argsort(1)
    for size, order in zip(sizes, orders.tolist(), strict=True):
        masked = tuple(sorted(order[:size]))
        yield Noised(masked, masked, length / size / count)


def chain_masks(length: int) -> Iterator[Noised]:
    """The exact log-likelihood of decoding from left to right: row i masks all from i on and scores i."""
    for i in range(length):
        yield Noised(tuple(range(i, length)), (i,), 1.0)


def llada_masks(length: int, count: int, batch: int, generator: torch.Generator) -> Iterator[Noised]:
    """LLaDA's evaluation, draw for draw: one k a batch, sizes by a rounded linspace from k on, a permutation a row."""
    for _ in range(count // batch):
        k = int(torch.randint(1, length + 1, (), generator=generator))
        spread = torch.linspace(float(k), k + (batch - 1) * (length / batch), steps=batch).round().long()
        for size in ((spread - 1) % length + 1).tolist():
            masked = tuple((torch.randperm(length, generator=generator) < size).nonzero()[:, 0].tolist())
            yield Noised(masked, masked, length / size / count)


def dream_masks(prefix: int, length: int, count: int, batch: int, generator: torch.Generator) -> Iterator[Noised]:
    """Dream's evaluation, draw for draw: noise levels (u + j / batch) mod 1, each token masked on its own.

    The draws are over the prefix, the target and one end-of-text token after it; the first and the last token of the
    whole are never masked. A row may mask nothing.
    """
    batches = max(count // batch, 1)
    for _ in range(batches):
        levels = (torch.rand(1, generator=generator) + torch.arange(batch).float() / batch) % 1
        chances = (1 - DREAM_EPSILON) * levels + DREAM_EPSILON
        hit = torch.rand((batch, prefix + length + 1), generator=generator) < chances[:, None]
        hit[:, 0] = False
        for row, chance in zip(hit[:, prefix : prefix + length], chances.tolist(), strict=True):
            masked = tuple(row.nonzero()[:, 0].tolist())
            yield Noised(masked, masked, 1 / chance / batch / batches)

"""How varied a model's texts are: the entropy of a sample's tokens, and the share of n-grams that are distinct."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from skipwise.errors import UserError


def token_entropy(ids: Sequence[int]) -> float:
    """Entropy, in nats, of the token counts within one sample; 0 for an empty one.

    At most log(len(ids)), so that a short sample has a low one. Source: MDLM's evaluation (arXiv 2406.07524).
    """
    counts = np.array([*Counter(ids).values()])
    shares = counts / len(ids)
    return float(-(shares * np.log(shares)).sum()) if len(ids) else 0.0


def distinct(ids: Sequence[int], n: int = 2) -> float:
    """Share of distinct n-grams within one sample (Li et al., arXiv 1510.03055); 0 where it has no n-gram."""
    if n < 1:
        raise UserError(f"n={n}; an n-gram has at least one token.")
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0

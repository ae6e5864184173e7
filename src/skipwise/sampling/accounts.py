"""What forwards took, by model: FLOPs by formula, of the forwards that were really made.

The head is counted for the positions that it ran on, which are those that a token could be committed at.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache

from skipwise.cost import Price, Prices, price_blocks
from skipwise.examples import Size
from skipwise.sampling.denoiser import Denoiser, Forward


@dataclass(frozen=True)
class Share:
    """forwards: calls; rows: sequences that they saw; FLOPs of the blocks alone and of all; whole_all_in_flops: what
    the same forwards of the plan's own model, with logits at the same positions, would have taken with no block
    skipped.
    """

    forwards: int = 0
    rows: int = 0
    block_flops: int = 0
    all_in_flops: int = 0
    whole_all_in_flops: int = 0

    def __add__(self, other: "Share") -> "Share":
        return Share(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Share)))


Shares = dict[str | None, Share]  # by the name that the plan gives a model; None is the plan's own


def shares(forwards: Iterable[Forward], prices_of: Callable[[str | None, int], Prices]) -> Shares:
    """The share of each model that ran. prices_of: a model's name and a number of tokens -> its prices for one row."""
    found: Shares = {}
    prices_of = cache(prices_of)
    for forward in forwards:
        name, cut, rows = forward.running.model, forward.running.cut, forward.rows
        prices, gone = prices_of(name, forward.tokens), (cut.skipped, cut.linear)
        blocks = rows * _attending(forward, prices.of_blocks(*gone))
        all_in = blocks + _outside(forward, prices)
        own = prices_of(None, forward.tokens)
        whole = rows * _attending(forward, own.of_blocks()) + _outside(forward, own)
        found[name] = found.get(name, Share()) + Share(1, rows, blocks, all_in, whole)
    return found


def _attending(forward: Forward, price: Price) -> int:
    """FLOPs of blocks whose tokens attended to the forward's keys; `price` is of as many tokens among themselves."""
    if forward.keys == forward.tokens:
        return price.flops
    return price.flops + price.attention_flops * (forward.keys - forward.tokens) // forward.tokens


def _outside(forward: Forward, prices: Prices) -> int:
    """FLOPs of all that is no block."""
    whole = forward.rows * prices.outside.flops
    if forward.predicted is None or not prices.head.flops:
        return whole
    unused = forward.rows * forward.tokens - forward.predicted
    return whole - unused * prices.head.flops // forward.tokens


def account(denoiser: Denoiser) -> Shares:
    """The share of each model that a denoiser ran."""
    return shares(denoiser.forwards, lambda name, tokens: price_blocks(denoiser.named(name), Size(tokens=tokens)))

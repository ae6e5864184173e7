"""What forwards took, by model: FLOPs by formula, of the forwards that were really made.

The head is counted for the positions that it ran on, which are those that a token could be committed at. Blocks are
counted whole, so that a plan saves the same fraction of them however it is decoded; what the last one was spared is
told apart.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, cast

from skipwise.cost import Price, Prices, price_blocks
from skipwise.examples import Size
from skipwise.sampling.denoiser import Denoiser, Forward
from skipwise.skipping import whole


@dataclass(frozen=True)
class Share:
    """forwards: calls; rows: sequences that they saw; FLOPs of the blocks alone and of all; whole_all_in_flops: what
    the same forwards of the plan's own model, with logits at the same positions, would have taken with no block
    skipped; spared_flops: those that were not taken, as the last block ran for some positions alone
    (`skipwise.models.lean`), or as an earlier forward had made the same.
    """

    forwards: int = 0
    rows: int = 0
    block_flops: int = 0
    all_in_flops: int = 0
    whole_all_in_flops: int = 0
    spared_flops: int = 0

    def __add__(self, other: "Share") -> "Share":
        return Share(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Share)))


Shares = dict[str | None, Share]  # by the name that the plan gives a model; None is the plan's own


def shares(
    forwards: Iterable[Forward],
    prices_of: Callable[[str | None, int], Prices],
    spared_by: Callable[[str | None, Forward], int] = lambda name, forward: 0,
) -> Shares:
    """The share of each model that ran. prices_of: a model's name and a number of tokens -> its prices for one row;
    spared_by: its name and a forward -> FLOPs that its last block was spared in that.
    """
    found: Shares = {}
    prices_of = cache(prices_of)

    @cache  # a generation has many forwards and few kinds of them
    def of_blocks(name: str | None, tokens: int, *gone: tuple[tuple[str, frozenset[int]], ...]) -> Price:
        return prices_of(name, tokens).of_blocks(*map(dict, gone))

    for forward in forwards:
        name, tokens, cut, rows = forward.running.model, forward.tokens, forward.running.cut, forward.rows
        price = of_blocks(name, tokens, tuple(cut.skipped.items()), tuple(cut.linear.items()))
        blocks = rows * _attending(forward, price)
        all_in = blocks + _outside(forward, prices_of(name, tokens))
        uncut = rows * _attending(forward, of_blocks(None, tokens)) + _outside(forward, prices_of(None, tokens))
        taken = Share(1, rows, blocks, all_in, uncut, spared_by(name, forward))
        found[name] = found.get(name, Share()) + taken
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
    lengths = {forward.keys for forward in denoiser.forwards}

    def prices(name: str | None, tokens: int) -> Prices:
        found = price_blocks(denoiser.named(name), Size(tokens=tokens if tokens in lengths else max(lengths)))
        # of a cache: windows may be of any number of tokens, and pricing takes as long as a forward of a small model
        return found if tokens in lengths else found.at(tokens, price_blocks(denoiser.named(name), Size(tokens=1)))

    @cache
    def each(name: str | None, rows: int, keys: int) -> int:
        model = cast(Any, denoiser.named(name))
        with whole(model):  # a plan may skip all blocks by now
            return model.spared(rows, keys)

    def spared(name: str | None, forward: Forward) -> int:
        unwanted = forward.rows * forward.tokens - (forward.predicted or 0) if forward.narrowed else 0
        return forward.known_flops + (unwanted * each(name, forward.rows, forward.keys) if unwanted else 0)

    return shares(denoiser.forwards, prices, spared)

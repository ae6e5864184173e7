"""What a denoiser's forwards took, by model: FLOPs by formula, of the forwards that were really made."""

from dataclasses import dataclass, fields

from skipwise.cost import price_blocks
from skipwise.examples import Size
from skipwise.sampling.denoiser import Denoiser


@dataclass(frozen=True)
class Share:
    """forwards: calls; rows: sequences that they saw; FLOPs of the blocks alone and of all; whole_all_in_flops: what
    the same forwards of the plan's own model would have taken with no block skipped.
    """

    forwards: int = 0
    rows: int = 0
    block_flops: int = 0
    all_in_flops: int = 0
    whole_all_in_flops: int = 0

    def __add__(self, other: "Share") -> "Share":
        return Share(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Share)))


def account(denoiser: Denoiser, tokens: int) -> dict[str | None, Share]:
    """The share of each model that ran, by the name that the plan gives it; None is the plan's own. tokens: a row's."""
    size = Size(tokens=tokens)
    shares: dict[str | None, Share] = {}
    whole = price_blocks(denoiser.model, size).forward().flops
    for forward in denoiser.forwards:
        running, rows = forward.running, forward.rows
        prices = price_blocks(denoiser.module(running), size)
        cut = (running.cut.skipped, running.cut.linear)
        made = Share(1, rows, rows * prices.of_blocks(*cut).flops, rows * prices.forward(*cut).flops, rows * whole)
        shares[running.model] = shares.get(running.model, Share()) + made
    return shares

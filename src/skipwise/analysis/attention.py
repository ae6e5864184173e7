"""Attention mass by distance, streamed: where each block's attention goes, and how much it prefers the near past.

Ours, beside the token-wise similarities of "Skip to the Good Part" (arXiv 2603.07475). Weights are read off the
attention modules of a transformers model that is switched to its "eager" implementation meanwhile; a model that
computes attention without showing weights (the native MDLM) has none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipwise.analysis.sums import Sums
from skipwise.analysis.tokens import NEAR, SHORTEST

SINK = 1  # first tokens that are no context: attention that has nowhere to go is parked there (arXiv 2309.17453)


class AttentionStatistics(Sums):
    """Sums over heads and queries of attention weights, block by block. longest: tokens of the longest text."""

    def __init__(self, blocks: int, longest: int):
        self.bins = (longest - 1).bit_length()  # on each side: 1, 2-3, 4-7, 8-15, ...
        super().__init__(
            mass=(blocks, 2 * self.bins + 1),
            sink=(blocks,),
            queries=(blocks,),
            near=(blocks,),
            far=(blocks,),
            late_queries=(blocks,),
        )

    def add(self, block: int, weights: Tensor) -> None:
        """weights: (batch, heads, length, length), rows (queries) sum to 1, of whole texts."""
        batch, heads, length = weights.shape[:3]
        mass = weights.sum((0, 1), dtype=torch.float64).cpu() / heads  # (length, length)
        offsets = torch.arange(length) - torch.arange(length)[:, None]  # key - query
        self.totals["mass"][block].index_add_(0, self._bin(offsets).flatten(), mass.flatten())
        self.totals["sink"][block] += mass[:, :SINK].sum()
        self.totals["queries"][block] += batch * length
        if length >= SHORTEST:
            half = -(-length // 2)
            late = torch.arange(length)[:, None] > half  # queries that have a far context after the sink
            context = late & (torch.arange(length) >= SINK)
            self.totals["near"][block] += _density(mass, context & (offsets < 0) & (offsets >= -NEAR))
            self.totals["far"][block] += _density(mass, context & (offsets <= -half))
            self.totals["late_queries"][block] += batch * late.sum()

    def _bin(self, offsets: Tensor) -> Tensor:
        """Column of each offset: the farthest past first, the query itself in the middle."""
        size = torch.floor(torch.log2(offsets.abs().clamp_min(1).double())).long() + 1
        return self.bins + offsets.sign() * size

    @property
    def offsets(self) -> Tensor:
        """(2 * bins + 1, 2): nearest and farthest (key - query) of each column, negative for the past."""
        ahead = torch.tensor([[2.0**i, 2.0 ** (i + 1) - 1] for i in range(self.bins)], dtype=torch.float64)
        return torch.cat([-ahead.flip(0), torch.zeros(1, 2, dtype=torch.float64), ahead])

    @property
    def mass(self) -> Tensor:
        """(blocks, 2 * bins + 1): mean attention mass of a query by offset; rows sum to 1."""
        return self.totals["mass"] / self.totals["queries"][:, None]

    @property
    def sink(self) -> Tensor:
        """(blocks,): mean attention mass on a text's first token."""
        return self.totals["sink"] / self.totals["queries"]

    @property
    def recency(self) -> Tensor:
        """(blocks,): (near - far) / (near + far), from 1 (only the near past) over 0 (no preference) to -1.

        near: mean weight of a key 1 to NEAR tokens back; far: of a key at least half the text back; both a key, so that
        it does not matter that there are more far ones, and both for the same queries, those of the second half. Only
        the past counts and the first token is left out (the sink), so that what a bidirectional model gives to the
        future, or any model to the sink, cancels. NaN where no text has SHORTEST tokens.
        """
        near, far = self.totals["near"], self.totals["far"]
        return (near - far) / (near + far)

    def tensors(self) -> dict[str, Tensor]:
        """What was measured, by the names of `Analysis`; nothing where a block has shown no weights."""
        if not self.totals["queries"].all():
            return {}
        found = {"attention_mass": self.mass, "attention_offsets": self.offsets, "attention_sink": self.sink}
        return found | ({"attention_recency": self.recency} if self.totals["late_queries"].all() else {})


def _density(mass: Tensor, keys: Tensor) -> Tensor:
    """Sum over queries of the mean mass (queries, keys) of the keys that are marked for the query."""
    count = keys.sum(1)
    return ((mass * keys).sum(1) / count.clamp_min(1)).sum()


@contextmanager
def watching(model: nn.Module, blocks: nn.ModuleList, statistics: AttentionStatistics) -> Iterator[None]:
    """Within this, every forward of the model adds its attention weights to the statistics."""
    with _eager(model):
        handles = [hook for i, block in enumerate(blocks) for hook in _watch(block, i, statistics)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _watch(block: nn.Module, number: int, statistics: AttentionStatistics) -> list[Any]:
    """Hooks on the block's modules. The weights are the first thing of their shape that any of them returns."""
    open_ = [True]

    def enter(*_: Any) -> None:
        open_[0] = True

    def leave(module: nn.Module, args: tuple, result: Any) -> None:
        for item in result[1:] if open_[0] and isinstance(result, tuple) else ():
            if isinstance(item, Tensor) and item.ndim == 4 and item.shape[-1] == item.shape[-2]:
                open_[0] = False
                statistics.add(number, item)
                return

    inner = [module.register_forward_hook(leave) for module in block.modules() if module is not block]
    return [block.register_forward_pre_hook(enter), *inner]


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Switch a transformers model to the attention that returns its weights, and back."""
    config = getattr(model, "config", None)
    if not hasattr(model, "set_attn_implementation") or config is None:
        yield
        return
    parts = {key: getattr(config, key, None) for key in getattr(config, "sub_configs", {})}
    before = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    before[""] = config._attn_implementation
    switch = cast(Callable[[Any], None], model.set_attn_implementation)
    switch("eager")
    try:
        yield
    finally:
        switch(before)

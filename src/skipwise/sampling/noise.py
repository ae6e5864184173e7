"""Uniform noise that a row of a batch draws whatever its neighbours and its padding are."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """Every row has its own seed, every draw of a row its own number, and positions are counted from the right end.

    So row r of a batch under seed s draws what a batch of one draws under seed s + r, padded on the left or not.
    """

    def __init__(self, seed: int, rows: int, device: torch.device):
        self.seeds = [seed + row for row in range(rows)]
        self._generator = torch.Generator(device)
        self._device = device

    def uniform(
        self, draws: Sequence[int], *shape: int, rows: Sequence[int] | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """(len(draws), *shape) in [0, 1): one draw for each of `rows` (all of them by default), by its number."""
        rows = range(len(self.seeds)) if rows is None else rows
        drawn = [self._row(self.seeds[row], draw, shape, dtype) for row, draw in zip(rows, draws, strict=True)]
        return torch.stack(drawn)

    def _row(self, seed: int, draw: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # hashed, because torch's CPU generator looks at 32 bits of its seed alone
        digest = hashlib.blake2b(f"{seed}/{draw}".encode(), digest_size=4).digest()
        self._generator.manual_seed(int.from_bytes(digest))
        return torch.rand(shape, generator=self._generator, device=self._device, dtype=dtype).flip(0)


def gumbel_argmax(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """A draw from `probabilities` (..., categories), which need not add up to 1: argmax p / -log U."""
    return (probabilities / -uniform.log()).argmax(-1)

"""Uniform noise that a row of a batch draws whatever its neighbours and its padding are."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from skipwise.sampling.canvas import Canvas


class Noise:
    """Every row has its own seed, every draw of a row its own number, and padding draws nothing.

    So row r of a batch under seed s draws what a batch of one draws under seed s + r, padded on the left or not.
    """

    def __init__(self, seed: int, canvas: Canvas):
        batch, self._length = canvas.sequences.shape
        self._seeds = [seed + row for row in range(batch)]
        padding = None if canvas.attention_mask is None else (canvas.attention_mask == 0).sum(1)
        self._padding = [0] * batch if padding is None else padding.tolist()
        self._device = canvas.sequences.device
        self._generator = torch.Generator(self._device)

    def uniform(
        self,
        draws: Sequence[int],
        *rest: int,
        window: slice | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """(rows, positions, *rest) in [0, 1): one draw for each row, by its number.

        window: the positions; all of them by default.
        """
        start, stop = (0, self._length) if window is None else (window.start, window.stop)
        found = []
        for row, draw in enumerate(draws):
            begin = max(start, self._padding[row])
            self._generator.manual_seed(_mixed(self._seeds[row], draw))
            values = torch.rand(stop - begin, *rest, generator=self._generator, device=self._device, dtype=dtype)
            found.append(F.pad(values, [0, 0] * len(rest) + [begin - start, 0], value=0.5))
        return torch.stack(found)

    def at(self, where: Tensor, rows: Tensor, words: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """(positions, words) in [0, 1), for the positions `where` (n, length) of `rows` (n,) alone, in their order.

        A position draws on its own and the same every time, so this is for a sampler that fills it once.
        """
        chosen = rows.tolist()
        found = torch.empty(int(where.sum()), words, dtype=dtype, device=self._device)
        for values, (n, position) in zip(found, where.nonzero().tolist(), strict=True):
            row = chosen[n]
            self._generator.manual_seed(_mixed(self._seeds[row], 0, position - self._padding[row]))
            values.uniform_(generator=self._generator)
        return found


def _mixed(*numbers: int) -> int:
    """A seed of 32 bits, as torch's CPU generator looks at no more of it."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=4).digest())


def gumbel_argmax(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """A draw from `probabilities` (..., categories), which need not add up to 1: argmax p / -log U."""
    return (probabilities / -uniform.log()).argmax(-1)

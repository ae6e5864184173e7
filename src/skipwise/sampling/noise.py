"""Uniform noise that a row of a batch draws whatever its neighbours and its padding are."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from skipwise.sampling.canvas import Canvas
from skipwise.sampling.prediction import largest

GROUP = 2**20  # draws that are made at once where only some of them are wanted


class Noise:
    """Every row has its own seed, every draw of a row its own number, and padding draws nothing.

    So row r of a batch under seed s draws what a batch of one draws under seed s + r, padded on the left or not.
    """

    def __init__(self, seed: int, canvas: Canvas):
        batch, self._length = canvas.sequences.shape
        self._seeds = [seed + row for row in range(batch)]
        padding = None if canvas.attention_mask is None else (~canvas.attention_mask).sum(1)
        self._padding = [0] * batch if padding is None else padding.tolist()
        self._device = canvas.sequences.device
        self._generator = torch.Generator(self._device)

    def uniform(
        self,
        draws: Sequence[int],
        *rest: int,
        window: slice | None = None,
        rows: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """(rows, positions, *rest) in [0, 1): one draw for each row, by its number.

        window: the positions; rows: which; all of them by default.
        """
        start, stop = (0, self._length) if window is None else (window.start, window.stop)
        found = []
        for row, draw in zip(range(len(draws)) if rows is None else rows, draws, strict=True):
            begin = max(start, self._padding[row])
            self._generator.manual_seed(_mixed(self._seeds[row], draw))
            values = torch.rand(stop - begin, *rest, generator=self._generator, device=self._device, dtype=dtype)
            found.append(F.pad(values, [0, 0] * len(rest) + [begin - start, 0], value=0.5))
        return torch.stack(found)

    def feed(
        self,
        draws: Sequence[int],
        words: int,
        where: tuple[Tensor, Tensor],
        rows: Sequence[int],
        window: slice | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> "Feed":
        """What `uniform(draws, words, window=window, rows=rows)[where]` is, to be taken in parts.

        where: of `rows` and of the window's positions, row by row. The draws of positions before a wanted one must be
        made, as a generator cannot be wound forward, but only a few of them are held at a time.
        """
        window = slice(0, self._length) if window is None else window
        wanted: list[list[int]] = [[] for _ in rows]
        for n, position in torch.stack(where, 1).tolist():
            wanted[n].append(window.start + position)
        return Feed(self._parts(draws, words, wanted, rows, window, dtype))

    def _parts(
        self,
        draws: Sequence[int],
        words: int,
        wanted: Sequence[Sequence[int]],
        rows: Sequence[int],
        window: slice,
        dtype: torch.dtype,
    ) -> Iterator[Tensor]:
        most = max(1, GROUP // words)  # nothing else sets it, so that a row draws the same in any batch
        for row, draw, positions in zip(rows, draws, wanted, strict=True):
            begin = max(window.start, self._padding[row])
            self._generator.manual_seed(_mixed(self._seeds[row], draw))
            for first in range(begin, positions[-1] + 1 if positions else begin, most):
                count = min(most, window.stop - first)
                values = torch.rand(count, words, generator=self._generator, device=self._device, dtype=dtype)
                inside = [position - first for position in positions if first <= position < first + count]
                yield values if len(inside) == count else values[inside]

    def at(self, where: Sequence[tuple[int, int]], words: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """(positions, words) in [0, 1), for (row, position) pairs alone, in their order.

        A position draws on its own and the same every time, so this is for a sampler that fills it once.
        """
        found = torch.empty(len(where), words, dtype=dtype, device=self._device)
        for values, (row, position) in zip(found, where, strict=True):
            self._generator.manual_seed(_mixed(self._seeds[row], 0, position - self._padding[row]))
            values.uniform_(generator=self._generator)
        return found


class Feed:
    """Takes as many rows as one wants from an iterator of tensors (n, words)."""

    def __init__(self, parts: Iterator[Tensor]):
        self._parts = parts
        self._left: Tensor | None = None

    def take(self, count: int) -> Tensor:
        """The next (count, words)."""
        taken = [] if self._left is None else [self._left]
        have = sum(map(len, taken))
        while have < count:
            taken.append(next(self._parts))
            have += len(taken[-1])
        whole = taken[0] if len(taken) == 1 else torch.cat(taken)
        self._left = whole[count:]
        return whole[:count]


def _mixed(*numbers: int) -> int:
    """A seed of 32 bits, as torch's CPU generator looks at no more of it."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=4).digest())


def gumbel_argmax(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """A draw from `probabilities` (..., categories), which need not add up to 1: argmax p / -log U."""
    return largest(probabilities / -uniform.log())

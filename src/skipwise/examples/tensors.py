"""Makes the tensors of one call."""

import torch
from torch import Tensor

SEED = 0  # the same size gives the same inputs


class Tensors:
    """Makes the tensors of one call. Every shape is without the batch, which comes first.

    Random floats have the model's dtype. Under the meta device they hold no memory, and only masks, indices and
    timesteps, whose values a forward may read, are real.
    """

    def __init__(self, batch: int, device: torch.device, dtype: torch.dtype):
        self.batch, self.device, self.dtype = batch, device, dtype
        self.small = torch.device("cpu") if device.type == "meta" else device
        self.generator = torch.Generator().manual_seed(SEED)

    def noise(self, *shape: int) -> Tensor:
        """Random floats."""
        if self.device.type == "meta":
            return torch.empty(self.batch, *shape, device="meta", dtype=self.dtype)
        return torch.randn(self.batch, *shape, generator=self.generator).to(self.device, self.dtype)

    def full(self, value: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """One value everywhere."""
        return torch.full((self.batch, *shape), value, device=self.small, dtype=dtype or self.dtype)

    def mask(self, length: int) -> Tensor:
        """A mask that keeps everything."""
        return self.full(True, length, dtype=torch.bool)

    def labels(self, *shape: int) -> Tensor:
        """Integers: the first class, or the first token."""
        return self.full(0, *shape, dtype=torch.long)

    def tokens(self, length: int, vocabulary: int) -> Tensor:
        """Random token ids."""
        return torch.randint(vocabulary, (self.batch, length), generator=self.generator).to(self.small)

    def rotary(self, length: int, dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (length, dim), of plain 1-d rotary positions."""
        rates = 10000.0 ** (-torch.arange(0, dim, 2, device=self.small) / dim)
        angles = torch.outer(torch.arange(length, device=self.small), rates).repeat_interleave(2, dim=1)
        return angles.cos(), angles.sin()

    def positions(self, frames: int, height: int, width: int, axes: int) -> Tensor:
        """(frames x height x width, axes): frame, row and column of every token on the first three axes."""
        grid = torch.meshgrid(*(torch.arange(n, device=self.small) for n in (frames, height, width)), indexing="ij")
        places = torch.stack([axis.flatten() for axis in grid], dim=1)[:, -axes:].float()
        return torch.cat([places, places.new_zeros(len(places), max(axes - 3, 0))], dim=1)


def round_up(length: int, multiple: int | None) -> int:
    """The next multiple of `multiple`."""
    multiple = multiple or 1
    return -(-length // multiple) * multiple

"""The draws of a fine-tuning: which crop of which picture at which noise level under which prompt.

All are known before the first step and follow from (seed, picture, number), never from the order in which a loader
hands things out: what is stored of a draw is found by what the draw is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipwise.finetuning.images import Picture
from skipwise.finetuning.patches import Patch, PatchSchedule, crop_pixels, keyed_generator, sample_patch

# (how many, generator) -> noise levels in (0, 1)
Times = Callable[[int, torch.Generator], Tensor]
FINER = 16  # levels that are drawn for each that is taken, so that every stratum has some


@dataclass(frozen=True)
class Example:
    """A picture, the prompt that it is trained under, and the weight of its loss (prior preservation gives another)."""

    picture: Picture
    prompt: str
    weight: float = 1.0


@dataclass(frozen=True)
class Draw:
    """One training sample: a crop of an example, the noise level t in (0, 1) and the seed of its noise.

    flip: the picture is mirrored, left to right, before it is cropped.
    """

    example: Example
    patch: Patch
    t: float
    noise_seed: int
    flip: bool = False

    def crop(self, resolution: int) -> Tensor:
        """The pixels (3, resolution, resolution) of the crop, in [-1, 1]."""
        return crop_pixels(mirrored(self.example.picture.pixels(), self.flip), self.patch, resolution)

    def mask(self, resolution: int) -> Tensor | None:
        """(resolution, resolution), 1 where the subject is in the crop; None without a mask."""
        mask = self.example.picture.mask()
        return None if mask is None else crop_pixels(mirrored(mask[None], self.flip), self.patch, resolution)[0]

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Standard normal, float32, on the CPU, the same wherever it is asked for."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.noise_seed))


def mirrored(pixels: Tensor, flip: bool) -> Tensor:
    """(..., height, width), left to right if `flip`."""
    return pixels.flip(-1) if flip else pixels


def make_draws(
    examples: Sequence[Example],
    count: int,
    times: Times,
    schedule: PatchSchedule,
    seed: int = 0,
    at_least: int = 1,
    random_flip: bool = False,
) -> list[Draw]:
    """`count` draws of every example. Their noise levels are stratified over the density that `times` draws from.

    A picture with a mask has its crops centred on the subject. at_least: side of the smallest crop in pixels.
    random_flip: half of the draws are of the mirrored picture.
    """
    return [
        draw for example in examples for draw in _of_one(example, count, times, schedule, seed, at_least, random_flip)
    ]


def _of_one(
    example: Example, count: int, times: Times, schedule: PatchSchedule, seed: int, at_least: int, random_flip: bool
) -> list[Draw]:
    picture, mask = example.picture, example.picture.mask()
    levels = _stratified(times, count, keyed_generator(seed, picture.sha256, "times"))
    draws = []
    for number, t in enumerate(levels):
        key = (seed, picture.sha256, number)
        flip = random_flip and bool(torch.rand((), generator=keyed_generator(*key, "flip")) < 0.5)
        seen = None if mask is None else mirrored(mask, flip)
        patch = sample_patch(schedule, picture.size, t, *key, mask=seen, at_least=at_least)
        noise_seed = int(torch.randint(2**31, (), generator=keyed_generator(*key, "noise")))
        draws.append(Draw(example, patch, t, noise_seed, flip))
    return draws


def _stratified(times: Times, count: int, generator: torch.Generator) -> list[float]:
    """One level from each of `count` strata of equal probability, in random order."""
    levels = times(count * FINER, generator).double().sort().values.view(count, FINER)
    taken = levels.gather(1, torch.randint(FINER, (count, 1), generator=generator)).squeeze(1)
    return taken[torch.randperm(count, generator=generator)].tolist()


def batch_of(draws: Sequence[Draw], step: int, size: int, seed: int) -> list[Draw]:
    """The draws of a step: each epoch goes through all of them once, in an order of its own; epochs join seamlessly."""
    orders: dict[int, list[int]] = {}
    batch = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(draws))
        if epoch not in orders:
            orders[epoch] = torch.randperm(len(draws), generator=keyed_generator(seed, "epoch", epoch)).tolist()
        batch.append(draws[orders[epoch][place]])
    return batch

"""Held-out texts as two models read them when they are compared along the trajectory: noised, at stratified levels."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipwise.calibration import Sample, batched
from skipwise.plan import Plan
from skipwise.sampling.mdlm import NOISE_EPS


@dataclass(frozen=True)
class Reading:
    """Text number `text` at one noise level of bin number `bin`. masked: (length,) bool, never on the prompt."""

    sample: Sample
    text: int
    bin: int
    level: float
    masked: Tensor

    @property
    def progress(self) -> float:
        """Where on the trajectory this is, 0 = all noise, 1 = done."""
        return 1.0 - self.level

    @property
    def chance(self) -> float:
        """The chance that a token is masked at this level, by MDLM's log-linear schedule."""
        return mask_chance(self.level)


def mask_chance(level: float) -> float:
    """(1 - 1e-3) t: the log-linear schedule of MDLM, in which the clean text is never gone altogether."""
    return (1 - NOISE_EPS) * level


def stratified_readings(samples: Sequence[Sample], bins: int, seed: int) -> list[Reading]:
    """Every text once in each of `bins` equal bins of noise levels over (0, 1); inside a bin levels are spread evenly.

    One token of a reading, any with the same chance, is masked for certain and the others independently with the mask
    chance of MDLM's log-linear schedule, (1 - 1e-3) t. That is what a sampler's model sees at the moment at which it
    commits a token, and it makes the mean over a reading's masked tokens an unbiased estimate of the mean over the
    tokens that are committed at t. Masking all independently and leaving out readings without a mask would not: rows
    with few masks would count for too much.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(bins):
        spread = torch.randperm(len(samples), generator=generator) + torch.rand(
            len(samples), generator=generator, dtype=torch.float64
        )
        levels = (number + spread / len(samples)) / bins
        for text, (sample, level) in enumerate(zip(samples, levels.tolist(), strict=True)):
            found.append(Reading(sample, text, number, level, _masked(sample, level, generator)))
    return found


def _masked(sample: Sample, level: float, generator: torch.Generator) -> Tensor:
    free = len(sample.ids) - sample.prompt
    hit = torch.rand(free, generator=generator) < mask_chance(level)
    hit[torch.randint(free, (), generator=generator)] = True
    return torch.cat([torch.zeros(sample.prompt, dtype=torch.bool), hit])


def batches(readings: Sequence[Reading], plan: Plan | None, size: int) -> list[Sequence[Reading]]:
    """Readings of equal length in one phase of the plan, at most `size` together: no padding, one cut a forward."""
    alike: dict[tuple[int, int], list[Reading]] = defaultdict(list)
    for reading in readings:
        phase = plan.phase_number(reading.progress) if plan else 0
        alike[phase, len(reading.sample.ids)].append(reading)
    return [batch for group in alike.values() for batch in batched(group, size)]

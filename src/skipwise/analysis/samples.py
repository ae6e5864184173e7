"""Texts as token ids, in batches that need no padding. Nothing here depends on the batch size but the batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skipwise.analysis.cka import texts_a_group
from skipwise.calibration import Sample as PlainSample
from skipwise.calibration import Text, batched, equal_shapes
from skipwise.calibration import tokenize as plain_samples

PROBES = 16  # texts that the costly parts, lens and attention, look at
FIRST = 64  # tokens whose states say which channels are outliers


@dataclass(frozen=True)
class Sample(PlainSample):
    """number: the text's place, which seeds its noise; probe: whether the costly parts look at it."""

    number: int = 0
    probe: bool = False

    def noise(self, seed: int) -> Tensor:
        """(length,) uniform draws; a token is masked at every level above its draw."""
        return torch.rand(len(self.ids), generator=torch.Generator().manual_seed(seed * 1_000_003 + self.number))


@dataclass(frozen=True)
class Batch:
    """Samples of equal shape."""

    samples: tuple[Sample, ...]

    @property
    def ids(self) -> Tensor:
        """(batch, length) int64."""
        return torch.tensor([sample.ids for sample in self.samples])

    @property
    def probes(self) -> Tensor:
        """(batch,) bool."""
        return torch.tensor([sample.probe for sample in self.samples])

    def noise(self, seed: int) -> Tensor:
        """(batch, length) uniform draws."""
        return torch.stack([sample.noise(seed) for sample in self.samples])


def tokenize(tokenizer: Any, texts: Sequence[Text], max_tokens: int) -> list[Sample]:
    """Texts of two tokens or more, cut to max_tokens. Raises UserError when there is none."""
    found = plain_samples(tokenizer, texts, max_tokens)
    probes = set(torch.linspace(0, len(found) - 1, min(PROBES, len(found))).long().tolist())
    return [Sample(sample.ids, sample.prompt, i, i in probes) for i, sample in enumerate(found)]


def batches(samples: Sequence[Sample], batch_size: int) -> list[Batch]:
    """Batches of samples of equal shape: `batch_size` texts, rounded up to whole CKA groups."""
    found = []
    for group in equal_shapes(samples):
        texts = texts_a_group(len(group[0].ids))
        size = -(-batch_size // texts) * texts
        found += [Batch(tuple(some)) for some in batched(group, size)]
    return found


def first_batch(samples: Sequence[Sample]) -> Batch:
    """Samples of one shape that have about FIRST tokens together, cut to as many, whatever the batch size."""
    shape = len(samples[0].ids), samples[0].prompt
    alike = [sample for sample in samples if (len(sample.ids), sample.prompt) == shape]
    return Batch(tuple(replace(s, ids=s.ids[:FIRST]) for s in alike[: max(1, FIRST // len(samples[0].ids))]))

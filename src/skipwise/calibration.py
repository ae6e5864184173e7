"""Calibration data: what plans are chosen, stand-ins fitted and adapters trained on, the same for all of them.

A diffusion model sees its texts with part of the tokens masked, as it does while it decodes; which part of the
trajectory that is, 0 = all noise to 1 = done, is the share of tokens that is known.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from skipwise.errors import UserError
from skipwise.examples import check_text_alone
from skipwise.models import kind_of, mask_token
from skipwise.wrapping import unwrap

# A text, or a (prompt, answer) pair of which a diffusion model never sees the prompt masked.
Text = str | tuple[str, str]


@dataclass(frozen=True)
class Sample:
    """Token ids of one text; the first `prompt` of them are given, the rest is what a model produces."""

    ids: tuple[int, ...]
    prompt: int


Item = TypeVar("Item")
AnySample = TypeVar("AnySample", bound=Sample)


def tokenize(tokenizer: Any, texts: Sequence[Text], max_tokens: int = 512) -> list[Sample]:
    """Samples of two tokens or more, cut to `max_tokens`; of a plain text the first half is given.

    Raises UserError when no text is long enough.
    """
    samples = []
    for text in texts:
        prompt, answer = (text, "") if isinstance(text, str) else text
        ids = tokenizer(prompt + answer)["input_ids"][:max_tokens]
        kept = len(tokenizer(prompt)["input_ids"]) if answer else len(ids) // 2
        if len(ids) > 1:
            samples.append(Sample(tuple(ids), min(kept, len(ids) - 1)))
    if not samples:
        raise UserError("There are no texts to read: none has two tokens; give at least one of two tokens or more.")
    return samples


def fingerprint(samples: Sequence[Sample]) -> dict[str, Any]:
    """What a plan remembers of its calibration data."""
    digest = hashlib.sha256(repr([sample.ids for sample in samples]).encode()).hexdigest()
    return {"sha256": digest, "tokens": sum(len(sample.ids) for sample in samples), "texts": len(samples)}


def equal_shapes(samples: Sequence[AnySample]) -> list[list[AnySample]]:
    """Samples in groups of equal shape, so that nothing needs to be padded."""
    groups: dict[tuple[int, int], list[AnySample]] = defaultdict(list)
    for sample in samples:
        groups[len(sample.ids), sample.prompt].append(sample)
    return list(groups.values())


def batched(group: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """The group in order, in pieces of `size`; the last may be smaller."""
    return [group[start : start + size] for start in range(0, len(group), size)]


@dataclass(frozen=True)
class Batch:
    """inputs (batch, length): what the model sees; predicted (batch, length): where what it says next matters."""

    inputs: Tensor
    predicted: Tensor

    def predictions(self, model: nn.Module) -> Tensor:
        """(predicted tokens, vocabulary): log-probabilities, as the model is now."""
        return model(input_ids=self.inputs).logits[self.predicted].float().log_softmax(-1)


def divergence(target: Tensor, found: Tensor) -> Tensor:
    """(tokens,): KL(target || found) in nats; both log-probabilities (tokens, vocabulary)."""
    return (target.exp() * (target - found)).sum(-1)


# (batch, log-probabilities of the whole model, and of the one that is cut) -> (n,), whose mean is the harm done
Harm = Callable[[Batch, Tensor, Tensor], Tensor]
TIES = 1e-3  # how much what is not committed yet counts beside what is


def by_divergence(batch: Batch, target: Tensor, found: Tensor) -> Tensor:
    """KL(whole || cut) of every predicted token, in nats."""
    return divergence(target, found)


def by_commitment(batch: Batch, target: Tensor, found: Tensor) -> Tensor:
    """KL(whole || cut) in nats at the one position of every row that the cut model would commit next.

    Which is the one it is most confident of, as LLaDA and Dream decode. What it thinks of other positions does no harm
    yet, and taking them in another order does little. Every row of the batch predicts a token or more.
    """
    rows, confidence = batch.predicted.nonzero()[:, 0], found.max(-1).values
    best = confidence.new_full((len(batch.inputs),), -torch.inf).scatter_reduce(0, rows, confidence, "amax")
    places = torch.arange(len(rows), device=rows.device).where(confidence == best[rows], len(rows))
    first = places.new_full((len(batch.inputs),), len(rows)).scatter_reduce(0, rows, places, "amin")
    everywhere = divergence(target, found)
    return everywhere[first] + TIES * everywhere.mean()


@dataclass
class Calibration:
    """A model and the data that methods may run it on. `seed` draws what is masked; an epoch draws anew."""

    model: nn.Module
    samples: Sequence[Sample]
    batch_size: int = 64
    seed: int = 0
    facts: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        check_text_alone(self.model, "calibrated on", whole=True)
        self.facts = fingerprint(self.samples)

    @classmethod
    def of(
        cls, model: nn.Module, tokenizer: Any, texts: Sequence[Text], *, max_tokens: int = 512, **others: Any
    ) -> "Calibration":
        """Calibration on `texts`, cut to `max_tokens`. Raises UserError when no text is long enough."""
        return cls(unwrap(model), tokenize(tokenizer, texts, max_tokens), **others)

    def batches(self, begin: float = 0.0, end: float = 1.0, epoch: int = 0) -> Iterator[Batch]:
        """All samples once, of a diffusion model at progress `begin` to `end` of the trajectory."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        device = next(self.model.parameters()).device
        for group in self._groups(self.samples):
            ids = torch.tensor([sample.ids for sample in group])
            if kind_of(self.model) == "autoregressive":
                batch = _causal(ids, group[0].prompt)
            else:
                batch = _noised(ids, group[0].prompt, mask_token(self.model), begin, end, generator)
            yield Batch(batch.inputs.to(device), batch.predicted.to(device))

    def halves(self) -> tuple[Self, Self]:
        """Every second sample, and the others: one to choose on, one to see what the choice is worth.

        Raises UserError when there is one sample alone.
        """
        if len(self.samples) < 2:
            raise UserError("There is one text to calibrate on, and two are needed; give more texts.")
        return replace(self, samples=self.samples[::2]), replace(self, samples=self.samples[1::2])

    def share(self, begin: float, end: float) -> float:
        """The part of a trajectory's forwards that is made at progress `begin` to `end`."""
        return end - begin

    def _groups(self, samples: Sequence[AnySample]) -> Iterator[Sequence[AnySample]]:
        for group in equal_shapes(samples):
            yield from batched(group, self.batch_size)


@dataclass(frozen=True)
class Moment(Sample):
    """A sequence as the model saw it while it was decoded, masks and all, at some progress of the trajectory."""

    progress: float = 0.0


@dataclass
class Visited(Calibration):
    """Moments of real trajectories (`skipwise.scheduling.visit`) in the place of texts that are masked at random.

    A sampler that commits what it is sure of first sees other sequences than random masks make: with the model's own
    tokens, the easy ones first. An epoch draws nothing anew.
    """

    samples: Sequence[Moment]

    def batches(self, begin: float = 0.0, end: float = 1.0, epoch: int = 0) -> Iterator[Batch]:
        """The moments at progress `begin` to `end`; what is masked in them is predicted."""
        mask, device = mask_token(self.model), next(self.model.parameters()).device
        for group in self._groups(self._between(begin, end)):
            inputs = torch.tensor([moment.ids for moment in group], device=device)
            yield Batch(inputs, inputs == mask)

    def share(self, begin: float, end: float) -> float:
        """The part of all tokens that went through the model at progress `begin` to `end`."""
        return sum(len(m.ids) for m in self._between(begin, end)) / sum(len(m.ids) for m in self.samples)

    def _between(self, begin: float, end: float) -> list[Moment]:
        return [m for m in self.samples if begin <= m.progress and (m.progress < end or end == 1.0)]


def _causal(ids: Tensor, prompt: int) -> Batch:
    """Every position from the last given one on predicts its successor."""
    places = torch.arange(ids.shape[1])
    return Batch(ids, ((places >= prompt - 1) & (places < ids.shape[1] - 1)).expand_as(ids))


def _noised(ids: Tensor, prompt: int, mask: int, begin: float, end: float, generator: torch.Generator) -> Batch:
    """Mask k of the n tokens that are not given, 1 - k/n uniform in [begin, end); rows are stratified."""
    batch, length = ids.shape
    n = length - prompt
    strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    known = begin + (end - begin) * strata[torch.randperm(batch, generator=generator)]
    k = (n - (known * n).floor()).long().clamp(1, n)
    rank = torch.rand(batch, n, generator=generator).argsort(1).argsort(1)
    masked = torch.cat([torch.zeros(batch, prompt, dtype=torch.bool), rank < k[:, None]], dim=1)
    return Batch(ids.masked_fill(masked, mask), masked)

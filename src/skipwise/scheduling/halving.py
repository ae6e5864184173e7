"""Successive halving: all schedules on a few examples, the better half on as many again, and so on.

Examples are drawn once: each round goes on where the last one ended, and the whole model runs on the same ones. A
schedule leaves when it is in the worse half, or when it is hopeless: so far behind the last place of the finals that in
fewer than 2.5% of the bootstrap's draws it reaches it.
Source: Karnin et al., "Almost Optimal Exploration in Multi-Armed Bandits" (ICML 2013), section 3.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from skipwise.evaluation.measure import resamples, retention_draws
from skipwise.evaluation.rows import saved_fraction
from skipwise.scheduling.candidates import Candidate
from skipwise.scheduling.trials import Outcome, Trial

FIRST = 8  # examples of the first round, at least: fewer say nothing about an answer that is right or wrong
HOPELESS = 0.025

RunAll = Callable[[Sequence[Trial], int], list[Outcome]]


@dataclass
class Standing:
    """Where a schedule stands: its outcome so far, and when and why it was dropped, None while it is in."""

    candidate: Candidate
    outcome: Outcome = field(default_factory=lambda: Outcome({}))
    kept: float = 0.0
    saved_block_flops: float = 0.0
    saved_all_in_flops: float = 0.0
    round: int = 0
    dropped: str | None = None

    def compare(self, whole: Outcome, number: int) -> None:
        """Enter how it did by round `number` beside the whole model on the same examples."""
        self.kept, self.round = mean_retention(self.outcome, whole), number
        self.saved_block_flops = saved_fraction(self.outcome.block_flops, whole.block_flops)
        self.saved_all_in_flops = saved_fraction(self.outcome.all_in_flops, whole.all_in_flops)


def round_ends(candidates: int, examples: int, finalists: int) -> list[int]:
    """Up to which example each round goes: doubled every time; the last one, of the finalists, takes them all."""
    halvings = 0
    while candidates > finalists:
        candidates = max(finalists, math.ceil(candidates / 2))
        halvings += 1
    first = min(FIRST, examples)
    return [max(first, examples // 2 ** (halvings - number)) for number in range(halvings + 1)]


def halve(candidates: Sequence[Candidate], examples: int, finalists: int, run: RunAll, seed: int = 0) -> list[Standing]:
    """All schedules, the finalists first and best first, then those dropped, the last dropped first.

    run(trials, ahead): the trials' outcomes, in their order; ahead: how many examples later rounds take at most, all
    trials together.
    Ties are broken by the order of `candidates`, so nothing depends on the order in which trials finish.
    """
    inside, whole, done = [Standing(one) for one in candidates], Outcome({}), 0
    out: list[Standing] = []
    ends = round_ends(len(candidates), examples, finalists)
    for number, end in enumerate(ends):
        if end > done:
            whole = _advance(inside, whole, done, end, run, _ahead(len(inside), ends[number:], finalists))
            done = end
        for one in inside:
            one.compare(whole, number)
        inside.sort(key=lambda one: -one.kept)  # stable
        if number < len(ends) - 1:
            inside, leaving = _cut(inside, whole, finalists, seed)
            out = leaving + out
    return inside + out


def _advance(inside: Sequence[Standing], whole: Outcome, begin: int, end: int, run: RunAll, ahead: int) -> Outcome:
    """Run all that are in, and the whole model, on the next examples; returns the whole model's outcome so far."""
    trials = [Trial(one.candidate.plan, begin, end, one.candidate.segments) for one in inside]
    base, *found = run([Trial(None, begin, end), *trials], ahead)
    for one, outcome in zip(inside, found, strict=True):
        one.outcome += outcome
    return whole + base


def _ahead(inside: int, ends: Sequence[int], finalists: int) -> int:
    """Examples of the rounds after this one, at most."""
    total = 0
    for before, end in pairwise(ends):
        inside = max(min(inside, finalists), math.ceil(inside / 2))
        total += (inside + 1) * (end - before)
    return total


def _cut(ranked: list[Standing], whole: Outcome, finalists: int, seed: int) -> tuple[list[Standing], list[Standing]]:
    """Those who stay, and those who leave, both best first."""
    places = max(finalists, math.ceil(len(ranked) / 2))
    last_place = ranked[min(finalists, len(ranked)) - 1]
    reference = retention_samples(last_place.outcome, whole, seed)
    for place, one in enumerate(ranked):
        if place >= places:
            one.dropped = "worse half"
        elif place >= finalists and _reaches(one, reference, whole, seed) < HOPELESS:
            one.dropped = "hopeless"
    return [one for one in ranked if not one.dropped], [one for one in ranked if one.dropped]


def _reaches(one: Standing, reference: np.ndarray, whole: Outcome, seed: int) -> float:
    """In which part of the bootstrap's draws it keeps at least as much as the reference."""
    return float((retention_samples(one.outcome, whole, seed) >= reference).mean())


def mean_retention(outcome: Outcome, whole: Outcome) -> float:
    """The part of the whole model's score that is kept, by the first metric of each task, on average over tasks.

    A task on which the whole model scores nothing counts as nothing kept.
    """
    firsts = [(metrics[0], whole.scores[task][0]) for task, metrics in outcome.scores.items()]
    return float(np.mean([retention_draws(one, base, np.ones((1, one.examples)))[0] for one, base in firsts]))


def retention_samples(outcome: Outcome, whole: Outcome, seed: int) -> np.ndarray:
    """(resamples,) of `mean_retention`; tasks are resampled independently, all schedules on the same draws."""
    draws = [
        retention_draws(metrics[0], whole.scores[task][0], resamples(metrics[0].examples, seed + number))
        for number, (task, metrics) in enumerate(outcome.scores.items())
    ]
    return np.mean(draws, axis=0)

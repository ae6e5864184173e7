"""What a task yields, and its bootstrap: scores of the same examples under two plans are resampled together."""

from dataclasses import dataclass

import numpy as np

from skipwise.errors import UserError
from skipwise.evaluation.result import Interval, Row

RESAMPLES = 2000


@dataclass(frozen=True)
class Measured:
    """One metric on one task: a ratio of sums over examples, exponentiated for perplexity.

    numerators, denominators: (examples,), such as (correct tokens, tokens) or (log loss in nats, tokens).
    """

    metric: str
    numerators: np.ndarray
    denominators: np.ndarray
    perplexity: bool = False

    def score(self, counts: np.ndarray) -> np.ndarray:
        """(resamples, examples) counts of how often each example is drawn -> (resamples,) scores."""
        ratio = (counts @ self.numerators) / (counts @ self.denominators)
        return np.exp(ratio) if self.perplexity else ratio

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.numerators)

    @property
    def outcomes(self) -> str | None:
        """ "1" or "0" for every example, of a metric that is right or wrong."""
        if (self.denominators != 1).any() or not np.isin(self.numerators, (0, 1)).all():
            return None
        return "".join("01"[int(right)] for right in self.numerators)

    @property
    def parts(self) -> tuple[tuple[float, float], ...] | None:
        """(numerator, denominator) of every example, of a metric that is not right or wrong."""
        if self.outcomes is not None:
            return None
        pairs = zip(self.numerators.tolist(), self.denominators.tolist(), strict=True)
        return tuple((round(above, 4), round(below, 6)) for above, below in pairs)

    @property
    def value(self) -> float:
        """The score on all examples, each once."""
        return float(self.score(np.ones((1, self.examples)))[0])


def resamples(examples: int, seed: int) -> np.ndarray:
    """(RESAMPLES, examples): how often each example is drawn when `examples` are drawn with replacement."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(examples, np.full(examples, 1 / examples), size=RESAMPLES).astype(float)


def interval(value: float, draws: np.ndarray) -> Interval:
    """The 95% percentile interval of bootstrap draws around an estimate."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value=value, low=float(low), high=float(high))


def difference(first: Row, second: Row, seed: int = 0) -> Interval:
    """Mean score of `first` minus that of `second` over the tasks that both were right or wrong on, in pairs.

    Raises UserError when they have no such task, or not the same number of examples.
    """
    draws, values = [], []
    for number, (task, score) in enumerate(first.scores.items()):
        other = second.scores.get(task)
        if score.outcomes is None or other is None or other.outcomes is None:
            continue
        if len(score.outcomes) != len(other.outcomes):
            raise UserError(f"{task} has {len(score.outcomes)} and {len(other.outcomes)} examples; use equal ones.")
        gain = np.array([int(a) - int(b) for a, b in zip(score.outcomes, other.outcomes, strict=True)])
        draws.append(resamples(len(gain), seed + number) @ gain / len(gain))
        values.append(gain.mean())
    if not draws:
        raise UserError("The two rows have no task in common whose answers are right or wrong.")
    return interval(float(np.mean(values)), np.mean(draws, axis=0))


def perplexity_ratio(first: Row, second: Row, task: str, seed: int = 0) -> Interval:
    """Perplexity of `first` over that of `second` on a task, in pairs of examples; below 1 the first is better.

    Raises UserError when either row lacks the task's examples, or they are not as many.
    """
    found = []
    for row in (first, second):
        score = row.scores.get(task)
        if score is None or score.parts is None or not score.metric.endswith("perplexity"):
            raise UserError(f"{row.method} has no perplexity of {task} for every example; evaluate it again.")
        above, below = np.array(score.parts).T
        found.append(Measured(score.metric, above, below, perplexity=True))
    ours, theirs = found
    if ours.examples != theirs.examples:
        raise UserError(f"{task} has {ours.examples} and {theirs.examples} examples; use equal ones.")
    counts = resamples(ours.examples, seed)
    return interval(ours.value / theirs.value, ours.score(counts) / theirs.score(counts))


def retention(under_plan: Measured, whole: Measured) -> float:
    """The part of a score that is kept: plan / whole; of a perplexity, which is to be low, whole / plan."""
    pair = (whole, under_plan) if whole.perplexity else (under_plan, whole)
    return pair[0].value / pair[1].value


def retention_draws(under_plan: Measured, whole: Measured, counts: np.ndarray) -> np.ndarray:
    """(resamples,) of `retention`, on the same draws of examples for both; 0/0 counts as nothing kept."""
    above, below = (whole, under_plan) if whole.perplexity else (under_plan, whole)
    base = below.score(counts)
    return np.divide(above.score(counts), base, out=np.zeros_like(base), where=base != 0)

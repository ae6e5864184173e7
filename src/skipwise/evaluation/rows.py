"""A Result's row from what tasks gave under a plan and without one, on the same examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from skipwise.evaluation.measure import Measured, interval, resamples, retention, retention_draws
from skipwise.evaluation.result import Interval, Row, Score
from skipwise.plan import Plan


@dataclass(frozen=True)
class Run:
    """What tasks gave, by name, and what it took: FLOPs of the blocks and of all, seconds."""

    measured: Mapping[str, Sequence[Measured]]
    block_flops: float
    all_in_flops: float
    seconds: float


def judged(plan: Plan | None, run: Run, whole: Run, seed: int, method: str | None = None) -> Row:
    """The row of a plan, None for the whole model; scores and what is kept with bootstrap intervals.

    whole: of the model without a plan. A task on which that scores nothing has no retention. seed: of the bootstrap.
    method: the plan's own when left out.
    """
    scores, draws = {}, {}
    for number, (task, metrics) in enumerate(run.measured.items()):
        counts = resamples(metrics[0].examples, seed + number)
        for place, metric in enumerate(metrics):
            before, kept = whole.measured[task][place], None
            if plan is not None and place == 0 and before.value > 0:
                draws[task] = retention_draws(metric, before, counts)
                kept = interval(retention(metric, before), draws[task])
            scores[task if place == 0 else f"{task} ({metric.metric})"] = Score(
                metric=metric.metric,
                value=interval(metric.value, metric.score(counts)),
                examples=metric.examples,
                retention=kept,
                outcomes=metric.outcomes,
                parts=metric.parts if place == 0 else None,
            )
    return Row(
        plan=plan,
        method=method or (plan.method if plan else "whole model"),
        k=_blocks_skipped(plan),
        saved_block_flops=saved_fraction(run.block_flops, whole.block_flops),
        saved_all_in_flops=saved_fraction(run.all_in_flops, whole.all_in_flops),
        seconds=round(run.seconds, 3),
        scores=scores,
        mean_retention=_mean(scores, draws),
    )


def saved_fraction(flops: float, whole: float) -> float:
    """The fraction of the whole model's FLOPs that was saved; 0 where nothing was run."""
    return 1 - flops / whole if whole else 0.0


def _mean(scores: Mapping[str, Score], draws: Mapping[str, np.ndarray]) -> Interval | None:
    """Mean retention over tasks; tasks are resampled independently of one another."""
    kept = [score.retention.value for score in scores.values() if score.retention]
    return interval(float(np.mean(kept)), np.mean(list(draws.values()), axis=0)) if kept else None


def _blocks_skipped(plan: Plan | None) -> int:
    """Blocks skipped at the step that skips the most."""
    return max((sum(map(len, phase.skip.values())) for phase in plan.phases), default=0) if plan else 0

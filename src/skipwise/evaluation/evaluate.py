"""`evaluate`: run tasks under a list of plans, on the same examples, and keep what was lost and saved."""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from skipwise.blocks import find_contract
from skipwise.cost import cost_of, price_blocks
from skipwise.errors import UserError
from skipwise.evaluation.measure import Measured, interval, resamples, retention, retention_draws
from skipwise.evaluation.result import Interval, Result, Row, Score
from skipwise.evaluation.tasks import EvaluationTask, build_task, default_tasks
from skipwise.examples import Size
from skipwise.models import kind_of
from skipwise.plan import Plan
from skipwise.sampling.accounts import Share, account
from skipwise.sampling.denoiser import denoising
from skipwise.versions import versions


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str | EvaluationTask] | None = None,
    plans: Sequence[Plan | None] = (None,),
    *,
    examples: int | None = None,
    split: Literal["calibration", "test"] = "test",
    seed: int = 0,
    batch_size: int = 250,
    name: str | None = None,
    others: Mapping[str, nn.Module] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Scores of the model under each plan, and the retention against the whole model, paired on the same examples.

    tasks: names, see `task_names()`, or tasks; the model's own when left out. plans: None is the whole model, which is
    evaluated first whether it is listed or not; phases are followed, and the FLOPs that a row saves are those of the
    forwards that were made. examples: prompts a task (500), or windows of a text (8). seed: of the examples, their
    masks, and the bootstrap. others: models that plans name (`skipwise.generate`). on_progress(done, total) counts
    plans x tasks. Raises UserError for an unknown task or a plan of another model.
    """
    if examples is not None and examples < 1:
        raise UserError(f"examples={examples}: at least one example a task is needed.")
    chosen = [
        build_task(task, split, examples, seed, batch_size) if isinstance(task, str) else task
        for task in (tasks or default_tasks(tokenizer))
    ]
    contract = find_contract(model)
    listed = [plan for plan in plans if plan is not None]
    for plan in listed:
        plan.check_model(contract.shape)
    ticker = _Ticker((1 + len(listed)) * len(chosen), on_progress)
    judge = _Judge(model, tokenizer, chosen, seed, ticker, others)
    first = next(model.parameters())
    return Result(
        name=name or getattr(model, "name_or_path", "") or type(model).__name__,
        kind=kind_of(model),
        model=contract.shape.model_dump(),
        rows=(judge.whole_row(), *(judge.row(plan) for plan in listed)),
        device=first.device.type,
        dtype=str(first.dtype).removeprefix("torch."),
        seeds={"examples": seed},
        settings={"tasks": [t.name for t in chosen], "examples": examples, "split": split, "tokens": judge.tokens}
        | {t.name: t.facts for t in chosen if t.facts},
        versions=versions(),
        date=datetime.date.today().isoformat(),
    )


class _Ticker:
    def __init__(self, total: int, report: Callable[[int, int], None] | None):
        self.done, self.total, self.report = 0, total, report

    def tick(self) -> None:
        self.done += 1
        if self.report:
            self.report(self.done, self.total)


@dataclass(frozen=True)
class _Run:
    """What the tasks gave under one plan, and what it took: FLOPs of the blocks and of all, seconds."""

    measured: dict[str, list[Measured]]
    block_flops: float
    all_in_flops: float
    seconds: float


class _Judge:
    """Runs tasks and holds the whole model's scores, which every plan is compared with."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        tasks: list[EvaluationTask],
        seed: int,
        ticker: _Ticker,
        others: Mapping[str, nn.Module] | None,
    ):
        self.model, self.tokenizer, self.tasks, self.ticker = model, tokenizer, tasks, ticker
        self.seed, self.others = seed, others
        self.tokens = max(task.tokens for task in tasks)
        self.whole = self._run(None)

    def _run(self, plan: Plan | None) -> _Run:
        measured = {}
        began = time.perf_counter()
        with denoising(self.model, plan, self.others, tokenizer=self.tokenizer) as denoiser:
            for task in self.tasks:
                measured[task.name] = task.run(denoiser, self.tokenizer)
                self.ticker.tick()
        seconds = time.perf_counter() - began
        taken = sum(account(denoiser).values(), Share())
        if taken.forwards:
            return _Run(measured, taken.block_flops, taken.all_in_flops, seconds)
        # an autoregressive model decodes by itself, under a static plan
        cost = cost_of(price_blocks(self.model, Size(tokens=self.tokens)), plan)
        return _Run(measured, cost.block_flops, cost.all_in_flops, seconds)

    def whole_row(self) -> Row:
        """The row of the model without a plan."""
        return self._row(None, self.whole)

    def row(self, plan: Plan) -> Row:
        """The row of the model under a plan."""
        return self._row(plan, self._run(plan))

    def _row(self, plan: Plan | None, run: _Run) -> Row:
        scores, draws = {}, {}
        for number, (task, metrics) in enumerate(run.measured.items()):
            counts = resamples(metrics[0].examples, self.seed + number)
            for place, metric in enumerate(metrics):
                whole = self.whole.measured[task][place]
                kept = None
                if plan is not None and place == 0 and whole.value > 0:
                    draws[task] = retention_draws(metric, whole, counts)
                    kept = interval(retention(metric, whole), draws[task])
                label = task if place == 0 else f"{task} ({metric.metric})"
                scores[label] = Score(
                    metric=metric.metric,
                    value=interval(metric.value, metric.score(counts)),
                    examples=metric.examples,
                    retention=kept,
                    outcomes=metric.outcomes,
                    parts=metric.parts if place == 0 else None,
                )
        return Row(
            plan=plan,
            method=plan.method if plan else "whole model",
            k=_blocks_skipped(plan),
            saved_block_flops=1 - run.block_flops / self.whole.block_flops,
            saved_all_in_flops=1 - run.all_in_flops / self.whole.all_in_flops,
            seconds=round(run.seconds, 3),
            scores=scores,
            mean_retention=_mean(scores, draws),
        )


def _mean(scores: dict[str, Score], draws: dict[str, np.ndarray]) -> Interval | None:
    """Mean retention over tasks; tasks are resampled independently of one another."""
    kept = [score.retention.value for score in scores.values() if score.retention]
    return interval(float(np.mean(kept)), np.mean(list(draws.values()), axis=0)) if kept else None


def _blocks_skipped(plan: Plan | None) -> int:
    """Blocks skipped at the step that skips the most."""
    return max((sum(map(len, phase.skip.values())) for phase in plan.phases), default=0) if plan else 0

"""`evaluate`: run tasks under a list of plans, on the same examples, and keep what was lost and saved."""

import datetime
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
from torch import nn

from skipwise.blocks import find_contract
from skipwise.cost import cost_of, price_blocks
from skipwise.errors import UserError
from skipwise.evaluation.measure import Measured, interval, resamples, retention_draws
from skipwise.evaluation.result import Interval, Result, Row, Score
from skipwise.evaluation.tasks import EvaluationTask, build_task, default_tasks
from skipwise.examples import Size
from skipwise.models import kind_of
from skipwise.plan import Plan
from skipwise.skipping import skip
from skipwise.versions import versions


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] | None = None,
    plans: Sequence[Plan | None] = (None,),
    *,
    examples: int | None = None,
    split: Literal["calibration", "test"] = "test",
    seed: int = 0,
    batch_size: int = 250,
    name: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Scores of the model under each plan, and the retention against the whole model, paired on the same examples.

    tasks: names, see `task_names()`; the model's own when left out. plans: None is the whole model, which is evaluated
    first whether it is listed or not. examples: prompts a task (500), or windows of a text (8). seed: of the examples,
    their masks, and the bootstrap. on_progress(done, total) counts plans x tasks.
    Raises UserError for an unknown task or a plan of another model.
    """
    if examples is not None and examples < 1:
        raise UserError(f"examples={examples}: at least one example a task is needed.")
    chosen = [build_task(t, split, examples, seed, batch_size) for t in (tasks or default_tasks(tokenizer))]
    contract = find_contract(model)
    listed = [plan for plan in plans if plan is not None]
    for plan in listed:
        plan.check_model(contract.shape)
    ticker = _Ticker((1 + len(listed)) * len(chosen), on_progress)
    judge = _Judge(model, tokenizer, chosen, seed, ticker)
    first = next(model.parameters())
    return Result(
        name=name or getattr(model, "name_or_path", "") or type(model).__name__,
        kind=kind_of(model),
        model=contract.shape.model_dump(),
        rows=(judge.whole_row(), *(judge.row(plan) for plan in listed)),
        device=first.device.type,
        dtype=str(first.dtype).removeprefix("torch."),
        seeds={"examples": seed},
        settings={"tasks": [t.name for t in chosen], "examples": examples, "split": split, "tokens": judge.tokens},
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


class _Judge:
    """Runs tasks and holds the whole model's scores, which every plan is compared with."""

    def __init__(self, model: nn.Module, tokenizer: Any, tasks: list[EvaluationTask], seed: int, ticker: _Ticker):
        self.model, self.tokenizer, self.tasks, self.ticker = model, tokenizer, tasks, ticker
        self.seed = seed
        self.tokens = max(task.tokens for task in tasks)
        self.prices = price_blocks(model, Size(tokens=self.tokens))
        began = time.perf_counter()
        self.whole = self._run()
        self.whole_seconds = time.perf_counter() - began

    def _run(self) -> dict[str, list[Measured]]:
        measured = {}
        for task in self.tasks:
            measured[task.name] = task.run(self.model, self.tokenizer)
            self.ticker.tick()
        return measured

    def whole_row(self) -> Row:
        """The row of the model without a plan."""
        return self._row(None, self.whole, self.whole_seconds)

    def row(self, plan: Plan) -> Row:
        """The row of the model under a plan."""
        began = time.perf_counter()
        with skip(self.model, plan) if plan else nullcontext():
            measured = self._run()
        return self._row(plan, measured, time.perf_counter() - began)

    def _row(self, plan: Plan | None, measured: dict[str, list[Measured]], seconds: float) -> Row:
        cost = cost_of(self.prices, plan)
        scores, draws = {}, {}
        for number, (task, metrics) in enumerate(measured.items()):
            counts = resamples(metrics[0].examples, self.seed + number)
            for place, metric in enumerate(metrics):
                whole = self.whole[task][place]
                kept = None
                if plan is not None and not metric.perplexity and whole.value > 0:
                    draws[task] = retention_draws(metric, whole, counts)
                    kept = interval(metric.value / whole.value, draws[task])
                label = task if place == 0 else f"{task} ({metric.metric})"
                value = interval(metric.value, metric.score(counts))
                scores[label] = Score(
                    metric=metric.metric,
                    value=value,
                    examples=metric.examples,
                    retention=kept,
                    outcomes=metric.outcomes,
                )
        return Row(
            plan=plan,
            method=plan.method if plan else "whole model",
            k=_blocks_skipped(plan),
            saved_block_flops=cost.saved_block_flops,
            saved_all_in_flops=cost.saved_all_in_flops,
            seconds=round(seconds, 3),
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

"""`evaluate`: run tasks under a list of plans, on the same examples, and keep what was lost and saved."""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from skipwise.blocks import find_contract
from skipwise.cost import cost_of, price_blocks
from skipwise.errors import UserError
from skipwise.evaluation.result import Result, Row
from skipwise.evaluation.rows import Run, judged
from skipwise.evaluation.tasks import EvaluationTask, build_task, default_tasks
from skipwise.examples import Size
from skipwise.models import kind_of
from skipwise.plan import Plan
from skipwise.sampling.accounts import Share, account
from skipwise.sampling.denoiser import denoising
from skipwise.versions import versions
from skipwise.wrapping import unwrap


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
    model = unwrap(model)
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

    def _run(self, plan: Plan | None) -> Run:
        measured = {}
        began = time.perf_counter()
        with denoising(self.model, plan, self.others, tokenizer=self.tokenizer) as denoiser:
            for task in self.tasks:
                measured[task.name] = task.run(denoiser, self.tokenizer)
                self.ticker.tick()
        seconds = time.perf_counter() - began
        taken = sum(account(denoiser).values(), Share())
        if taken.forwards:
            return Run(measured, taken.block_flops, taken.all_in_flops, seconds)
        # an autoregressive model decodes by itself, under a static plan
        cost = cost_of(price_blocks(self.model, Size(tokens=self.tokens)), plan)
        return Run(measured, cost.block_flops, cost.all_in_flops, seconds)

    def whole_row(self) -> Row:
        """The row of the model without a plan."""
        return judged(None, self.whole, self.whole, self.seed)

    def row(self, plan: Plan) -> Row:
        """The row of the model under a plan."""
        return judged(plan, self._run(plan), self.whole, self.seed)

"""The Pareto front: schedules of every kind for a ladder of budgets, judged together; and the choice of one of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from skipwise.calibration import Calibration, by_divergence
from skipwise.cost import price_blocks
from skipwise.errors import UserError
from skipwise.evaluation import Result, Row, calibration_texts, default_tasks, evaluate
from skipwise.evaluation.tasks import EvaluationTask, build_task
from skipwise.examples import Size
from skipwise.plan import Plan
from skipwise.planners.grid import BudgetError
from skipwise.planners.sandwich import PLACEMENTS, schedule
from skipwise.sampling.others import load_other
from skipwise.scheduling.scheduler import Scheduler, harm_for
from skipwise.scheduling.visited import visit
from skipwise.stand_ins import StandInKind
from skipwise.typed import check_types

FIT = 4  # moments that stand-ins are fitted on for each that blocks are chosen on
PLANS = "plans"  # folder of a front's plans, beside its Result


@dataclass(frozen=True)
class FrontSettings:
    """How a front is looked for.

    budgets: fractions of all-in FLOPs to save, one plan of each kind for each. segments: equal parts of the trajectory,
    each with a skip set of its own. stand_in: skipped blocks leave nothing, and in a second plan of each kind this.
    moments: sequences that a sampler went through, to choose blocks on; stand-ins are fitted on up to 4 times as many,
    where the examples give them. trials: grids of a kind and budget that are decoded
    on the calibration split, 0 to trust the calibration. examples: of a task on the calibration split.
    """

    budgets: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    segments: int = 4
    stand_in: StandInKind | None = "linear"
    moments: int = 1024
    trials: int = 12
    examples: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for budget in self.budgets:
            if not 0 < budget < 1:
                raise UserError(f"A budget of {budget} is no fraction to save; choose above 0 to below 1, such as 0.3.")
        if not self.budgets or self.segments < 1:
            raise UserError(f"budgets={self.budgets}, segments={self.segments}: at least one of each is needed.")


def find_front(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str | EvaluationTask] | None = None,
    settings: FrontSettings | None = None,
    *,
    calibrate_on: Sequence[EvaluationTask] | None = None,
    light: str | None = None,
    others: Mapping[str, nn.Module] | None = None,
    examples: int | None = None,
    name: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Result:
    """A Result with a row for every kind of schedule and budget, all evaluated on the same examples of the test split.

    Kinds: "grid", self-scheduled; "static", the same search for one skip set; "greedy", that skip set as `make_plan`
    chooses it; "light ...", the light model in the placement that is best on the calibration split; "grid + light",
    self-scheduled with the light model in reserve. tasks: as for `evaluate`; calibrate_on: the same tasks on the
    calibration split, to be given where tasks are not names. light: another model, as `skipwise.load` takes it, or a
    key of `others`. examples: a task, on the test split. on_progress(what, done, total).
    Raises UserError when the model is no masked diffusion model, and BudgetError when no kind saves any of the budgets.
    """
    settings = settings or FrontSettings()
    listed = list(tasks or default_tasks(tokenizer))
    candidates = _Candidates(model, tokenizer, listed, settings, calibrate_on, light, others, on_progress)
    plans = list(candidates.plans())
    if not plans:
        raise candidates.unmet[0][2]
    tell = (lambda done, total: on_progress("evaluate", done, total)) if on_progress else None
    result = evaluate(
        model,
        tokenizer,
        listed,
        plans,
        examples=examples,
        seed=settings.seed,
        name=name,
        others=others,
        on_progress=tell,
    )
    unmet = [f"{kind} cannot save {budget:g}" for kind, budget, _ in candidates.unmet]
    told = {"front": asdict(settings) | {"unmet": unmet}}
    return result.model_copy(update={"settings": result.settings | told})


class _Candidates:
    """Plans of every kind, a kind at a time."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        tasks: Sequence[str | EvaluationTask],
        settings: FrontSettings,
        calibrate_on: Sequence[EvaluationTask] | None,
        light: str | None,
        others: Mapping[str, nn.Module] | None,
        on_progress: Callable[[str, int, int], None] | None,
    ):
        self.model, self.tokenizer, self.settings, self.on_progress = model, tokenizer, settings, on_progress
        self.tasks = list(calibrate_on or _on_calibration(tasks, settings))
        self.light = {light: load_other(light, model, tokenizer, others)} if light else {}
        self.fit_on = visit(model, tokenizer, self.tasks, most=FIT * settings.moments)
        step = max(1, -(-len(self.fit_on.samples) // settings.moments))
        self.visited = replace(self.fit_on, samples=self.fit_on.samples[::step])
        self.unmet: list[tuple[str, float, BudgetError]] = []  # (kind, budget, what it says)
        self.texts = [task for task in tasks if isinstance(task, str)] or None

    def plans(self) -> Iterator[Plan]:
        """One for each kind and budget that the kind can meet."""
        count = self.settings.segments
        segments = tuple((number + 1) / count for number in range(count))
        kinds = [self._scheduler("grid", segments, stand_in) for stand_in in self._stand_ins()]
        kinds += [self._scheduler("static", (1.0,), stand_in) for stand_in in self._stand_ins()]
        if self.light:
            kinds.append(self._scheduler("grid + light", segments, None, self.light))
        for scheduler in (*kinds, self._greedy()):
            for budget in self.settings.budgets:
                try:
                    yield scheduler.plan(budget)
                except BudgetError as error:
                    self.unmet.append((scheduler.name, budget, error))
        for budget in self.settings.budgets:
            yield from self._placed(kinds[0], budget)

    def _stand_ins(self) -> list[StandInKind | None]:
        return list(dict.fromkeys((None, self.settings.stand_in)))

    def _scheduler(
        self,
        name: str,
        ends: Sequence[float],
        stand_in: StandInKind | None,
        light: Mapping[str, nn.Module] | None = None,
    ) -> Scheduler:
        return Scheduler(
            self.model,
            self.tokenizer,
            self.visited,
            self.tasks,
            ends,
            stand_in,
            harm_for(self.model),
            light or {},
            trials=self.settings.trials,
            fit_on=self.fit_on,
            # deeper than this a segment is not cut: what lies beyond does more harm than the same cut elsewhere
            deepest=min(0.7, 2.5 * max(self.settings.budgets)),
            seed=self.settings.seed,
            name=name,
            on_progress=self.on_progress,
        )

    def _greedy(self) -> Scheduler:
        """The plan that `make_plan` would choose by greedy, on texts that are masked at random."""
        scheduler = self._scheduler("greedy", (1.0,), None)
        texts = calibration_texts(self.tokenizer, 64, self.settings.seed, self.texts)
        longest = max(task.tokens for task in self.tasks)
        seed = self.settings.seed
        scheduler.calibration = Calibration.of(self.model, self.tokenizer, texts, max_tokens=longest, seed=seed)
        scheduler.harm, scheduler.trials = by_divergence, 0
        return scheduler

    def _placed(self, judge: Scheduler, budget: float) -> Iterator[Plan]:
        """The light model's best placement, by what is decoded on the calibration split."""
        for name, light in self.light.items():
            size = Size(tokens=max(task.tokens for task in self.tasks))
            saved = 1 - price_blocks(light, size).forward().flops / price_blocks(self.model, size).forward().flops
            if saved < budget:
                return
            plans = [schedule(judge.shape, name, placement, budget / saved) for placement in PLACEMENTS]
            judge.light = self.light
            kept = judge.retention(plans)
            best = plans[kept.index(max(kept))]
            yield best.named(f"light {best.made_by.method}")


def _on_calibration(tasks: Sequence[str | EvaluationTask], settings: FrontSettings) -> Iterator[EvaluationTask]:
    for task in tasks:
        if not isinstance(task, str):
            raise UserError(f"{task.name} is a task, not a name; give calibrate_on, the same on the calibration split.")
        yield build_task(task, "calibration", settings.examples, settings.seed, 250)


def save_front(result: Result, folder: str | Path) -> Result:
    """Write result.json and, under plans/, every plan with its stand-ins; returns the Result as it is read back."""
    folder = Path(folder)
    rows, number = [], 0
    for row in result.rows:
        if row.plan is not None:
            number += 1
            stem = "-".join(row.method.replace("+", "").split())
            path = row.plan.save(folder / PLANS / f"{number:02d}-{stem}.json")
            row = row.model_copy(update={"plan": Plan.load(path)})
        rows.append(row)
    return Result.load(result.model_copy(update={"rows": tuple(rows)}).save(folder / "result.json"))


def kept(row: Row, by: Literal["value", "low"] = "value") -> float:
    """The mean retention of a row, or its interval's lower end; the whole model keeps 1."""
    if row.plan is None:
        return 1.0
    return getattr(row.mean_retention, by) if row.mean_retention else 0.0


def front(result: Result, by: Literal["flops", "seconds"] = "flops") -> list[Row]:
    """The plans that no other row, the whole model's included, beats in cost and in retention; the dearest first.

    by: all-in FLOPs as they were counted, or measured seconds. Of rows that are equal in both the first stays.
    """
    best: list[Row] = []
    for row in sorted(result.rows, key=lambda row: (cost(row, by), -kept(row))):
        if not best or kept(row) > kept(best[-1]):
            best.append(row)
    return [row for row in reversed(best) if row.plan is not None]


def cost(row: Row, by: Literal["flops", "seconds"] = "flops") -> float:
    """What a row took: the fraction of the whole model's all-in FLOPs, or seconds."""
    return row.seconds if by == "seconds" else 1 - row.saved_all_in_flops


def pick(result: Result, keep: float = 0.95, by: Literal["low", "value"] = "low") -> Plan:
    """The plan that saves the most all-in FLOPs of those that keep `keep` of the score.

    by: the lower end of the 95% interval of the mean retention must reach it, or the estimate. Raises UserError when
    none does, and says which is nearest.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep={keep} is no fraction of the score; choose above 0 to 1, such as 0.95.")
    rows = [row for row in result.rows if row.plan is not None and row.mean_retention]
    if not rows:
        raise UserError("The Result has no plan with a retention; make one with `skipwise schedule front`.")
    safe = [row for row in rows if kept(row, by) >= keep]
    if not safe:
        near = max(rows, key=lambda row: (kept(row, by), row.saved_all_in_flops))
        raise UserError(
            f"No plan keeps {keep:.1%} of the score{' with certainty' if by == 'low' else ''}; the nearest is "
            f"{near.method}, which saves {near.saved_all_in_flops:.1%} of all-in FLOPs and keeps {kept(near):.1%} "
            f"(at least {kept(near, 'low'):.1%}). Choose a smaller --keep, or a front with smaller budgets."
        )
    best = max(safe, key=lambda row: (row.saved_all_in_flops, kept(row)))
    assert best.plan is not None
    return best.plan

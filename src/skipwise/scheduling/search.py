"""`search_schedules`: every schedule over coarse segments, screened, halved, and the best confirmed on fresh examples.

Source: the exhaustive search over coarse segments of "Not All Denoising Steps Are Equal" (arXiv 2604.02340). Ours: what
is light may be the model itself under a static plan; hopeless schedules stop early; and as the best of many on the same
examples looks better than it is, what is reported of the finalists is measured on examples that chose nothing.
"""

import datetime
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skipwise.errors import UserError
from skipwise.evaluation.result import Result, Row
from skipwise.evaluation.tasks import EvaluationTask
from skipwise.loading import load_skeleton
from skipwise.models import kind_of
from skipwise.plan import Plan
from skipwise.planners.sandwich import Light
from skipwise.scheduling.candidates import (
    Candidate,
    Count,
    Screen,
    Space,
    check_count,
    check_segments,
    screened,
)
from skipwise.scheduling.engine import Engine, open_engine
from skipwise.scheduling.halving import Standing, halve
from skipwise.scheduling.store import Store
from skipwise.scheduling.table import NOTE, Found, Search, row
from skipwise.scheduling.trials import Outcome, Trial, Work, ranged
from skipwise.versions import versions

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Rules:
    """How a search goes. segments: of the trajectory; light_segments: how many of them are light, or else budget: what
    a schedule saves at least, as a fraction of FLOPs by `count` (by formula, over a trajectory that is walked evenly;
    what a task's steps made of it is in the table). screen: share of the schedules that an importance lets
    through. examples: of every task, for the finalists; finalists: how many schedules get so far; confirm: examples
    after those, for what is reported. seed: of the bootstrap.
    """

    segments: int = 8
    light_segments: int | None = None
    budget: float | None = None
    count: Count = "all-in"
    screen: float = 0.5
    examples: int = 64
    finalists: int = 4
    confirm: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_segments(self.segments)
        check_count(self.count)
        if (self.light_segments is None) == (self.budget is None):
            raise UserError("Give either the number of light segments, or a budget of FLOPs to save.")
        for what in ("examples", "finalists", "confirm"):
            if getattr(self, what) < 1:
                raise UserError(f"{what}={getattr(self, what)}; at least 1 is needed.")
        if not 0 < self.screen <= 1:
            raise UserError(f"screen={self.screen:g} is no share of the schedules; choose one above 0, up to 1 (all).")

    def candidates(self, space: Space) -> list[Candidate]:
        """All schedules that the search is over."""
        if self.budget is not None:
            return space.saving(self.segments, self.budget, self.count)
        assert self.light_segments is not None
        return space.with_light(self.segments, self.light_segments)


def search_schedules(
    model: str,
    light: Light,
    tasks: Sequence[EvaluationTask],
    *,
    importance: Screen | None = None,
    engine: str = "inline",
    workers: int = 2,
    address: str | None = None,
    folder: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    tokenizer: str | None = None,
    on_progress: Progress | None = None,
    **rules: Any,
) -> Search:
    """Search the schedules of a masked diffusion model and a light one; the best keeps the most of the tasks' scores.

    model, tokenizer: what `skipwise.load` takes; light: a model likewise, or a static plan of the model. tasks:
    `ExactMatch` or `Writing`, whose ranges of examples the search sets. rules: fields of `Rules`. importance: screens
    schedules before any runs. engine, workers, address: where trials run, see `open_engine`; that does not change the
    outcome. folder: finished trials are kept there, one line each, and a search in the same folder does not run them
    again; the tables are written there too. on_progress(done, total) counts examples, all trials together.
    Raises UserError for settings that cannot be, a budget that no schedule meets, and a folder of another search.
    """
    chosen = Rules(**rules)
    work = Work(model, tuple(tasks), (light,) if isinstance(light, str) else (), dtype, device, tokenizer=tokenizer)
    space = Space.of(model, light, work.tokens)
    candidates = chosen.candidates(space)
    out: list[Candidate] = []
    if importance is not None:
        rated = screened(candidates, importance, space)
        through = max(min(chosen.finalists, len(rated)), math.ceil(chosen.screen * len(rated)))
        candidates, out = rated[:through], rated[through:]
    with (
        tempfile.TemporaryDirectory(prefix="skipwise-search-") as scratch,
        Store(folder or scratch, work) as store,
        open_engine(work, engine, workers, address) as opened,
    ):
        found = _Search(work, space, chosen, store, opened, on_progress).run(candidates, out)
        if folder is not None:
            found.save(folder)  # while the folder is still locked
        return found


@dataclass
class _Search:
    """A search in progress. done: examples run so far, of all trials together."""

    work: Work
    space: Space
    rules: Rules
    store: Store
    engine: Engine
    on_progress: Progress | None
    done: int = field(default=0, init=False)

    def run(self, candidates: Sequence[Candidate], screened_out: Sequence[Candidate]) -> Search:
        """Halve, confirm, and put together."""
        rules = self.rules
        standings = halve(candidates, rules.examples, rules.finalists, self._in_rounds, rules.seed)
        finalists = [one for one in standings if not one.dropped]
        extra = self._sandwich([one.candidate for one in finalists])
        methods = {f"search {one.candidate.segments}": one.candidate.plan for one in finalists}
        rows = self._confirm(methods | ({"sandwich": extra.plan} if extra else {}))
        confirmed = rows[1 : 1 + len(finalists)]
        return Search(self._table(standings, confirmed, screened_out), self._result(rows))

    def _in_rounds(self, trials: Sequence[Trial], ahead: int) -> list[Outcome]:
        return self._all(trials, ahead + self.rules.confirm * (self.rules.finalists + 2))

    def _all(self, trials: Sequence[Trial], ahead: int) -> list[Outcome]:
        """Outcomes of all trials, in their order; those that are known are not run again."""
        missing = [trial for trial in trials if self.store.get(trial) is None]
        total = self.done + sum(trial.end - trial.begin for trial in missing) + ahead
        self._tell(total)
        for trial, outcome in self.engine.run(missing):
            self.store.add(trial, outcome)
            self.done += trial.end - trial.begin
            self._tell(total)
        return [self.store.known[trial.key(self.store.identity)] for trial in trials]

    def _tell(self, total: int) -> None:
        if self.on_progress:
            self.on_progress(self.done, total)

    def _sandwich(self, finalists: Sequence[Candidate]) -> Candidate | None:
        """The paper's schedule with as many light segments as the best, unless it is a finalist anyway."""
        count = self.rules.light_segments or finalists[0].segments.count("L")
        sandwich = self.space.sandwich(self.rules.segments, count)
        return None if any(one.plan.phases == sandwich.plan.phases for one in finalists) else sandwich

    def _confirm(self, plans: dict[str, Plan]) -> list[Row]:
        """Rows on examples after those that schedules were chosen by: the whole model's, and one a plan."""
        begin, end = self.rules.examples, self.rules.examples + self.rules.confirm
        trials = [Trial(None, begin, end), *(Trial(plan, begin, end, name) for name, plan in plans.items())]
        whole, *outcomes = self._all(trials, 0)
        seed = self.rules.seed
        rest = zip(plans.items(), outcomes, strict=True)
        return [
            row("whole model", None, whole, whole, seed),
            *(row(name, plan, outcome, whole, seed) for (name, plan), outcome in rest),
        ]

    def _table(
        self, standings: Sequence[Standing], confirmed: Sequence[Row], out: Sequence[Candidate]
    ) -> tuple[Found, ...]:
        """Those that ran, best first, then those that were screened out."""
        rows = [*confirmed, *[None] * (len(standings) - len(confirmed))]
        ran = [_found(rank, one, row) for rank, (one, row) in enumerate(zip(standings, rows, strict=True), start=1)]
        return (*ran, *(_never_ran(rank, one) for rank, one in enumerate(out, start=len(ran) + 1)))

    def _result(self, rows: Sequence[Row]) -> Result:
        rules, work = self.rules, self.work
        begin, end = rules.examples, rules.examples + rules.confirm
        skeleton = load_skeleton(work.model)
        settings = {
            "tasks": [task.name for task in work.tasks],
            "examples": rules.confirm,
            "first": begin,
            "tokens": work.tokens,
            "light": self.space.light if isinstance(self.space.light, str) else self.space.light.describe(),
            "search": asdict(rules),
            "note": NOTE,
        }
        return Result(
            name=work.model,
            kind=kind_of(skeleton),
            model=self.space.shape.model_dump(),
            rows=tuple(rows),
            device=work.device or "cpu",
            dtype=work.dtype or str(next(skeleton.parameters()).dtype).removeprefix("torch."),
            seeds={"bootstrap": rules.seed},
            settings=settings | {task.name: facts for task in work.tasks if (facts := ranged(task, begin, end).facts)},
            versions=versions(),
            date=datetime.date.today().isoformat(),
        )


def _found(rank: int, one: Standing, row: Row | None) -> Found:
    firsts = {task: metrics[0] for task, metrics in one.outcome.scores.items()}
    return Found(
        rank=rank,
        segments=one.candidate.segments,
        round=one.round + 1,
        dropped=one.dropped,
        examples=max(metric.examples for metric in firsts.values()),
        scores={task: metric.value for task, metric in firsts.items()},
        retention=one.kept,
        saved_block_flops=one.saved_block_flops,
        saved_all_in_flops=one.saved_all_in_flops,
        importance=one.candidate.importance,
        plan=one.candidate.plan,
        confirmed=row,
    )


def _never_ran(rank: int, one: Candidate) -> Found:
    return Found(
        rank=rank,
        segments=one.segments,
        round=None,
        dropped="screened",
        examples=0,
        scores={},
        retention=None,
        saved_block_flops=one.saved_block_flops,
        saved_all_in_flops=one.saved_all_in_flops,
        importance=one.importance,
        plan=one.plan,
    )

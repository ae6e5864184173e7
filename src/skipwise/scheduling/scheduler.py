"""Self-scheduled plans of one model: made for a budget from what its own sampler visits, judged on what it decodes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from skipwise.blocks import find_contract
from skipwise.calibration import Calibration, Harm, by_commitment, by_divergence
from skipwise.cost import price_blocks
from skipwise.evaluation.measure import Measured, retention
from skipwise.evaluation.tasks import EvaluationTask
from skipwise.examples import Size
from skipwise.healing import fit_alone, fit_stand_ins
from skipwise.models import fact
from skipwise.plan import Plan, Provenance
from skipwise.planners.grid import Cell, Curve, Grid, Savings, allocate, curves, improve, spans
from skipwise.sampling.denoiser import denoising
from skipwise.stand_ins import StandInKind, key
from skipwise.versions import versions

AT_ONCE = 6  # blocks that are tested together while the most promising ones are looked for


@dataclass
class Scheduler:
    """Makes plans of one model. Everything that it learns is kept, so that a ladder of budgets costs little more.

    calibration: the moments that plans are chosen on; fit_on: more of them, for stand-ins, which learn their data by
    heart when it is little; the same by default; tasks: what decoded quality is, on the
    calibration split; ends: of the segments; stand_in: what skipped blocks leave behind; light: models that may take
    segments over, by name; trials: grids that local search may decode with, 0 for none; deepest: the largest part of
    the blocks that a segment may skip.
    """

    model: nn.Module
    tokenizer: Any
    calibration: Calibration
    tasks: Sequence[EvaluationTask]
    ends: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
    stand_in: StandInKind | None = None
    harm: Harm = by_commitment
    light: Mapping[str, nn.Module] = field(default_factory=dict)
    trials: int = 0
    deepest: float = 0.7
    fit_on: Calibration | None = None
    seed: int = 0
    name: str = "grid"
    on_progress: Callable[[str, int, int], None] | None = None

    def __post_init__(self) -> None:
        contract = find_contract(self.model)
        self.shape, self.stack = contract.shape, contract.main_stack
        self._fit_on = self.fit_on or self.calibration
        self._fitted: dict[tuple[float, float, tuple[int, ...]], list[tuple[int, str, Tensor]]] = {}

    def plan(self, budget: float) -> Plan:
        """The plan that saves at least `budget` of all-in FLOPs. Raises BudgetError when no grid saves so much."""
        savings = Savings(self.calibration.share, self._saved)
        grid = allocate(self.curves, self.ends, savings, budget)
        scores: dict[str, Any] = {"harm_before_search": self._harms(grid)}
        if self.trials:
            settings = {"trials": self.trials, "seed": self.seed}
            found = improve(grid, self.curves, self._worth, savings, budget, **settings)
            grid = found.grid
            scores |= {"calibration_retention": found.quality, "grids_tried": found.tried}
        return self._dressed(grid, budget, scores)

    @cached_property
    def curves(self) -> list[Curve]:
        """A curve for every segment."""
        leaving = partial(fit_alone, self._fit_on, self.stack) if self.stand_in == "linear" else None
        tell = partial(self.on_progress, f"{self.name}: order blocks") if self.on_progress else None
        most = max(1, math.ceil(self.deepest * self.shape.stacks[self.stack]))
        one, other = self.calibration.halves() if len(self.ends) > 1 else (self.calibration, None)
        return curves(
            one,
            self.stack,
            self.ends,
            self.harm,
            judge=other,
            leaving=leaving,
            light=self.light,
            most=most,
            at_once=AT_ONCE,
            on_progress=tell,
        )

    def _harms(self, grid: Grid) -> list[float]:
        """The harm of each cell, as its curve says."""
        known = [{point.cell: point.harm for point in curve.points} for curve in self.curves]
        return [points[cell] for points, cell in zip(known, grid.cells, strict=True)]

    def _saved(self, cell: Cell) -> float:
        """The fraction of the whole model's all-in FLOPs that a cell saves in one forward."""
        size = Size(tokens=max(len(sample.ids) for sample in self.calibration.samples))
        whole = price_blocks(self.model, size)
        if cell.model:
            return 1 - price_blocks(self.light[cell.model], size).forward().flops / whole.forward().flops
        skip = {self.stack: cell.blocks}
        left = whole.forward(skip, skip if self.stand_in == "linear" else {})
        return 1 - left.flops / whole.forward().flops

    @cached_property
    def _whole(self) -> list[Measured]:
        return self._decoded(None)

    def _decoded(self, plan: Plan | None) -> list[Measured]:
        with denoising(self.model, plan, self.light, tokenizer=self.tokenizer) as denoiser:
            return [task.run(denoiser, self.tokenizer)[0] for task in self.tasks]

    def retention(self, plans: Sequence[Plan]) -> list[float]:
        """What each plan keeps: the mean over the calibration tasks, decoded."""
        found = []
        for plan in plans:
            pairs = zip(self._decoded(plan), self._whole, strict=True)
            found.append(float(np.mean([retention(mine, whole) for mine, whole in pairs if whole.value > 0])))
        return found

    def _worth(self, grids: Sequence[Grid]) -> list[float]:
        return self.retention([self._dressed(grid) for grid in grids])

    def _dressed(self, grid: Grid, budget: float | None = None, scores: Mapping[str, Any] | None = None) -> Plan:
        """The plan of a grid, with its stand-ins."""
        settings = {
            "budget": budget,
            "segments": len(self.ends),
            "trials": self.trials,
            "seed": self.seed,
            "harm": self.harm.__name__,
        }
        made_by = Provenance(
            method=self.name,
            settings=settings,
            calibration=self.calibration.facts,
            scores={self.stack: dict(scores or {})},
            versions=versions(),
        )
        plan = grid.plan(self.shape, self.stack, made_by)
        if not self.stand_in or not any(phase.skip for phase in plan.phases):
            return plan
        tensors: dict[str, Tensor] = {}
        for number, (begin, end) in enumerate(spans([phase.until for phase in plan.phases])):
            for block, which, tensor in self._stand_ins(plan.phases[number].skip.get(self.stack, ()), begin, end):
                tensors[key(number, self.stack, block, which)] = tensor
        return plan.with_stand_ins(self.stand_in, tensors)

    def _stand_ins(self, blocks: tuple[int, ...], begin: float, end: float) -> list[tuple[int, str, Tensor]]:
        """(block, "weight" or "bias", tensor) of one phase, fitted once for all plans that have it."""
        if not blocks:
            return []
        if (begin, end, blocks) not in self._fitted:
            assert self.stand_in is not None
            parts = [(begin, Cell()), (end, Cell(blocks)), (1.0, Cell())]
            parts = [part for part, before in zip(parts, (0.0, begin, end), strict=True) if part[0] > before]
            alone = Grid(*(tuple(column) for column in zip(*parts, strict=True))).plan(self.shape, self.stack)
            tensors = fit_stand_ins(alone, self._fit_on, self.stand_in, epochs=1).stand_in_tensors()
            names = [(name.split("/"), tensor) for name, tensor in tensors.items()]
            self._fitted[begin, end, blocks] = [(int(block), which, t) for (_, _, block, which), t in names]
        return self._fitted[begin, end, blocks]


def harm_for(model: nn.Module) -> Harm:
    """What counts as harm for a model's own sampler, which fills masks by confidence or at random times."""
    return by_commitment if fact(model, "commits_by_confidence") else by_divergence

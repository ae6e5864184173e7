"""Self-scheduling: which blocks to skip in which part of the trajectory, so that the model is its own light model.

Ours, beyond the papers. A schedule is a grid, segments of the trajectory by blocks. Each segment is given a curve:
blocks in the order in which they do least harm there, and the harm after each (`planners.greedy`); another model that
may take the segment over is one more point. Dynamic programming picks a point a segment under a budget of FLOPs, and
local search changes single cells by what decoding really yields.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from skipwise.calibration import Calibration, Harm, by_divergence
from skipwise.errors import UserError
from skipwise.plan import ModelShape, Phase, Plan, Provenance
from skipwise.planners.greedy import Search

# begin, end -> what each block leaves behind there when it is skipped
Leaving = Callable[[float, float], Mapping[int, nn.Module]]
SLACK = 1e-9  # 0.25 of 24 equal blocks is 6, whatever rounding says


class BudgetError(UserError):
    """More is to be saved than any grid saves."""


@dataclass(frozen=True)
class Cell:
    """How one segment is run: without some blocks, in ascending order, or by another model altogether."""

    blocks: tuple[int, ...] = ()
    model: str | None = None


@dataclass(frozen=True)
class Point:
    """A cell, and the harm that it does where it stands: a mean over calibration data, such as nats a token."""

    cell: Cell
    harm: float


@dataclass(frozen=True)
class Curve:
    """The points that a segment may take, of which the first skips nothing, and the order in which blocks go."""

    points: tuple[Point, ...]
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Cells of consecutive segments, which end at progress `ends`, the last of them 1."""

    ends: tuple[float, ...]
    cells: tuple[Cell, ...]

    def plan(self, shape: ModelShape, stack: str, made_by: Provenance | None = None) -> Plan:
        """The plan; equal neighbours are one phase."""
        last = [a != b for a, b in pairwise(self.cells)] + [True]
        phases = tuple(
            Phase(until=end, skip={stack: cell.blocks} if cell.blocks else {}, model=cell.model)
            for end, cell, ends_here in zip(self.ends, self.cells, last, strict=True)
            if ends_here
        )
        return Plan(model=shape, phases=phases, made_by=made_by or Provenance(method="grid"))


@dataclass(frozen=True)
class Savings:
    """What a grid saves: `share(begin, end)` of the forwards fall in a segment, where a cell saves `of(cell)`."""

    share: Callable[[float, float], float]
    of: Callable[[Cell], float]

    def __call__(self, grid: Grid) -> float:
        """The fraction of the whole model's FLOPs that is saved."""
        return sum(self.share(a, b) * self.of(cell) for (a, b), cell in zip(spans(grid.ends), grid.cells, strict=True))


def spans(ends: Sequence[float]) -> list[tuple[float, float]]:
    """(begin, end) of every segment."""
    return list(pairwise((0.0, *ends)))


def curves(
    calibration: Calibration,
    stack: str,
    ends: Sequence[float],
    harm: Harm = by_divergence,
    *,
    judge: Calibration | None = None,
    leaving: Leaving | None = None,
    light: Mapping[str, nn.Module] | None = None,
    most: int | None = None,
    at_once: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Curve]:
    """A curve for every segment, of up to `most` skipped blocks; a point that skips nothing, where no forward falls.

    judge: other data, on which harm is measured, so that a segment's own order is not flattered by the data that it was
    found on; the order over the whole trajectory, which is found on more, then competes with it in every segment.
    leaving: what skipped blocks leave behind while the next is chosen. light: models that may take a segment over, by
    name. at_once: see `Search`. on_progress(done, total) counts segments.
    """

    def search(data: Calibration, begin: float, end: float) -> Search:
        left = leaving(begin, end) if leaving else None
        return Search(data, stack, begin=begin, end=end, harm=harm, left=left, at_once=at_once)

    parts = spans(ends)
    whole = [(0.0, 1.0)] if judge and len(parts) > 1 else []
    orders: list[tuple[int, ...]] = []
    found = []
    for number, (begin, end) in enumerate([*whole, *parts]):
        own = search(calibration, begin, end)
        order = tuple(own.first(own.length if most is None else most)) if own.batches else ()
        if on_progress:
            on_progress(number + 1, len(whole) + len(parts))
        if number < len(whole):
            orders.append(order)
            continue
        judged = search(judge, begin, end) if judge else own
        points = {Cell(): 0.0}
        if own.batches and judged.batches:
            points |= {Cell(model=name): judged.harm_of(other) for name, other in (light or {}).items()}
            points |= _along([order, *orders], judged, own.costs if judge is None else None)
        found.append(Curve(tuple(Point(cell, value) for cell, value in points.items()), order))
    return found


def _along(orders: Sequence[Sequence[int]], search: Search, costs: Sequence[float] | None) -> dict[Cell, float]:
    """Cell -> harm for all that orders lead to; costs: those of the one order, if they are known."""
    cells = list(dict.fromkeys(Cell(tuple(sorted(order[: k + 1]))) for order in orders for k in range(len(order))))
    harms = costs if costs is not None else [search.harm_without(cell.blocks) for cell in cells]
    return dict(zip(cells, harms, strict=True))


def allocate(curves: Sequence[Curve], ends: Sequence[float], savings: Savings, budget: float) -> Grid:
    """The grid that saves at least `budget` of the FLOPs and does the least harm, summed over the forwards.

    Exact, as curves need not be convex: of all that the first segments may save, only what nothing beats in both
    saving and harm is carried on. Raises BudgetError, with the most that can be saved, when no grid saves so much.
    """
    ways: list[tuple[float, float, tuple[Cell, ...]]] = [(0.0, 0.0, ())]
    for curve, (begin, end) in zip(curves, spans(ends), strict=True):
        share = savings.share(begin, end)
        steps = [(share * savings.of(point.cell), share * point.harm, point.cell) for point in curve.points]
        ways = _undominated([(s + a, h + b, (*cells, cell)) for s, h, cells in ways for a, b, cell in steps])
    enough = [way for way in ways if way[0] >= budget - SLACK]
    if not enough:
        most = max(way[0] for way in ways)
        raise BudgetError(f"No grid saves {budget:.1%} of the FLOPs; the most is {most:.1%}. Choose a smaller budget.")
    return Grid(tuple(ends), min(enough, key=lambda way: (way[1], -way[0]))[2])


def _undominated(ways: list[tuple[float, float, tuple[Cell, ...]]]) -> list[tuple[float, float, tuple[Cell, ...]]]:
    """Those that no other beats in saving and in harm."""
    kept: list[tuple[float, float, tuple[Cell, ...]]] = []
    for way in sorted(ways, key=lambda way: (-way[0], way[1])):
        if not kept or way[1] < kept[-1][1]:
            kept.append(way)
    return kept


@dataclass(frozen=True)
class Found:
    """A grid and what it is worth, with how many were tried on the way."""

    grid: Grid
    quality: float
    tried: int


def improve(
    grid: Grid,
    curves: Sequence[Curve],
    evaluate: Callable[[Sequence[Grid]], Sequence[float]],
    savings: Savings,
    budget: float,
    *,
    trials: int = 32,
    width: int = 4,
    seed: int = 0,
) -> Found:
    """Local search on real quality: the best of `width` changed grids is taken while it is better.

    evaluate: qualities of some grids, the higher the better. A change moves one skip to another segment, exchanges a
    block, or shifts a border; one that would save less than `budget` is not tried. At most `trials` grids are
    evaluated, the given one included. The same seed gives the same grid.
    """
    moves = _Moves(curves, random.Random(seed))

    def allowed(new: Grid) -> bool:
        return new not in seen and savings(new) >= budget - SLACK and not _idle(new, savings)

    (quality,) = evaluate([grid])
    seen, tried = {grid}, 1
    while tried < trials:
        new = moves.draw(grid, min(width, trials - tried), allowed)
        if not new:
            break
        seen.update(new)
        tried += len(new)
        best, found = max(zip(new, evaluate(new), strict=True), key=lambda pair: pair[1])
        if found > quality:
            grid, quality = best, found
    return Found(grid, quality, tried)


def _idle(grid: Grid, savings: Savings) -> bool:
    """Whether something is skipped where no forward falls."""
    places = zip(spans(grid.ends), grid.cells, strict=True)
    return any(cell != Cell() and savings.share(begin, end) <= 0 for (begin, end), cell in places)


class _Moves:
    """Changes to a grid. Which block comes back or goes next is drawn near the end of its segment's order."""

    near = 3
    attempts = 50  # draws for one new grid, most of which may be over budget or known

    def __init__(self, curves: Sequence[Curve], chance: random.Random):
        self.orders = [curve.order for curve in curves]
        self.chance = chance

    def draw(self, grid: Grid, count: int, allowed: Callable[[Grid], bool]) -> list[Grid]:
        """Up to `count` different allowed grids, each one change away."""
        new: dict[Grid, None] = {}
        for _ in range(count * self.attempts):
            changed = self.chance.choice((self._moved, self._moved, self._exchanged, self._shifted))(grid)
            if changed is not None and allowed(changed):
                new[changed] = None
            if len(new) == count:
                break
        return list(new)

    def _moved(self, grid: Grid) -> Grid | None:
        """One skip less in a segment, one more in another."""
        if len(grid.cells) < 2:
            return None
        source, target = self.chance.sample(range(len(grid.cells)), 2)
        less, more = self._without(grid, source), self._with(grid, target)
        return _replaced(grid, {source: less, target: more}) if less and more else None

    def _exchanged(self, grid: Grid) -> Grid | None:
        """Another block skipped in the place of one."""
        place = self.chance.randrange(len(grid.cells))
        more = self._with(grid, place)
        swapped = more and self._without(_replaced(grid, {place: more}), place)
        return _replaced(grid, {place: swapped}) if swapped and swapped != grid.cells[place] else None

    def _shifted(self, grid: Grid) -> Grid | None:
        """A border moved half-way to one of its neighbours."""
        if len(grid.cells) < 2:
            return None
        place = self.chance.randrange(len(grid.cells) - 1)
        near = (0.0, *grid.ends)[place] if self.chance.random() < 0.5 else grid.ends[place + 1]
        ends = list(grid.ends)
        ends[place] = (ends[place] + near) / 2
        return replace(grid, ends=tuple(ends))

    def _without(self, grid: Grid, place: int) -> Cell | None:
        skipped = [block for block in self.orders[place] if block in grid.cells[place].blocks]
        if not skipped:
            return None
        back = self.chance.choice(skipped[-self.near :])
        return Cell(tuple(block for block in grid.cells[place].blocks if block != back))

    def _with(self, grid: Grid, place: int) -> Cell | None:
        cell = grid.cells[place]
        left = [block for block in self.orders[place] if block not in cell.blocks]
        if not left or cell.model:
            return None
        return Cell(tuple(sorted((*cell.blocks, self.chance.choice(left[: self.near])))))


def _replaced(grid: Grid, cells: Mapping[int, Any]) -> Grid:
    return replace(grid, cells=tuple(cells.get(number, cell) for number, cell in enumerate(grid.cells)))

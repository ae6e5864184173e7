"""Schedules on the page: the front of cost against quality, and the grid of each plan on it."""

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from skipwise.evaluation.result import Result, Row
from skipwise.plan import Phase, Plan
from skipwise.report.figures import COLOURS, INK, data_uri, error_bars, new_figure
from skipwise.scheduling.front import front

# how a cell of the grid is run -> its colour
CELLS = {"runs": "#D9DEE3", "skipped": COLOURS[0], "stand-in": COLOURS[4], "other model": COLOURS[2]}


def has_schedules(result: Result) -> bool:
    """Whether some plan changes along the trajectory, so that its number of skipped blocks alone says little."""
    return any(row.plan is not None and not row.plan.is_static for row in result.rows)


def front_figure(result: Result, by: Literal["flops", "seconds"]) -> str:
    """`draw_front` for the page."""
    return data_uri(draw_front(result, by), "svg")


def draw_front(result: Result, by: Literal["flops", "seconds"]) -> Figure:
    """Retention against all-in FLOPs saved or measured seconds, a colour a method, the front joined by a line."""
    figure, axes = new_figure(9.2, 4.2)
    judged = [row for row in result.rows if row.plan is not None and row.mean_retention]
    for number, method in enumerate(dict.fromkeys(row.method for row in judged)):
        _scatter(axes, [row for row in judged if row.method == method], by, method, number)
    best = sorted((_place(row, by), _kept(row)) for row in front(result, by))
    axes.plot(*zip(*best, strict=True), color=INK, linewidth=0.9, zorder=1, label="front") if best else None
    axes.axhline(95, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("all-in FLOPs saved (%)" if by == "flops" else "measured seconds of the whole evaluation")
    axes.set_ylabel("retention (% of the whole model's score)")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _scatter(axes: Axes, rows: Sequence[Row], by: Literal["flops", "seconds"], method: str, number: int) -> None:
    kept = [row.mean_retention for row in rows if row.mean_retention]
    axes.errorbar(
        [_place(row, by) for row in rows],
        [_kept(row) for row in rows],
        yerr=error_bars(kept),
        color=COLOURS[number % len(COLOURS)],
        marker="osD^v<>"[number // len(COLOURS) % 7],
        markersize=5,
        linestyle="none",
        capsize=3,
        label=method,
    )


def _place(row: Row, by: Literal["flops", "seconds"]) -> float:
    return row.seconds if by == "seconds" else 100 * row.saved_all_in_flops


def _kept(row: Row) -> float:
    return 100 * row.mean_retention.value if row.mean_retention else 0.0


def grid_figure(plan: Plan) -> str:
    """Which blocks of the longest stack run at which part of the trajectory, as coloured cells."""
    stack, blocks = max(plan.model.stacks.items(), key=lambda item: item[1])
    figure, axes = new_figure(3.6, 2.6)
    begun, shown = 0.0, dict.fromkeys(CELLS, False)
    for phase in plan.phases:
        for block in range(blocks):
            kind = _kind(phase, stack, block)
            shown[kind] = True
            corner, width = (begun, block - 0.5), phase.until - begun
            axes.add_patch(Rectangle(corner, width, 1, facecolor=CELLS[kind], edgecolor="white", linewidth=0.4))
        begun = phase.until
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, blocks - 0.5)
    axes.set_xlabel("progress (0 = all noise)")
    axes.set_ylabel("block")
    handles = [Patch(facecolor=CELLS[kind], label=kind) for kind in CELLS if shown[kind]]
    axes.legend(handles=handles, frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return data_uri(figure, "svg")


def _kind(phase: Phase, stack: str, block: int) -> str:
    if phase.model:
        return "other model"
    if block not in phase.skip.get(stack, ()):
        return "runs"
    return "stand-in" if phase.stand_in else "skipped"

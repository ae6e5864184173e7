"""The page's figures. Matplotlib Figure objects, no pyplot, so that drawing leaves no global state behind."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from skipwise.analysis.record import Analysis
from skipwise.evaluation.result import Result
from skipwise.report.rows import Point, methods, of_method
from skipwise.report.svg import INK, canvas

# Okabe and Ito's colours, told apart by colour-blind readers; the blue is lighter than theirs, for dark pages.
COLOURS = ("#2A8CCB", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))
SIZE = (5.4, 3.5)


def similarity_map(similarity: Tensor) -> Figure:
    """(n+1, n+1) cosines of boundary states -> heat map."""
    values = similarity.numpy()
    finite = values[np.isfinite(values)]
    with canvas(5.4, 4.5) as (figure, axes):
        low = max(-1.0, float(finite.min())) if finite.size else 0.0
        image = _heat(axes, values, cmap="viridis", vmin=min(low, 0.999), vmax=1.0)
        axes.set_xlabel("state after block (0: input of the first)")
        axes.set_ylabel("state after block")
        _scale(figure, axes, image, "mean cosine similarity")
    return figure


def grid_map(values: Tensor, rows: Tensor, row_label: str, label: str) -> Figure:
    """(rows, blocks) statistics by denoising progress or noise level -> heat map."""
    numbers = values.numpy()
    with canvas(*SIZE) as (figure, axes):
        # update norms span decades: the first blocks' are many times larger than the rest
        norm = LogNorm() if _spans_decades(numbers) else None
        image = _heat(axes, numbers, cmap="magma", norm=norm, aspect="auto")
        axes.set_xlabel("block")
        axes.set_ylabel(row_label)
        shown = range(0, len(rows), max(1, len(rows) // 8))
        axes.set_yticks(list(shown), [f"{float(rows[i]):.2f}" for i in shown])
        _scale(figure, axes, image, label + (" (log)" if norm else ""))
    return figure


def _heat(axes: Axes, values: np.ndarray, **style: Any) -> Any:
    axes.spines[["left", "bottom"]].set_visible(False)
    # "none" keeps the image at one pixel a cell, which the browser draws sharp at any size; NaN stays see-through
    return axes.imshow(np.ma.masked_invalid(values), origin="lower", interpolation="none", **style)


def _scale(figure: Figure, axes: Axes, image: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, label=label, shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # 256 vector strips show seams
    if isinstance(image.norm, LogNorm):
        _plain_log(bar.ax)


def _spans_decades(values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() / finite.min() > 20)


def _plain_log(axes: Axes) -> None:
    """0.1, 0.2, 0.5, 1 rather than powers of ten."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _log_where_possible(axes: Axes, values: np.ndarray) -> None:
    if np.isfinite(values).any() and np.nanmax(values) > 0:
        axes.set_yscale("log")
        _plain_log(axes)


def update_norms(update_norm: Tensor) -> Figure:
    """Relative update norm of one model, block by block."""
    with canvas(*SIZE) as (figure, axes):
        axes.bar(range(len(update_norm)), update_norm.numpy(), color=COLOURS[0], width=0.75)
        _log_where_possible(axes, update_norm.numpy())
        axes.set_xlabel("block")
        axes.set_ylabel("|output - input| / |input| (log)")
    return figure


def successive_similarity(similarity: Tensor) -> Figure:
    """Cosine of every block's input and output."""
    with canvas(*SIZE) as (figure, axes):
        axes.plot(similarity.numpy(), color=COLOURS[1], marker="o", markersize=4)
        axes.set_xlabel("block")
        axes.set_ylabel("cosine of input and output")
    return figure


def models_by_depth(analyses: Sequence[Analysis], statistic: str) -> Figure:
    """`similarity` (successive) or `update_norm` of several models over relative depth."""
    with canvas(*SIZE) as (figure, axes):
        curves = [_curve(analysis, statistic) for analysis in analyses]
        for i, (analysis, curve) in enumerate(zip(analyses, curves, strict=True)):
            depth = (np.arange(len(curve)) + 0.5) / len(curve)
            axes.plot(depth, curve, label=_legible(analysis.name), markersize=3.5, **_look(i))
        if statistic == "update_norm":
            _log_where_possible(axes, np.concatenate(curves))
        norm = statistic == "update_norm"
        axes.set_ylabel("|output - input| / |input| (log)" if norm else "cosine of a block's input and output")
        axes.set_xlabel("relative depth (0: first block, 1: last)")
        axes.legend(fontsize=9)
    return figure


def _curve(analysis: Analysis, statistic: str) -> np.ndarray:
    stack = analysis.main_stack
    if statistic == "similarity":
        return analysis.successive_similarity(stack).numpy()
    return analysis.tensors[f"{stack}/update_norm"].numpy()


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _legible(name: str) -> str:
    """Matplotlib leaves out of the legend what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def retention_by_saving(results: Sequence[Result]) -> Figure:
    """Retention against block FLOPs saved, one line a model and method; every random plan is a dot of its own."""
    with canvas(7.4, 5.0) as (figure, axes):
        for i, result in enumerate(results):
            for j, method in enumerate(methods(result)):
                found = list(of_method(result, method).values())
                shift = 0.35 * (i - (len(results) - 1) / 2)  # so that models do not cover each other
                if found:
                    _line(axes, found, shift, _legible(f"{result.name}, {method}"), i, j)
        axes.axhline(90, color=INK, linewidth=0.8, linestyle=":")
        axes.text(1.0, 90, "90% ", color=INK, fontsize=8, ha="right", va="bottom", transform=axes.get_yaxis_transform())
        axes.set_xlabel("block FLOPs saved (%), counted by formula")
        axes.set_ylabel("retention (% of the whole model's score)")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, borderaxespad=0)
    return figure


def _line(axes: Axes, found: list[Point], shift: float, label: str, model: int, method: int) -> None:
    kept = [point.retention for point in found if point.retention]
    saved = [100 * point.saved_block_flops + shift for point in found]
    several = any(len(point.rows) > 1 for point in found)
    look = _look(model) | {"linestyle": "--" if several else LINES[method % len(LINES)]}
    values = np.array([[i.value, i.low, i.high] for i in kept]).T * 100
    if several:
        plans = [(x, row) for x, point in zip(saved, found, strict=True) for row in point.rows if row.mean_retention]
        dots = [100 * row.mean_retention.value for _, row in plans if row.mean_retention]
        axes.plot(saved, values[0], linewidth=1.2, label=f"{label}: mean", **(look | {"marker": ""}))
        axes.scatter([x for x, _ in plans], dots, s=26, color=look["color"], marker="x", alpha=0.75, linewidth=1)
        return
    errors = np.abs(values[1:] - values[0])
    axes.errorbar(saved, values[0], yerr=errors, capsize=3, linewidth=1.7, markersize=5, label=label, **look)

"""Figures as data URIs. No pyplot, so that drawing leaves no global state behind."""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from skipwise.analysis.record import Analysis
from skipwise.evaluation.result import Interval, Result
from skipwise.report.rows import methods, of_method

# Colours that are told apart in print and by colour-blind readers (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#333333"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure in the page's style; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def image_bytes(figure: Figure, form: str) -> bytes:
    """The figure as the content of an image file, equal for equal figures; form: "svg" or "png"."""
    buffer = io.BytesIO()
    # neither carries a date, so that the same numbers give the same file
    metadata = {"Date": None} if form == "svg" else None
    with rc_context({"svg.hashsalt": "skipwise"}):  # nor random names of its parts
        figure.savefig(buffer, format=form, dpi=110, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def data_uri(figure: Figure, form: str) -> str:
    """The figure as an image that a page can hold; form: "svg" or "png"."""
    kind = "image/svg+xml" if form == "svg" else "image/png"
    return f"data:{kind};base64,{base64.b64encode(image_bytes(figure, form)).decode()}"


def similarity_map(similarity: Tensor) -> str:
    """(n+1, n+1) cosines of boundary states -> heat map."""
    values = similarity.numpy()
    figure, axes = new_figure(5.4, 4.6)
    low = max(-1.0, float(np.nanmin(values)) if np.isfinite(values).any() else 0.0)
    image = axes.imshow(values, cmap="viridis", vmin=low, vmax=1.0, origin="lower", interpolation="nearest")
    axes.set_xlabel("state after block (0 = input of the first)")
    axes.set_ylabel("state after block")
    figure.colorbar(image, ax=axes, label="mean cosine similarity", shrink=0.85)
    return data_uri(figure, "png")


def grid_map(values: Tensor, rows: Tensor, row_label: str, label: str) -> str:
    """(rows, blocks) statistics by denoising progress or noise level -> heat map."""
    figure, axes = new_figure(5.4, 3.2)
    # update norms span decades: the first blocks' are many times larger than the rest
    norm = "log" if "norm" in label and float(values.min()) > 0 else None
    image = axes.imshow(values.numpy(), cmap="magma", norm=norm, aspect="auto", origin="lower", interpolation="nearest")
    axes.set_xlabel("block")
    axes.set_ylabel(row_label)
    axes.set_yticks(range(len(rows)), [f"{float(row):.2f}" for row in rows])
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    return data_uri(figure, "png")


def by_depth(update_norm: Tensor, similarity: Tensor) -> str:
    """Relative update norm and successive cosine of one model, block by block."""
    figure, axes = new_figure(5.4, 3.2)
    axes.bar(range(len(update_norm)), update_norm.numpy(), color=COLOURS[0], alpha=0.8, label="update norm")
    axes.set_xlabel("block")
    axes.set_yscale("log")
    axes.set_ylabel("|output - input| / |input| (log)", color=COLOURS[0])
    other = axes.twinx()
    other.plot(similarity.numpy(), color=COLOURS[1], marker="o", markersize=3, label="cosine")
    other.set_ylabel("cosine of input and output", color=COLOURS[1])
    other.spines["top"].set_visible(False)
    return data_uri(figure, "svg")


def profiles(values: Mapping[str, Tensor], label: str) -> str:
    """Named statistics (blocks or boundary states,) over relative depth, one line each."""
    figure, axes = new_figure(5.4, 3.2)
    for i, (name, line) in enumerate(values.items()):
        depth = np.linspace(0, 1, len(line))
        axes.plot(depth, line.numpy(), color=COLOURS[i % len(COLOURS)], marker="o", markersize=3, label=name)
    axes.set_xlabel("relative depth")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=9)
    return data_uri(figure, "svg")


def models_by_depth(analyses: Sequence[Analysis]) -> str:
    """Successive cosine and update norm of several models over relative depth."""
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, analysis in enumerate(analyses):
        stack = analysis.main_stack
        cosine, norm = analysis.successive_similarity(stack), analysis.tensors[f"{stack}/update_norm"]
        depth = (np.arange(len(cosine)) + 0.5) / len(cosine)
        style = {"color": COLOURS[i % len(COLOURS)], "marker": "o", "markersize": 3, "label": analysis.name}
        left.plot(depth, cosine.numpy(), **style)
        right.plot(depth, norm.numpy(), **style)
    left.set_ylabel("cosine of a block's input and output")
    right.set_ylabel("relative update norm (log)")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("relative depth")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    return data_uri(figure, "svg")


def error_bars(kept: Sequence[Interval]) -> list[list[float]]:
    """How far intervals reach below and above their values, in percent, as `Axes.errorbar` takes it."""
    return [[100 * max(0, k.value - k.low) for k in kept], [100 * max(0, k.high - k.value) for k in kept]]


def retention_by_saving(results: Sequence[Result]) -> str:
    """Retention against block FLOPs saved, one line a model and method, with intervals or ranges."""
    figure, axes = new_figure(9.2, 4.2)
    for i, result in enumerate(results):
        for j, method in enumerate(methods(result)):
            found = of_method(result, method).values()
            kept = [point.retention for point in found if point.retention]
            saved = [100 * point.saved_block_flops for point in found]
            values = [100 * interval.value for interval in kept]
            axes.errorbar(
                saved,
                values,
                yerr=error_bars(kept),
                color=COLOURS[i % len(COLOURS)],
                linestyle=("--" if method == "random" else ("-", "-.", ":")[j % 3]),
                marker="x" if method == "random" else "o",
                capsize=3,
                linewidth=1.4,
                label=f"{result.name}, {method}",
            )
    axes.axhline(90, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("block FLOPs saved (%)")
    axes.set_ylabel("retention (% of the whole model's score)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return data_uri(figure, "svg")

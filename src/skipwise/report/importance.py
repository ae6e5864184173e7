"""Step importance drawn: losses and divergences by noise level. No pyplot, so that no global state is left behind."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from skipwise.errors import unknown
from skipwise.files import write_bytes_atomically
from skipwise.report.figures import COLOURS, INK, image_bytes
from skipwise.scheduling.importance import Curve, Importance

BLUE, RED = COLOURS[:2]
FORMS = ("svg", "png")


def plot_importance(importance: Importance, path: str | Path) -> Path:
    """Draw the curves by noise level into a .svg or .png file; equal numbers give equal files.

    Raises UserError for another suffix.
    """
    form = Path(path).suffix.removeprefix(".").lower()
    if form not in FORMS:
        raise unknown("suffix of a figure", form, FORMS)
    return write_bytes_atomically(path, image_bytes(figure(importance), form))


def figure(importance: Importance) -> Figure:
    """Two panels: the models' losses, and the KL divergences, in nats a masked token with their 95% bands."""
    drawn = Figure(figsize=(9.2, 3.8), layout="constrained")
    left, right = drawn.subplots(1, 2)
    _curve(left, importance, "heavy_loss", BLUE, "heavy")
    _curve(left, importance, "light_loss", RED, "light")
    _curve(right, importance, "kl", BLUE, "KL(heavy || light)")
    _curve(right, importance, "reverse_kl", RED, "KL(light || heavy)")
    left.set_ylabel("cross-entropy, nats a masked token")
    right.set_ylabel("divergence, nats a masked token")
    for axes in (left, right):
        _frame(axes)
    drawn.suptitle(_title(importance), fontsize=10, color=INK)
    return drawn


def _curve(axes: Axes, importance: Importance, name: Curve, colour: str, label: str) -> None:
    points = getattr(importance.token, name)
    middles = (np.arange(importance.bins) + 0.5) / importance.bins
    axes.fill_between(middles, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.2, linewidth=0)
    axes.plot(middles, [p.value for p in points], color=colour, marker="o", markersize=3, linewidth=1.4, label=label)


def _frame(axes: Axes) -> None:
    axes.set_xlim(1, 0)  # as a trajectory runs, and as the segments of a schedule are written
    axes.set_ylim(bottom=0)
    axes.set_xlabel("noise level t (share of tokens masked); sampling runs this way \u2192", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _title(importance: Importance) -> str:
    title = importance.describe()
    if len(title) > 100:
        title = title[:97] + "..."
    return f"{title}; {importance.texts} texts, 95% bands"

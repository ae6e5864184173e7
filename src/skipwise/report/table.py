"""A Result as a table for the terminal, 80 columns wide or little more; the page has every interval."""

from collections.abc import Sequence
from statistics import fmean

from rich import box
from rich.table import Table

from skipwise.evaluation.result import Result, Row
from skipwise.report.rows import Point, points, whole_row


def table(result: Result) -> Table:
    """One row a method and number of skipped blocks; several random plans are a mean, with lowest and highest.

    Fractions are percentages. A text's perplexity stands below its token accuracy.
    """
    whole = whole_row(result)
    tasks = [label for label in whole.scores if " (" not in label]  # further metrics stand below or in the page
    title = f"{result.name}: score by task and retention (95% interval, or range of plans), in %"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in ("method", "k", "FLOPs saved,\nblock/all-in", *tasks, "retention"):
        shown.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    shown.add_row("whole model", "0", "-", *(_score([whole], task) for task in tasks), "-")
    for point in points(result):
        plans = f" x{len(point.rows)}" if len(point.rows) > 1 else ""
        saved = f"{100 * point.saved_block_flops:.2f}/{100 * point.saved_all_in_flops:.2f}"
        scores = (_score(point.rows, task) for task in tasks)
        shown.add_row(point.method + plans, str(point.k), saved, *scores, _retention(point))
    return shown


def _retention(point: Point) -> str:
    kept = point.retention
    return "-" if kept is None else f"{100 * kept.value:.1f} ({100 * kept.low:.1f} to {100 * kept.high:.1f})"


def _score(rows: Sequence[Row], task: str) -> str:
    """`97.0`, and `ppl 23.1` below it where there is one."""
    mean = fmean(row.scores[task].value.value for row in rows)
    values = [f"{100 * mean:.1f}" if rows[0].scores[task].is_fraction else f"{mean:.4g}"]
    label = f"{task} (perplexity)"
    if label in rows[0].scores:
        values.append(f"ppl {fmean(row.scores[label].value.value for row in rows):.4g}")
    return "\n".join(values)

"""A Result as a table for the terminal, 100 columns wide or less; the page has every interval."""

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from skipwise.evaluation.result import Result, Row
from skipwise.report.rows import percent, points, spread, whole_row


def table(result: Result) -> Table:
    """One row a method and number of skipped blocks; several random plans are a mean, with lowest and highest.

    Perplexities stand beside their document's token accuracy.
    """
    whole = whole_row(result)
    tasks = [label for label, score in whole.scores.items() if score.metric != "perplexity"]
    shown = Table(title=f"{result.name}: score by task, and retention with its 95% interval or range")
    for column in ("method", "k", "block\nFLOPs\nsaved", "all-in\nFLOPs\nsaved", "s", *tasks, "retention"):
        shown.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "retention")
    shown.add_row("whole model", "0", "-", "-", f"{whole.seconds:.1f}", *(_score([whole], task) for task in tasks), "-")
    for point in points(result):
        plans = f" x{len(point.rows)}" if len(point.rows) > 1 else ""
        saved = percent(point.saved_block_flops, 2), percent(point.saved_all_in_flops, 2)
        scores = (_score(point.rows, task) for task in tasks)
        shown.add_row(
            point.method + plans, str(point.k), *saved, f"{point.seconds:.1f}", *scores, spread(point.retention)
        )
    return shown


def _score(rows: Sequence[Row], task: str) -> str:
    """`97.0%`, and `ppl 23.1` below it where there is one."""
    values = [percent(fmean(row.scores[task].value.value for row in rows))]
    label = f"{task} (perplexity)"
    if label in rows[0].scores:
        values.append(f"ppl {fmean(row.scores[label].value.value for row in rows):.4g}")
    return "\n".join(values)

"""A Result as a table for the terminal."""

from rich.table import Table

from skipwise.evaluation.result import Result
from skipwise.report.rows import percent, points, scores_of, spread, whole_row


def table(result: Result) -> Table:
    """One row a method and number of skipped blocks; several random plans are a mean with lowest and highest."""
    labels = list(whole_row(result).scores)
    shown = Table(title=f"{result.name}: scores and retention (mean over tasks, 95% interval or range)")
    for column in ("method", "k", "block FLOPs saved", "all-in FLOPs saved", "seconds", *labels, "retention"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    whole = whole_row(result)
    shown.add_row("whole model", "0", "-", "-", f"{whole.seconds:.2f}", *(scores_of([whole], label) for label in labels), "-")
    for point in points(result):
        plans = f" ({len(point.rows)} plans)" if len(point.rows) > 1 else ""
        scores = (scores_of(point.rows, label) for label in labels)
        saved = percent(point.saved_block_flops, 2), percent(point.saved_all_in_flops, 2)
        shown.add_row(
            point.method + plans, str(point.k), *saved, f"{point.seconds:.2f}", *scores, spread(point.retention)
        )
    return shown

"""What `skipwise judge` shows: a row a plan with an interval for every number, and what the numbers depend on."""

from rich import box
from rich.table import Table

from skipwise.evaluation.result import Result, Score

COLUMNS = {
    "generative perplexity": "generative\nperplexity",
    "token entropy": "token entropy,\nnats",
    "distinct-2": "distinct-2",
    "tokens scored": "tokens\nscored",
}


def writing_table(result: Result, task: str = "writing") -> Table:
    """One row a plan in the order of the result; scores with their intervals. Seconds include the judge's reading."""
    title = f"{result.name}: {task}, with 95% bootstrap intervals over samples"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in ("plan", "k", "% FLOPs saved\nblock/all-in", *COLUMNS.values(), "seconds"):
        shown.add_column(column, justify="left" if column == "plan" else "right", no_wrap=True)
    for row in result.rows:
        saved = f"{100 * row.saved_block_flops:.2f}/{100 * row.saved_all_in_flops:.2f}" if row.plan else "-"
        scores = {score.metric: score for label, score in row.scores.items() if label.split(" (")[0] == task}
        values = (_value(scores[metric]) for metric in COLUMNS)
        shown.add_row(row.method, str(row.k), saved, *values, f"{row.seconds:.1f}")
    return shown


def facts_of(result: Result, task: str = "writing") -> list[str]:
    """One line for every thing that the scores of a task depend on besides model and plan."""
    return [f"{key}: {value}" for key, value in result.settings.get(task, {}).items()]


def _value(score: Score) -> str:
    interval = score.value
    return f"{interval.value:.4g}\n{_short(interval.low)} to {_short(interval.high)}"


def _short(number: float) -> str:
    """Three digits, and all that stand before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"

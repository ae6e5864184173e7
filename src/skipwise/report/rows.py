"""Rows of a Result in groups: one point a method and number of blocks; random plans of one k are a mean and a range."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from skipwise.evaluation.result import Interval, Result, Row


@dataclass(frozen=True)
class Point:
    """All plans of one method that skip k blocks. `retention` averages them; low and high are the confidence interval
    of a single plan, or the lowest and highest plan when there are several.
    """

    method: str
    k: int
    rows: tuple[Row, ...]

    @property
    def retention(self) -> Interval | None:
        """Mean retention over tasks (and over plans)."""
        kept = [row.mean_retention for row in self.rows if row.mean_retention]
        if len(kept) < 2:
            return kept[0] if kept else None
        values = [interval.value for interval in kept]
        return Interval(value=fmean(values), low=min(values), high=max(values))

    @property
    def saved_block_flops(self) -> float:
        """Fraction of block FLOPs saved, averaged over the plans."""
        return fmean(row.saved_block_flops for row in self.rows)

    @property
    def saved_all_in_flops(self) -> float:
        """Fraction of all FLOPs saved, averaged over the plans."""
        return fmean(row.saved_all_in_flops for row in self.rows)

    @property
    def seconds(self) -> float:
        """Measured seconds of an evaluation, averaged over the plans."""
        return fmean(row.seconds for row in self.rows)


def whole_row(result: Result) -> Row:
    """The row of the model without a plan."""
    return next(row for row in result.rows if row.plan is None)


def points(result: Result) -> list[Point]:
    """One point a method and k, methods in the order in which they come, k ascending."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in result.rows:
        if row.plan is not None:
            groups.setdefault((row.method, row.k), []).append(row)
    order = list(dict.fromkeys(method for method, _ in groups))
    keys = sorted(groups, key=lambda key: (order.index(key[0]), key[1]))
    return [Point(method, k, tuple(groups[method, k])) for method, k in keys]


def methods(result: Result) -> list[str]:
    """Names of the methods in a result, in order."""
    return list(dict.fromkeys(point.method for point in points(result)))


def of_method(result: Result, method: str) -> dict[int, Point]:
    """k -> point of one method, those with a retention only."""
    return {point.k: point for point in points(result) if point.method == method and point.retention}


def percent(value: float, digits: int = 1) -> str:
    """0.1875 -> `18.8%`."""
    return f"{100 * value:.{digits}f}%"


def spread(interval: Interval | None) -> str:
    """`93.1% (92.0 to 94.2)`."""
    if interval is None:
        return "-"
    return f"{percent(interval.value)} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def scores_of(rows: Sequence[Row], label: str) -> str:
    """One task's score over the rows of a point: with its interval for one plan, with its range for several."""
    scores = [row.scores[label] for row in rows if label in row.scores]
    if not scores:
        return "-"
    values = [score.value.value for score in scores]
    single = scores[0].value if len(scores) == 1 else Interval(value=fmean(values), low=min(values), high=max(values))
    if not scores[0].is_fraction:
        return f"{single.value:.4g} ({single.low:.4g} to {single.high:.4g})"
    return spread(single)
